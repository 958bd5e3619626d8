//! Output of the engine as a gateway's messages: chunks of new ids, and at the end of each completion all of them.

use std::collections::VecDeque;

use tidemill_engine::{
    ids::TokenId,
    output::{Finish, FinishReason, MatchedStop, Output, TokenLogprobs},
};
use tidemill_proto::vllm::grpc::engine::{
    GenerateComplete, GenerateResponse, GenerateStreamChunk, InputLogProbs, InputTokenLogProb,
    OutputLogProbs, TopLogProbs, generate_complete, generate_response::Response,
};

use crate::convert::WriteOutput;

/// What a request wants to be told.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Chunks, and not the ends alone.
    pub chunks: bool,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// The first of them, if the prompt's log-probabilities were asked for.
    pub prompt_logprobs_from: Option<TokenId>,
}

/// Writes one request's messages.
#[derive(Debug)]
pub struct CompletionWriter {
    wanted: Wanted,
    /// Of the prompt, once they are known.
    input_logprobs: Option<InputLogProbs>,
    /// By index; those that have said nothing yet are missing at the end.
    completions: Vec<Completion>,
}

/// What a completion has given so far.
#[derive(Debug, Default)]
struct Completion {
    ids: Vec<u32>,
    logprobs: Option<OutputLogProbs>,
}

impl CompletionWriter {
    /// A writer for a request that wants this.
    pub fn new(wanted: Wanted) -> Self {
        Self { wanted, input_logprobs: None, completions: Vec::new() }
    }

    fn complete(&mut self, index: u32, finish: Finish) -> GenerateComplete {
        let completion = std::mem::take(&mut self.completions[index as usize]);
        GenerateComplete {
            output_ids: completion.ids,
            finish_reason: finish_reason(finish.reason).to_owned(),
            prompt_tokens: finish.usage.prompt_tokens as u32,
            completion_tokens: finish.usage.completion_tokens as u32,
            cached_tokens: finish.usage.cached_tokens as u32,
            output_logprobs: completion.logprobs,
            input_logprobs: self.input_logprobs.take_if(|_| index == 0),
            index,
            matched_stop: finish.matched_stop.map(|stop| match stop {
                MatchedStop::Text(text) => generate_complete::MatchedStop::MatchedStopStr(text),
                MatchedStop::Token(id) => generate_complete::MatchedStop::MatchedTokenId(id.0),
            }),
        }
    }
}

impl WriteOutput for CompletionWriter {
    type Message = GenerateResponse;

    fn write(&mut self, output: Output, messages: &mut VecDeque<GenerateResponse>) {
        let mut send = |response| messages.push_back(GenerateResponse { response: Some(response) });
        let place = output.index as usize;
        if self.completions.len() <= place {
            self.completions.resize_with(place + 1, Completion::default);
        }
        let first_of_prompt = self.wanted.prompt_logprobs_from.take_if(|_| place == 0);
        let told_now = first_of_prompt.map(|first| input_logprobs(first, &output.prompt_logprobs));
        let completion = &mut self.completions[place];
        completion.ids.extend(output.token_ids.iter().map(|id| id.0));
        let new_logprobs = output_logprobs(&output.logprobs);
        if let Some(new) = &new_logprobs {
            let all = completion.logprobs.get_or_insert_default();
            all.token_logprobs.extend(&new.token_logprobs);
            all.token_ids.extend(&new.token_ids);
            all.top_logprobs.extend(new.top_logprobs.iter().cloned());
        }
        if let Some(input) = &told_now {
            self.input_logprobs = Some(input.clone());
        }
        if self.wanted.chunks && !output.token_ids.is_empty() {
            send(Response::Chunk(GenerateStreamChunk {
                completion_tokens: output.token_ids.len() as u32,
                token_ids: output.token_ids.into_iter().map(|id| id.0).collect(),
                prompt_tokens: self.wanted.prompt_tokens as u32,
                output_logprobs: new_logprobs,
                input_logprobs: told_now,
                index: output.index,
            }));
        }
        if let Some(finish) = output.finish {
            send(Response::Complete(self.complete(output.index, finish)));
        }
    }
}

fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Abort => "abort",
    }
}

fn output_logprobs(logprobs: &[TokenLogprobs]) -> Option<OutputLogProbs> {
    (!logprobs.is_empty()).then(|| OutputLogProbs {
        token_logprobs: logprobs.iter().map(|entry| entry.logprob).collect(),
        token_ids: logprobs.iter().map(|entry| entry.token.0).collect(),
        top_logprobs: top_logprobs(logprobs),
    })
}

/// Those of the tokens after the first, which has none.
fn input_logprobs(first: TokenId, logprobs: &[TokenLogprobs]) -> InputLogProbs {
    let value = |value| InputTokenLogProb { value };
    let values = logprobs.iter().map(|entry| value(Some(entry.logprob)));
    let mut top = top_logprobs(logprobs);
    if !top.is_empty() {
        top.insert(0, TopLogProbs::default());
    }
    InputLogProbs {
        token_logprobs: [value(None)].into_iter().chain(values).collect(),
        token_ids: [first.0].into_iter().chain(logprobs.iter().map(|entry| entry.token.0)).collect(),
        top_logprobs: top,
    }
}

