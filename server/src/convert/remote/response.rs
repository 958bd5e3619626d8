//! Messages of a response stream as the engine's outputs.

use tidemill_engine::{
    ids::TokenId,
    output::{Embedding, Finish, FinishReason, MatchedStop, Output, Score, TokenLogprobs, Usage},
};
use tidemill_proto::v1;

use super::{duration, malformed};
use crate::client::CallError;

/// An output of a request with `n` completions.
///
/// # Errors
/// For a message that no engine of this protocol sends.
pub fn output(message: v1::GenerateResponse, n: u32) -> Result<Output, CallError> {
    use v1::generate_response::MatchedStop as Wire;
    let reason = finish_reason(message.finish_reason());
    let v1::GenerateResponse {
        request_id: _,
        index,
        text,
        token_ids,
        logprobs,
        prompt_logprobs,
        finish_reason: _,
        matched_stop,
        usage: used,
    } = message;
    if index >= n {
        return Err(malformed("the number of a completion"));
    }
    let finish = match reason {
        None => None,
        Some(reason) => Some(Finish {
            reason,
            matched_stop: matched_stop.map(|stop| match stop {
                Wire::MatchedStopString(text) => MatchedStop::Text(text),
                Wire::MatchedStopTokenId(id) => MatchedStop::Token(TokenId(id)),
            }),
            usage: usage(used.ok_or_else(|| malformed("an end without its usage"))?)?,
        }),
    };
    Ok(Output {
        index,
        text,
        token_ids: token_ids.into_iter().map(TokenId).collect(),
        logprobs: logprobs.into_iter().map(token_logprobs).collect(),
        // Nothing can be said about the prompt's first token: the wire has an empty entry for it.
        prompt_logprobs: prompt_logprobs.into_iter().skip(1).map(token_logprobs).collect(),
        finish,
    })
}

/// An embedding from its message.
pub fn embedding(response: v1::EmbedResponse) -> Embedding {
    let v1::EmbedResponse { request_id: _, values, prompt_tokens, cached_tokens } = response;
    Embedding { values, prompt_tokens: prompt_tokens as usize, cached_tokens: cached_tokens as usize }
}

/// A score from its message.
pub fn score(response: v1::ScoreResponse) -> Score {
    let v1::ScoreResponse { request_id: _, score, prompt_tokens, cached_tokens } = response;
    Score { value: score, prompt_tokens: prompt_tokens as usize, cached_tokens: cached_tokens as usize }
}

fn finish_reason(reason: v1::FinishReason) -> Option<FinishReason> {
    match reason {
        v1::FinishReason::Unspecified => None,
        v1::FinishReason::Stop => Some(FinishReason::Stop),
        v1::FinishReason::Length => Some(FinishReason::Length),
        v1::FinishReason::Abort => Some(FinishReason::Abort),
    }
}

fn usage(usage: v1::Usage) -> Result<Usage, CallError> {
    let v1::Usage {
        prompt_tokens,
        cached_tokens,
        completion_tokens,
        queue_seconds,
        time_to_first_token_seconds,
        num_preemptions,
    } = usage;
    Ok(Usage {
        prompt_tokens: prompt_tokens as usize,
        cached_tokens: cached_tokens as usize,
        completion_tokens: completion_tokens as usize,
        queue_time: duration(queue_seconds)?,
        time_to_first_token: duration(time_to_first_token_seconds)?,
        num_preemptions: num_preemptions as usize,
    })
}

fn token_logprobs(logprobs: v1::TokenLogprobs) -> TokenLogprobs {
    let v1::TokenLogprobs { token_id, logprob, rank, top } = logprobs;
    let top = top.into_iter().map(|v1::TopLogprob { token_id, logprob }| (TokenId(token_id), logprob));
    TokenLogprobs { token: TokenId(token_id), logprob, rank, top: top.collect() }
}
