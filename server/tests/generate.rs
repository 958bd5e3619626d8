//! `Inference.Generate` and its neighbours over the wire: what a client gets.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Completion, Harness, greedy, text};
use tidemill_proto::v1::{
    ChatMessage, ChatPrompt, DetokenizeRequest, FinishReason, GenerateRequest, GetModelRequest,
    OutputOptions, SamplingParams, TokenIds, TokenizeRequest, generate_request::Prompt,
    generate_response::MatchedStop, tokenize_request::Input,
};

fn chat(question: &str) -> ChatPrompt {
    let message = ChatMessage { role: "user".into(), content: question.into(), ..ChatMessage::default() };
    ChatPrompt { messages: vec![message], ..ChatPrompt::default() }
}

#[tokio::test]
async fn a_chat_prompt_streams_its_answer_token_by_token() {
    let mut harness = Harness::start().await;
    let request = GenerateRequest {
        request_id: "q1".into(),
        prompt: Some(Prompt::Chat(chat("What is a KV cache?"))),
        sampling: Some(greedy(100)),
        ..GenerateRequest::default()
    };
    let response = harness.inference.generate(request).await.unwrap();
    assert_eq!(response.metadata().get("x-request-id").unwrap(), "q1");
    let completions = common::collect(response.into_inner()).await.unwrap();
    let [answer] = &completions[..] else { panic!("{completions:?}") };
    assert!(answer.text.contains("KV cache keeps the keys and values"), "{}", answer.text);
    assert_eq!(answer.finish, FinishReason::Stop);
    assert!(answer.messages.len() > 10, "one message per token: {}", answer.messages.len());
    assert!(answer.messages.iter().all(|message| message.request_id == "q1"));
    let usage = answer.last.usage.as_ref().unwrap();
    assert!(usage.prompt_tokens > 5 && usage.time_to_first_token_seconds > 0.0, "{usage:?}");
    harness.at_rest().await;
}

#[tokio::test]
async fn a_request_without_an_id_gets_one() {
    let mut harness = Harness::start().await;
    let response = harness.inference.generate(text("Once", greedy(2))).await.unwrap();
    let header = response.metadata().get("x-request-id").unwrap().to_str().unwrap().to_owned();
    let completions = common::collect(response.into_inner()).await.unwrap();
    assert!(header.len() > 8 && completions[0].last.request_id == header, "{header:?}");
}

#[tokio::test]
async fn text_and_its_token_ids_are_the_same_prompt_and_survive_a_round_trip() {
    let mut harness = Harness::start().await;
    let prompt = "Once upon a time, ünïcödé 🦊";
    let request = TokenizeRequest { input: Some(Input::Text(prompt.into())), add_special_tokens: None };
    let tokens = harness.inference.tokenize(request).await.unwrap().into_inner();
    assert_eq!((tokens.text.as_str(), tokens.max_model_len), (prompt, 1024));
    let request = DetokenizeRequest { token_ids: tokens.token_ids.clone(), include_special_tokens: false };
    assert_eq!(harness.inference.detokenize(request).await.unwrap().into_inner().text, prompt);
    let by_text = harness.complete(text(prompt, greedy(20))).await;
    let ids = Some(Prompt::TokenIds(TokenIds { ids: tokens.token_ids }));
    let by_ids = harness.complete(GenerateRequest { prompt: ids, ..text("", greedy(20)) }).await;
    assert_eq!(by_text.ids, by_ids.ids);
    let request = DetokenizeRequest { token_ids: by_text.ids.clone(), include_special_tokens: false };
    assert_eq!(harness.inference.detokenize(request).await.unwrap().into_inner().text, by_text.text);
}

#[tokio::test]
async fn a_chat_is_tokenized_through_the_models_template() {
    let mut harness = Harness::start().await;
    let request = TokenizeRequest { input: Some(Input::Chat(chat("Hello"))), add_special_tokens: None };
    let tokens = harness.inference.tokenize(request).await.unwrap().into_inner();
    assert!(tokens.text.contains("Hello") && tokens.text.ends_with("assistant\n"), "{}", tokens.text);
    let by_chat = harness
        .complete(GenerateRequest { prompt: Some(Prompt::Chat(chat("Hello"))), ..text("", greedy(10)) })
        .await;
    let ids = Some(Prompt::TokenIds(TokenIds { ids: tokens.token_ids }));
    assert_eq!(
        by_chat.ids,
        harness.complete(GenerateRequest { prompt: ids, ..text("", greedy(10)) }).await.ids
    );
}