/// One entry per position, or none when no others than the tokens' own were asked for.
fn top_logprobs(logprobs: &[TokenLogprobs]) -> Vec<TopLogProbs> {
    if logprobs.iter().all(|entry| entry.top.is_empty()) {
        return Vec::new();
    }
    let top = |entry: &TokenLogprobs| TopLogProbs {
        values: entry.top.iter().map(|&(_, logprob)| logprob).collect(),
        token_ids: entry.top.iter().map(|&(id, _)| id.0).collect(),
    };
    logprobs.iter().map(top).collect()
}

#[cfg(test)]
mod tests {
    use tidemill_engine::output::Usage;

    use super::*;

    fn output(index: u32, ids: &[u32], reason: Option<FinishReason>) -> Output {
        let entry = |&id: &u32| TokenLogprobs {
            token: TokenId(id),
            logprob: -(id as f32),
            rank: 1,
            top: vec![(TokenId(id), -(id as f32))],
        };
        Output {
            index,
            text: String::new(),
            token_ids: ids.iter().copied().map(TokenId).collect(),
            logprobs: ids.iter().map(entry).collect(),
            prompt_logprobs: Vec::new(),
            finish: reason.map(|reason| Finish {
                reason,
                matched_stop: None,
                usage: Usage { prompt_tokens: 3, cached_tokens: 2, completion_tokens: 3, ..Usage::default() },
            }),
        }
    }

    fn messages(chunks: bool, outputs: Vec<Output>) -> Vec<Response> {
        let wanted = Wanted { chunks, prompt_tokens: 3, prompt_logprobs_from: Some(TokenId(9)) };
        let (mut writer, mut messages) = (CompletionWriter::new(wanted), VecDeque::new());
        outputs.into_iter().for_each(|output| writer.write(output, &mut messages));
        messages.into_iter().map(|message| message.response.unwrap()).collect()
    }

    #[test]
    fn chunks_have_what_is_new_and_the_end_has_everything() {
        let end = Some(FinishReason::Length);
        let outputs = || vec![output(1, &[5], None), output(0, &[4], None), output(1, &[6, 7], end)];
        let told = messages(true, outputs());
        let ids: Vec<&[u32]> = told
            .iter()
            .map(|message| match message {
                Response::Chunk(chunk) => &chunk.token_ids[..],
                Response::Complete(complete) => &complete.output_ids[..],
            })
            .collect();
        assert_eq!(ids, [&[5][..], &[4], &[6, 7], &[5, 6, 7]]);
        let Some(Response::Complete(complete)) = told.last() else { panic!("{told:?}") };
        assert_eq!((complete.index, &*complete.finish_reason, complete.cached_tokens), (1, "length", 2));
        let logprobs = complete.output_logprobs.as_ref().unwrap();
        assert_eq!(logprobs.token_ids, [5, 6, 7]);
        assert_eq!(logprobs.top_logprobs.len(), 3);
        let [Response::Complete(alone)] = &messages(false, outputs())[..] else {
            panic!("chunks were not wanted")
        };
        assert_eq!(alone, complete);
    }

    #[test]
    fn the_prompts_logprobs_come_once_with_index_0_and_the_first_token_has_none() {
        let mut first = output(0, &[4], None);
        first.prompt_logprobs = output(0, &[8, 7], None).logprobs;
        let told =
            messages(true, vec![output(1, &[5], None), first, output(0, &[6], Some(FinishReason::Stop))]);
        let inputs: Vec<Option<&InputLogProbs>> = told
            .iter()
            .map(|message| match message {
                Response::Chunk(chunk) => chunk.input_logprobs.as_ref(),
                Response::Complete(complete) => complete.input_logprobs.as_ref(),
            })
            .collect();
        let [None, Some(chunk), None, Some(complete)] = inputs[..] else { panic!("{inputs:?}") };
        assert_eq!(chunk, complete);
        assert_eq!(chunk.token_ids, [9, 8, 7]);
        assert_eq!(
            chunk.token_logprobs.iter().map(|entry| entry.value).collect::<Vec<_>>(),
            [None, Some(-8.0), Some(-7.0)]
        );
        assert_eq!(chunk.top_logprobs.iter().map(|top| top.values.len()).collect::<Vec<_>>(), [0, 1, 1]);
    }

    #[test]
    fn an_abort_without_a_token_is_an_end_without_a_chunk() {
        let told = messages(true, vec![output(0, &[], Some(FinishReason::Abort))]);
        let [Response::Complete(complete)] = &told[..] else { panic!("{told:?}") };
        assert_eq!((&*complete.finish_reason, complete.output_ids.len()), ("abort", 0));
    }
}
