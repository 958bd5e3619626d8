//! The structure of JSON text, one character at a time: where a string or a value ends, without reading it.

/// Follows a JSON string's text after its opening quote.
#[derive(Debug, Default, Clone)]
pub(super) struct StringScan {
    escaped: bool,
}

impl StringScan {
    /// Whether this character is the closing quote.
    pub fn closes(&mut self, c: char) -> bool {
        let closing = c == '"' && !self.escaped;
        self.escaped = c == '\\' && !self.escaped;
        closing
    }
}

/// Follows an object or array to the bracket that closes it.
///
/// Brackets are counted, not matched by kind: text whose brackets are wrong is bad JSON that is passed on as it is.
#[derive(Debug, Default, Clone)]
pub(super) struct ValueScan {
    depth: usize,
    string: Option<StringScan>,
}

impl ValueScan {
    /// Whether this character closes the value. The first character given is the opening bracket.
    pub fn closes(&mut self, c: char) -> bool {
        if let Some(string) = &mut self.string {
            if string.closes(c) {
                self.string = None;
            }
            return false;
        }
        match c {
            '"' => self.string = Some(StringScan::default()),
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }

    /// Whether the scan is outside of any string, where only JSON's own signs can stand.
    pub fn is_outside_strings(&self) -> bool {
        self.string.is_none()
    }
}

/// Decodes the text between a JSON string's quotes.
pub(super) fn decode(raw: &str) -> Option<String> {
    serde_json::from_str(&format!("\"{raw}\"")).ok()
}
