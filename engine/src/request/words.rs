//! What requests ask about text: stop strings, and whatever a server that does without a tokenizer has to refuse.

use super::{Findings, GenerateRequest, Validator, limits};
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

    pub(super) fn check_stops(&self, request: &GenerateRequest, found: &mut Findings) {
        let stop = &request.sampling.stop;
        found.check(stop.len() <= limits::MAX_STOP, "sampling.stop", || {
            format!("{} strings; at most {}", stop.len(), limits::MAX_STOP)
        });
        found.check(stop.iter().all(|s| !s.is_empty()), "sampling.stop", || "holds an empty string".into());
        found.check(stop.iter().all(|s| s.len() <= limits::MAX_STOP_BYTES), "sampling.stop", || {
            format!("a string is longer than {} bytes", limits::MAX_STOP_BYTES)
        });
        found.check(stop.is_empty() || !request.token_ids_only, "sampling.stop", || {
            "stop strings need text; use stop_token_ids with token_ids_only".into()
        });
    }
}
