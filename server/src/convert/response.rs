//! Output of the engine as messages of a response stream.

use std::collections::VecDeque;

use tidemill_engine::{
    ids::{RequestId, TokenId},
    output::{Finish, MatchedStop, Output, TokenLogprobs, Usage},
};
use tidemill_proto::v1;

use super::finish_reason;

/// How one request's outputs become the messages of a protocol.
pub trait WriteOutput {
    /// What the stream is made of.
    type Message;

    /// Appends the messages of the next output: one, several, or none yet.
    fn write(&mut self, output: Output, messages: &mut VecDeque<Self::Message>);
}

/// Writes one request's messages.
#[derive(Debug)]
pub struct ResponseWriter {
    id: RequestId,
    /// The prompt's log-probabilities were asked for and have not been sent.
    owes_prompt_logprobs: bool,
}

impl ResponseWriter {
    /// A writer for the request with this id.
    pub fn new(id: RequestId, prompt_logprobs: bool) -> Self {
        Self { id, owes_prompt_logprobs: prompt_logprobs }
    }
}

impl WriteOutput for ResponseWriter {
    type Message = v1::GenerateResponse;

    fn write(&mut self, output: Output, messages: &mut VecDeque<v1::GenerateResponse>) {
        let mut prompt_logprobs = Vec::new();
        if output.index == 0 && std::mem::take(&mut self.owes_prompt_logprobs) {
            // Nothing precedes the first token, so nothing can be said about it.
            prompt_logprobs.push(v1::TokenLogprobs::default());
            prompt_logprobs.extend(output.prompt_logprobs.iter().map(token_logprobs));
        }
        let mut message = v1::GenerateResponse {
            request_id: self.id.as_str().to_owned(),
            index: output.index,
            text: output.text,
            token_ids: output.token_ids.iter().map(|id| id.0).collect(),
            logprobs: output.logprobs.iter().map(token_logprobs).collect(),
            prompt_logprobs,
            ..v1::GenerateResponse::default()
        };
        if let Some(finish) = output.finish {
            end(&mut message, finish);
        }
        messages.push_back(message);
    }
}

fn end(message: &mut v1::GenerateResponse, finish: Finish) {
    use v1::generate_response::MatchedStop as Wire;
    message.set_finish_reason(finish_reason(finish.reason));
    message.matched_stop = finish.matched_stop.map(|stop| match stop {
        MatchedStop::Text(text) => Wire::MatchedStopString(text),
        MatchedStop::Token(TokenId(id)) => Wire::MatchedStopTokenId(id),
    });
    message.usage = Some(usage(&finish.usage));
}

fn usage(usage: &Usage) -> v1::Usage {
    v1::Usage {
        prompt_tokens: usage.prompt_tokens as u32,
        cached_tokens: usage.cached_tokens as u32,
        completion_tokens: usage.completion_tokens as u32,
        queue_seconds: usage.queue_time.as_secs_f64(),
        time_to_first_token_seconds: usage.time_to_first_token.as_secs_f64(),
        num_preemptions: usage.num_preemptions as u32,
    }
}

fn token_logprobs(logprobs: &TokenLogprobs) -> v1::TokenLogprobs {
    let top = logprobs.top.iter().map(|&(id, logprob)| v1::TopLogprob { token_id: id.0, logprob });
    v1::TokenLogprobs {
        token_id: logprobs.token.0,
        logprob: logprobs.logprob,
        rank: logprobs.rank,
        top: top.collect(),
    }
}
