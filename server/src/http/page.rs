//! The live page: files that are part of the binary. They hold no secret: whoever has no key sees a page that asks for one.

/// What the browser may do with the page: run and show what this server sends, talk to this server, and nothing else.
pub const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
     connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A file of the page.
#[derive(Debug, Clone, Copy)]
pub struct Asset {
    /// Where it is served.
    pub path: &'static str,
    /// Its `content-type`.
    pub content_type: &'static str,
    /// Its content.
    pub text: &'static str,
}

macro_rules! asset {
    ($path:literal, $file:literal, $content_type:literal) => {
        Asset {
            path: $path,
            content_type: concat!($content_type, "; charset=utf-8"),
            text: include_str!(concat!("../../assets/page/", $file)),
        }
    };
}

/// The page itself first, then what it loads.
pub const ASSETS: [Asset; 7] = [
    asset!("/", "index.html", "text/html"),
    asset!("/page.css", "page.css", "text/css"),
    asset!("/page.js", "page.js", "text/javascript"),
    asset!("/chat.js", "chat.js", "text/javascript"),
    asset!("/engine.js", "engine.js", "text/javascript"),
    asset!("/draw.js", "draw.js", "text/javascript"),
    asset!("/wire.js", "wire.js", "text/javascript"),
];