#[tokio::test]
async fn the_same_seed_gives_the_same_tokens_whoever_shares_the_batch() {
    let mut harness = Harness::start().await;
    let sampled =
        |seed| SamplingParams { temperature: Some(1.0), seed: Some(seed), ignore_eos: true, ..greedy(40) };
    let alone = harness.complete(text("Tell me", sampled(7))).await;
    let mut clients: Vec<_> = (5..10).map(|seed| (seed, harness.inference.clone())).collect();
    let tasks = clients.drain(..).map(|(seed, mut client)| {
        let request = text(
            "Tell me",
            SamplingParams { temperature: Some(1.0), seed: Some(seed), ignore_eos: true, ..greedy(40) },
        );
        tokio::spawn(async move {
            let stream = client.generate(request).await.unwrap().into_inner();
            (seed, common::collect(stream).await.unwrap().remove(0))
        })
    });
    let tasks: Vec<_> = tasks.collect();
    let mut different = 0;
    for task in tasks {
        let (seed, together): (_, Completion) = task.await.unwrap();
        if seed == 7 {
            assert_eq!(together.ids, alone.ids);
        } else {
            different += usize::from(together.ids != alone.ids);
        }
    }
    assert!(different >= 3, "seeds change the answer");
    let unseeded = SamplingParams { temperature: Some(1.5), ignore_eos: true, ..greedy(40) };
    let first = harness.complete(text("Tell me", unseeded.clone())).await;
    assert_ne!(first.ids, harness.complete(text("Tell me", unseeded)).await.ids, "no seed: drawn each time");
}

#[tokio::test]
async fn three_completions_of_one_prompt_differ_and_each_has_its_own_end() {
    let mut harness = Harness::start().await;
    let sampling = SamplingParams { temperature: Some(1.5), seed: Some(1), n: Some(3), ..greedy(30) };
    let completions = harness.generate(text("Once upon a time there was", sampling.clone())).await.unwrap();
    let [a, b, c] = &completions[..] else { panic!("{completions:?}") };
    assert!(a.ids != b.ids && b.ids != c.ids && a.ids != c.ids);
    let alone =
        harness.complete(text("Once upon a time there was", SamplingParams { n: None, ..sampling })).await;
    assert_eq!(a.ids, alone.ids, "the first has the client's own seed");
    harness.at_rest().await;
}

#[tokio::test]
async fn log_probabilities_come_with_each_token_and_with_the_prompt() {
    let mut harness = Harness::start().await;
    let prompt = "Once upon a time there was";
    let request = TokenizeRequest { input: Some(Input::Text(prompt.into())), add_special_tokens: None };
    let prompt_ids = harness.inference.tokenize(request).await.unwrap().into_inner().token_ids;
    let sampling = SamplingParams { logprobs: Some(3), prompt_logprobs: Some(2), ..greedy(8) };
    let completion = harness.complete(text(prompt, sampling)).await;
    for message in &completion.messages {
        assert_eq!(message.logprobs.len(), message.token_ids.len());
        for (logprobs, &id) in message.logprobs.iter().zip(&message.token_ids) {
            assert_eq!(
                (logprobs.token_id, logprobs.rank, logprobs.top.len()),
                (id, 1, 3),
                "greedy takes the first"
            );
            assert_eq!(logprobs.top[0].token_id, id);
            assert!(logprobs.top.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob));
            assert!(logprobs.logprob <= 0.0);
        }
    }
    let of_prompt = &completion.messages[0].prompt_logprobs;
    assert_eq!(of_prompt.len(), prompt_ids.len());
    assert_eq!(of_prompt[0], Default::default(), "nothing precedes the first token");
    for (logprobs, &id) in of_prompt.iter().zip(&prompt_ids).skip(1) {
        assert_eq!((logprobs.token_id, logprobs.top.len()), (id, 2));
    }
    assert!(completion.messages[1..].iter().all(|message| message.prompt_logprobs.is_empty()));
    let plain = harness.complete(text(prompt, greedy(8))).await;
    assert_eq!(plain.ids, completion.ids, "being watched changes nothing");
    assert!(plain.messages.iter().all(|message| message.logprobs.is_empty()));
}

