//! What comes back: tokens, log-probabilities, how a request ended, receipts.

use std::time::Duration;

use crate::ids::{RequestId, TokenId};

/// Log-probabilities at one position: natural logarithm of the softmax of the raw logits.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token chosen, or the prompt's own.
    pub token: TokenId,
    /// Of `token`.
    pub logprob: f32,
    /// Rank of `token`, 1 for the most likely.
    pub rank: u32,
    /// The most likely tokens, in falling order.
    pub top: Vec<(TokenId, f32)>,
}

/// Why a completion ended without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// End-of-sequence token, stop token or stop string.
    Stop,
    /// `max_tokens` were generated.
    Length,
    /// Someone aborted it.
    Abort,
}

/// The stop condition of the client's own that ended a completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MatchedStop {
    /// A stop string.
    Text(String),
    /// A stop token.
    Token(TokenId),
}

/// What a completion used.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, found in the prefix cache.
    pub cached_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// From submission to the first step that read the prompt.
    pub queue_time: Duration,
    /// From submission to the first token.
    pub time_to_first_token: Duration,
    /// Times its blocks went to older requests and it was recomputed.
    pub num_preemptions: usize,
}

/// The end of one completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// The client's stop condition, if it was one.
    pub matched_stop: Option<MatchedStop>,
    /// What it used.
    pub usage: Usage,
}

/// New output of one of a request's completions.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// Which completion, 0-based.
    pub index: u32,
    /// New text; empty while a character or a possible stop string is incomplete.
    pub text: String,
    /// New tokens.
    pub token_ids: Vec<TokenId>,
    /// One per new token when asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// On the first output of completion 0 when asked for: one per prompt token from the second on (nothing precedes the first).
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// Present on the last output of this completion.
    pub finish: Option<Finish>,
}

/// The embedding of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding {
    /// As many as were asked for; of length 1 if that was asked for.
    pub values: Vec<f32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, found in the prefix cache.
    pub cached_tokens: usize,
}

/// How well a document answers a query.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Larger is better; between 0 and 1 for most models.
    pub value: f32,
    /// Tokens of query and document together, with what stands around them.
    pub prompt_tokens: usize,
    /// Of these, found in the prefix cache.
    pub cached_tokens: usize,
}

/// Where a request was when its abort took effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AbortStage {
    /// No such request: never seen, or finished long ago.
    Unknown,
    /// Waiting for a place in the batch.
    Queued,
    /// Its prompt was being read.
    Prefill,
    /// It was generating.
    Decode,
    /// It had ended before.
    Finished,
}

/// What an abort did.
#[derive(Debug, Clone, PartialEq)]
pub struct AbortReceipt {
    /// The request.
    pub id: RequestId,
    /// Where it was.
    pub stage: AbortStage,
    /// Tokens it had produced, over all its completions.
    pub completion_tokens: usize,
    /// KV blocks that came back to the pool.
    pub blocks_freed: usize,
    /// Rows of the batch that came back.
    pub rows_freed: usize,
    /// From the engine's receipt of the abort until everything was free.
    pub time_to_free: Duration,
}
