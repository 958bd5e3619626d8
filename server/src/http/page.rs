//! The live page at `/`: files that are part of the binary. They hold no secret: whoever has no key gets a page that asks for one.

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};

use super::{ApiError, App, Call, routes::Handler};

/// What a browser lets the page do: run and show what this server sends, talk to this server, and nothing else.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
     connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A file of the page.
#[derive(Debug, Clone, Copy)]
pub struct Asset {
    /// Where it is served.
    pub path: &'static str,
    /// Its media type, as the table of routes has it.
    pub content_types: &'static [&'static str],
    /// What is in it.
    #[cfg(test)]
    pub text: &'static str,
    /// Serves it.
    pub handler: Handler,
}

macro_rules! asset {
    ($path:literal, $file:literal, $content_type:literal) => {{
        const TEXT: &str = include_str!(concat!("../../assets/page/", $file));
        Asset {
            path: $path,
            content_types: &[$content_type],
            #[cfg(test)]
            text: TEXT,
            handler: |app: App, _: &mut Call| {
                Box::pin(async move { serve(&app, concat!($content_type, "; charset=utf-8"), TEXT) })
            },
        }
    }};
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

/// There is no page on this server.
pub fn disabled() -> ApiError {
    ApiError::not_found("there is no live page: the server was started with --disable-live-page")
}

fn serve(app: &App, content_type: &'static str, text: &'static str) -> Result<Response, ApiError> {
    if !app.live_page {
        return Err(disabled());
    }
    let mut response = Response::new(Body::from(text));
    let headers = [
        (header::CONTENT_TYPE, content_type),
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // The next version of the server has another page.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    for (name, value) in headers {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::ASSETS;

    #[test]
    fn the_page_loads_nothing_but_its_own_files() {
        for asset in ASSETS {
            // The name of the format of an image that stands in the page itself is no address.
            let text = asset.text.replace("http://www.w3.org/2000/svg", "");
            for foreign in ["http:", "https:", "//cdn", "@import", "url("] {
                assert!(!text.contains(foreign), "{} names {foreign}", asset.path);
            }
            for loaded in
                text.split(['"', '\'']).filter(|word| word.ends_with(".js") || word.ends_with(".css"))
            {
                let path = format!("/{}", loaded.trim_start_matches("./"));
                assert!(ASSETS.iter().any(|other| other.path == path), "{} loads {loaded}", asset.path);
            }
        }
    }

    #[test]
    fn nothing_from_outside_becomes_markup() {
        for asset in ASSETS {
            let makers =
                ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"];
            for maker in makers {
                assert!(!asset.text.contains(maker), "{} uses {maker}", asset.path);
            }
            // The policy forbids both.
            assert!(!asset.text.contains(" style=") && !asset.text.contains(" onclick="), "{}", asset.path);
        }
    }
}