#[tokio::test]
async fn a_stop_string_ends_the_text_before_itself_even_across_tokens() {
    let mut harness = Harness::start().await;
    let full = harness.complete(text("Once upon a time", greedy(60))).await;
    // A piece from the middle that is unlikely to be one token.
    let middle = full.text.len() / 2;
    let stop = full.text[middle..middle + 7].to_owned();
    let expected = &full.text[..full.text.find(&stop).unwrap()];
    let sampling = SamplingParams { stop: vec![stop.clone(), "never in there".into()], ..greedy(60) };
    let stopped = harness.complete(text("Once upon a time", sampling)).await;
    assert_eq!(stopped.text, expected);
    assert_eq!(stopped.finish, FinishReason::Stop);
    assert_eq!(stopped.last.matched_stop, Some(MatchedStop::MatchedStopString(stop)));
    harness.at_rest().await;
}

#[tokio::test]
async fn a_stop_token_ends_the_completion_and_is_reported() {
    let mut harness = Harness::start().await;
    let full = harness.complete(text("Once upon a time", greedy(20))).await;
    let stop = full.ids[10];
    let first = full.ids.iter().position(|&id| id == stop).unwrap();
    let sampling = SamplingParams { stop_token_ids: vec![stop], ..greedy(20) };
    let stopped = harness.complete(text("Once upon a time", sampling)).await;
    assert_eq!(stopped.ids, &full.ids[..=first]);
    assert_eq!(stopped.last.matched_stop, Some(MatchedStop::MatchedStopTokenId(stop)));
    assert!(full.text.starts_with(&stopped.text) && stopped.text.len() < full.text.len());
}

#[tokio::test]
async fn token_ids_only_leaves_the_text_out() {
    let mut harness = Harness::start().await;
    let with_text = harness.complete(text("Once upon a time", greedy(12))).await;
    let output = Some(OutputOptions { token_ids_only: true, include_special_tokens: false });
    let without = harness.complete(GenerateRequest { output, ..text("Once upon a time", greedy(12)) }).await;
    assert_eq!((without.ids, without.text.as_str()), (with_text.ids, ""));
}

#[tokio::test]
async fn max_tokens_is_the_length_and_the_context_is_the_default_bound() {
    let mut harness = Harness::tuned(|config| config.max_model_len = Some(64)).await;
    let three =
        harness.complete(text("Once upon a time", SamplingParams { ignore_eos: true, ..greedy(3) })).await;
    assert_eq!((three.ids.len(), three.finish), (3, FinishReason::Length));
    let sampling = SamplingParams { temperature: Some(0.0), ignore_eos: true, ..SamplingParams::default() };
    let full = harness.complete(text("Once upon a time", sampling)).await;
    let usage = full.last.usage.as_ref().unwrap();
    assert_eq!(usage.prompt_tokens + usage.completion_tokens, 64);
    assert_eq!(full.finish, FinishReason::Length);
}

#[tokio::test]
async fn the_model_describes_itself() {
    let mut harness = Harness::tuned(|config| config.served_model_name = Some("tiny".into())).await;
    let model = harness.inference.get_model(GetModelRequest {}).await.unwrap().into_inner();
    assert_eq!((model.served_model_name.as_str(), model.architecture.as_str()), ("tiny", "LlamaForCausalLM"));
    assert_eq!((model.vocab_size, model.max_model_len, model.max_num_seqs), (2048, 1024, 8));
    assert!(model.has_chat_template && model.num_parameters > 1_000_000 && !model.device.is_empty());
    let named = GenerateRequest { model: "tiny".into(), ..text("Once", greedy(2)) };
    assert_eq!(harness.complete(named).await.ids.len(), 2);
}
