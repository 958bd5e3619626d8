//! What the engine thread tells a request's stream.

use crate::{
    error::RequestError,
    ids::TokenId,
    output::{Finish, TokenLogprobs},
};

/// What the engine thread sends for a request. `index` is the completion.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Event {
    PromptLogprobs(Vec<TokenLogprobs>),
    Token {
        index: u32,
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
        finish: Option<Finish>,
    },
    /// The completion ended without a new token.
    Finished {
        index: u32,
        finish: Finish,
    },
    /// The request is over; nothing follows.
    Failed(RequestError),
}
