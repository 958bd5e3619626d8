//! Requests of a gateway.

use tidemill_engine::{
    RequestError,
    ids::{RequestId, TokenId},
    request::{GenerateRequest, Prompt},
    sampling::SamplingParams,
    structured::Structured,
};
use tidemill_proto::vllm::grpc::engine as vllm;

use crate::{convert::token_ids, http::answer::parsers::lark_from_grammar};

/// A request in the engine's terms, under the id that it has or was given. Text comes back only where stop strings have to be found in it.
///
/// # Errors
/// When there is no prompt, or for what this engine cannot do.
pub fn generate_request(
    id: RequestId,
    request: vllm::GenerateRequest,
) -> Result<GenerateRequest, RequestError> {
    use vllm::generate_request::Input;
    check_supported(&request)?;
    let prompt = match request.input {
        Some(Input::Tokenized(tokenized)) => Prompt::TokenIds(token_ids(tokenized.input_ids)),
        Some(Input::Text(text)) => Prompt::Text(text),
        None => return Err(RequestError::invalid("input", "is absent; set tokenized or text")),
    };
    let mut wire = request.sampling_params.unwrap_or_default();
    let structured = wire.constraint.take().map(structured).transpose()?.flatten();
    Ok(GenerateRequest {
        id: Some(id),
        structured,
        token_ids_only: wire.stop.is_empty(),
        include_special_tokens: !wire.skip_special_tokens && !wire.stop.is_empty(),
        sampling: sampling(wire)?,
        ..GenerateRequest::new(prompt)
    })
}

/// What the protocol has and this engine lacks is refused: a part of a request that is left out would be a wrong answer.
fn check_supported(request: &vllm::GenerateRequest) -> Result<(), RequestError> {
    let text_alone = "is not taken: models here read text alone";
    let one_server = "is not taken: one server reads the prompt and generates; run the gateway without prefill and decode workers";
    let multimodal = !request.extra_mm_inputs.is_empty();
    let refused = [
        (request.mm_inputs.is_some(), "mm_inputs", text_alone),
        (multimodal, "extra_mm_inputs", text_alone),
        (request.media_refs.is_some(), "media_refs", text_alone),
        (request.kv_transfer_params.is_some(), "kv_transfer_params", one_server),
        (request.kv_transfer_params_json.is_some(), "kv_transfer_params_json", one_server),
        (
            request.data_parallel_rank.is_some_and(|rank| rank != 0),
            "data_parallel_rank",
            "a server is one rank, 0; name the other servers to the gateway as workers of their own",
        ),
    ];
    match refused.into_iter().find(|(is_there, ..)| *is_there) {
        Some((_, field, why)) => Err(RequestError::invalid(field, why)),
        None => Ok(()),
    }
}

fn structured(constraint: vllm::sampling_params::Constraint) -> Result<Option<Structured>, RequestError> {
    use vllm::sampling_params::Constraint as Wire;
    Ok(match constraint {
        Wire::JsonSchema(schema) => Some(Structured::JsonSchema(schema.into())),
        Wire::Regex(regex) => Some(Structured::Regex(regex.into())),
        Wire::Grammar(grammar) => {
            let lark = lark_from_grammar(&grammar)
                .map_err(|message| RequestError::invalid("sampling_params.grammar", message))?;
            Some(Structured::Lark(lark.into()))
        }
        Wire::JsonObject(wanted) => wanted.then_some(Structured::JsonObject),
        Wire::Choice(choice) => Some(Structured::Choice(choice.choices.into())),
        Wire::StructuralTag(_) => {
            let message = "is not supported; use json_schema, regex, grammar or choice";
            return Err(RequestError::invalid("sampling_params.structural_tag", message));
        }
    })
}

/// Everything is set: in this protocol what is absent, or 0 where that is no value, is neutral. The model's own defaults are applied by the
/// gateway, which learns them from `GetModelInfo`.
fn sampling(wire: vllm::SamplingParams) -> Result<SamplingParams, RequestError> {
    if wire.truncate_prompt_tokens.is_some() {
        let message = "is not supported: a prompt is used whole; shorten it before it is sent";
        return Err(RequestError::invalid("sampling_params.truncate_prompt_tokens", message));
    }
    let neutral = |value: f32| if value == 0.0 { 1.0 } else { value };
    Ok(SamplingParams {
        temperature: Some(wire.temperature.unwrap_or(1.0)),
        top_k: Some(wire.top_k),
        top_p: Some(neutral(wire.top_p)),
        min_p: Some(wire.min_p),
        repetition_penalty: Some(neutral(wire.repetition_penalty)),
        presence_penalty: Some(wire.presence_penalty),
        frequency_penalty: Some(wire.frequency_penalty),
        logit_bias: logit_bias(wire.logit_bias)?,
        // Negative seeds are seeds of their own.
        seed: wire.seed.map(|seed| i64::from(seed) as u64),
        max_tokens: wire.max_tokens,
        min_tokens: Some(wire.min_tokens),
        stop: wire.stop,
        stop_token_ids: token_ids(wire.stop_token_ids),
        ignore_eos: wire.ignore_eos,
        logprobs: count("sampling_params.logprobs", wire.logprobs)?,
        prompt_logprobs: count("sampling_params.prompt_logprobs", wire.prompt_logprobs)?,
        n: Some(wire.n.max(1)),
    })
}

