//! Requests to a server that was told to do without a tokenizer.

use super::{GenerateRequest, Validator};
use crate::error::RequestError;

impl Validator {
    /// Refuses what is about text where there is no tokenizer.
    pub(super) fn check_text(&self, request: &GenerateRequest) -> Result<(), RequestError> {
        for (asked, what) in [
            (!request.sampling.stop.is_empty(), "a stop string"),
            (request.structured.is_some(), "an answer of a given form"),
            (request.thinking.is_some(), "to tell thoughts from the answer"),
        ] {
            if asked {
                self.text.require(what)?;
            }
        }
        Ok(())
    }
}
