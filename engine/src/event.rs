//! What the engine thread tells a request's stream.

use crate::{
    error::RequestError,
    ids::TokenId,
    output::{Finish, TokenLogprobs, Usage},
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
    /// The embedding that the request was for; nothing follows. `[H]`, before it is cut and normalised.
    Embedding {
        values: Vec<f32>,
        usage: Usage,
    },
    /// The request is over; nothing follows.
    Failed(RequestError),
}