fn logit_bias(wire: std::collections::HashMap<i32, f32>) -> Result<Vec<(TokenId, f32)>, RequestError> {
    let id = |(id, bias): (i32, f32)| match u32::try_from(id) {
        Ok(id) => Ok((TokenId(id), bias)),
        Err(_) => {
            let message = format!("{id} is not a token id; ids begin with 0");
            Err(RequestError::invalid("sampling_params.logit_bias", message))
        }
    };
    let mut biases = wire.into_iter().map(id).collect::<Result<Vec<_>, _>>()?;
    // The wire's map has no order; the same request shall always be the same.
    biases.sort_unstable_by_key(|&(id, _)| id);
    Ok(biases)
}

fn count(field: &'static str, wire: Option<i32>) -> Result<Option<u32>, RequestError> {
    let unsigned = |count: i32| {
        let message = || format!("{count} is not supported; ask for a number of tokens, from 0 on");
        u32::try_from(count).map_err(|_| RequestError::invalid(field, message()))
    };
    wire.map(unsigned).transpose()
}

#[cfg(test)]
mod tests {
    use vllm::{SamplingParams as Wire, sampling_params::Constraint};

    use super::*;

    fn asked(sampling: Wire) -> Result<GenerateRequest, RequestError> {
        use vllm::generate_request::Input;
        let tokenized = vllm::TokenizedInput { original_text: "x".into(), input_ids: vec![7] };
        let request = vllm::GenerateRequest {
            input: Some(Input::Tokenized(tokenized)),
            sampling_params: Some(sampling),
            ..vllm::GenerateRequest::default()
        };
        generate_request(RequestId::new("r"), request)
    }

    #[test]
    fn what_is_absent_is_neutral_and_not_the_models_default() {
        let request = asked(Wire::default()).unwrap();
        let neutral = SamplingParams {
            temperature: Some(1.0),
            top_k: Some(0),
            top_p: Some(1.0),
            min_p: Some(0.0),
            repetition_penalty: Some(1.0),
            presence_penalty: Some(0.0),
            frequency_penalty: Some(0.0),
            min_tokens: Some(0),
            n: Some(1),
            ..SamplingParams::default()
        };
        assert_eq!(request.sampling, neutral);
        assert!(request.token_ids_only && request.structured.is_none());
        assert_eq!(request.prompt, Prompt::TokenIds(vec![TokenId(7)]));
    }

    #[test]
    fn text_is_made_for_stop_strings_alone_and_as_the_client_reads_it() {
        for skip_special_tokens in [false, true] {
            let wire = Wire { stop: vec!["end".into()], skip_special_tokens, ..Wire::default() };
            let request = asked(wire).unwrap();
            assert!(!request.token_ids_only);
            assert_eq!(request.include_special_tokens, !skip_special_tokens);
        }
    }

    #[test]
    fn every_constraint_arrives_and_one_that_asks_nothing_is_none() {
        let choices = vec!["yes".to_owned(), "no".to_owned()];
        let choice = vllm::ChoiceConstraint { choices: choices.clone() };
        for (constraint, expected) in [
            (Constraint::JsonSchema("{}".into()), Some(Structured::JsonSchema("{}".into()))),
            (Constraint::Regex("a+".into()), Some(Structured::Regex("a+".into()))),
            (Constraint::Grammar("start: \"a\"".into()), Some(Structured::Lark("start: \"a\"".into()))),
            (
                Constraint::Grammar("root ::= \"a\"".into()),
                Some(Structured::Lark("start: r0_root\nr0_root: L0\nL0: \"a\"\n".into())),
            ),
            (Constraint::JsonObject(true), Some(Structured::JsonObject)),
            (Constraint::JsonObject(false), None),
            (Constraint::Choice(choice), Some(Structured::Choice(choices.into()))),
        ] {
            let wire = Wire { constraint: Some(constraint), ..Wire::default() };
            assert_eq!(asked(wire).unwrap().structured, expected);
        }
    }

    #[test]
    fn what_the_engine_lacks_is_refused_by_name() {
        let tag = Some(Constraint::StructuralTag("{}".into()));
        for (wire, field) in [
            (Wire { constraint: tag, ..Wire::default() }, "sampling_params.structural_tag"),
            (
                Wire { truncate_prompt_tokens: Some(3), ..Wire::default() },
                "sampling_params.truncate_prompt_tokens",
            ),
            (Wire { logprobs: Some(-1), ..Wire::default() }, "sampling_params.logprobs"),
            (Wire { prompt_logprobs: Some(-1), ..Wire::default() }, "sampling_params.prompt_logprobs"),
            (Wire { logit_bias: [(-5, 1.0)].into(), ..Wire::default() }, "sampling_params.logit_bias"),
        ] {
            let Err(RequestError::Invalid(violations)) = asked(wire) else { panic!("{field} is taken") };
            assert_eq!(violations[0].field, field);
        }
    }
}
