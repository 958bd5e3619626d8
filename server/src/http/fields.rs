//! Fields that several routes share: how tokens are chosen, what form the answer must have.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use tidemill_engine::{
    ids::{TenantId, TokenId},
    request::GenerateRequest,
    sampling::SamplingParams,
    structured::Structured,
};

use super::{ApiError, answer::parsers::lark_from_grammar};

/// Reads one part of a body: what it does not know is left to the other parts.
///
/// # Errors
/// 400 that names the field.
pub fn part<T: DeserializeOwned>(body: &Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(body).map_err(|error| {
        let (path, reason) = (error.path().to_string(), error.inner());
        match path.as_str() {
            // A field is missing, and the reason says which.
            "." | "?" => ApiError::new(StatusCode::BAD_REQUEST, reason.to_string()),
            _ => ApiError::invalid(path.clone(), format!("{path}: {reason}")),
        }
    })
}

/// One or several.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One.
    One(T),
    /// Several.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// All of them.
    pub fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// How tokens are chosen; names of OpenAI and of vLLM, and those that model servers use.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct SamplingFields {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// In (0, 1].
    pub top_p: Option<f32>,
    /// 0 and -1 keep all.
    pub top_k: Option<i64>,
    /// In [0, 1].
    pub min_p: Option<f32>,
    /// False is the same as temperature 0.
    pub do_sample: Option<bool>,
    /// In [-2, 2].
    pub presence_penalty: Option<f32>,
    /// In [-2, 2].
    pub frequency_penalty: Option<f32>,
    /// Over 0; 1 is off.
    pub repetition_penalty: Option<f32>,
    /// Token ids, as text, to what is added to their logits, in [-100, 100].
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// Same seed, same answer.
    pub seed: Option<i64>,
    /// Tokens to generate at most.
    pub max_tokens: Option<u32>,
    /// The same; wins over `max_tokens`.
    pub max_completion_tokens: Option<u32>,
    /// The same, as model servers call it.
    pub max_new_tokens: Option<u32>,
    /// Tokens before which nothing but `max_tokens` ends the answer.
    pub min_tokens: Option<u32>,
    /// Strings that end the answer.
    pub stop: Option<OneOrMany<String>>,
    /// Tokens that end the answer.
    pub stop_token_ids: Option<Vec<u32>>,
    /// Goes on past the model's end.
    pub ignore_eos: Option<bool>,
    /// Not supported: `stop_reason` names the string that ended the answer.
    pub include_stop_str_in_output: Option<bool>,
    /// False lets special tokens stand in the text.
    pub skip_special_tokens: Option<bool>,
    /// Log-probabilities of the prompt's tokens.
    pub prompt_logprobs: Option<u32>,
    /// Answers to one prompt.
    pub n: Option<u32>,
    /// With --scheduling-policy priority: lower is served first.
    pub priority: Option<i32>,
    /// The request's name for /abort and logs.
    pub request_id: Option<String>,
    /// Who is served: the tenant of fair scheduling.
    pub user: Option<String>,
    /// Only requests with the same salt share cached prefixes.
    pub cache_salt: Option<String>,
    /// text, json_object or json_schema.
    pub response_format: Option<ResponseFormat>,
    /// One form of the answer; at most one of its fields.
    pub structured_outputs: Option<StructuredFields>,
    /// A JSON Schema, as an object or as text.
    pub guided_json: Option<Value>,
    /// A regular expression.
    pub guided_regex: Option<String>,
    /// One of these texts.
    pub guided_choice: Option<Vec<String>>,
    /// A grammar in Lark or EBNF.
    pub guided_grammar: Option<String>,
}

/// OpenAI's form of an answer.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResponseFormat {
    /// Any text.
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON of a schema.
    JsonSchema {
        /// The schema and its name.
        json_schema: NamedSchema,
    },
}

/// A JSON Schema with a name.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[expect(dead_code, reason = "clients send a name and `strict`, and every answer satisfies its schema")]
pub struct NamedSchema {
    /// For people.
    #[serde(default)]
    pub name: Option<String>,
    /// The schema; answers always satisfy it, whether `strict` is set or not.
    #[serde(default)]
    pub schema: Option<Value>,
    /// Accepted; see `schema`.
    #[serde(default)]
    pub strict: Option<bool>,
}

/// vLLM's form of an answer.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct StructuredFields {
    /// A JSON Schema, as an object or as text.
    pub json: Option<Value>,
    /// Any JSON object.
    pub json_object: Option<bool>,
    /// A regular expression.
    pub regex: Option<String>,
    /// One of these texts.
    pub choice: Option<Vec<String>>,
    /// A grammar in Lark or EBNF.
    pub grammar: Option<String>,
}

impl SamplingFields {
    /// Writes these fields into a request.
    ///
    /// # Errors
    /// What is wrong with them, beyond what the engine checks.
    pub fn apply(self, request: &mut GenerateRequest) -> Result<(), ApiError> {
        if self.include_stop_str_in_output == Some(true) {
            let message =
                "is not supported; append the answer's `stop_reason`, which is the string that ended it";
            return Err(ApiError::invalid("include_stop_str_in_output", message));
        }
        request.structured = self.structured()?;
        let max_tokens = self.max_completion_tokens.or(self.max_tokens).or(self.max_new_tokens);
        let top_k = self.top_k.map(|k| match k {
            -1 => Ok(0),
            k => {
                u32::try_from(k).map_err(|_| ApiError::invalid("top_k", "must be -1, 0 or a positive number"))
            }
        });
        if self.do_sample == Some(false) && self.temperature.is_some_and(|t| t != 0.0) {
            return Err(ApiError::invalid(
                "do_sample",
                "false is greedy, and a temperature over 0 is not; leave one out",
            ));
        }
        let greedy = (self.do_sample == Some(false)).then_some(0.0);
        request.sampling = SamplingParams {
            temperature: self.temperature.or(greedy),
            top_k: top_k.transpose()?,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: logit_bias(self.logit_bias.unwrap_or_default())?,
            // Any 64 bits are a seed; the sign means nothing.
            seed: self.seed.map(|seed| seed as u64),
            max_tokens,
            min_tokens: self.min_tokens,
            stop: self.stop.map(OneOrMany::into_vec).unwrap_or_default(),
            stop_token_ids: self.stop_token_ids.unwrap_or_default().into_iter().map(TokenId).collect(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            logprobs: None,
            prompt_logprobs: self.prompt_logprobs,
            n: self.n,
        };
        request.include_special_tokens = self.skip_special_tokens == Some(false);
        request.priority = self.priority.unwrap_or(0);
        request.tenant = TenantId::new(self.user.unwrap_or_default());
        request.cache_salt = self.cache_salt.unwrap_or_default();
        Ok(())
    }

    /// For routes that have one answer and say nothing about the prompt's tokens; `instead` is a route that does.
    ///
    /// # Errors
    /// 400 when more is asked for.
    pub fn check_single(&self, instead: &str) -> Result<(), ApiError> {
        if self.n.is_some_and(|n| n != 1) {
            return Err(ApiError::invalid("n", format!("must be 1 here; use {instead} for several answers")));
        }
        if self.prompt_logprobs.is_some() {
            return Err(ApiError::invalid("prompt_logprobs", format!("are not given here; use {instead}")));
        }
        Ok(())
    }

    /// For routes that stream: the prompt's tokens have no place in a chunk.
    ///
    /// # Errors
    /// 400 when a stream shall say something about them.
    pub fn check_stream(&self, stream: bool) -> Result<(), ApiError> {
        if stream && self.prompt_logprobs.is_some() {
            let message = "are not given in streams; leave out `stream`, or use `echo` and `logprobs` of /v1/completions";
            return Err(ApiError::invalid("prompt_logprobs", message));
        }
        Ok(())
    }

    fn structured(&self) -> Result<Option<Structured>, ApiError> {
        let mut forms = Vec::new();
        match &self.response_format {
            Some(ResponseFormat::JsonObject) => forms.push(Structured::JsonObject),
            Some(ResponseFormat::JsonSchema { json_schema }) => {
                let schema = json_schema.schema.as_ref().ok_or_else(|| {
                    ApiError::invalid("response_format.json_schema.schema", "is missing; give a JSON Schema")
                })?;
                forms.push(Structured::JsonSchema(schema.to_string().into()));
            }
            Some(ResponseFormat::Text) | None => {}
        }
        let guided = StructuredFields {
            json: self.guided_json.clone(),
            json_object: None,
            regex: self.guided_regex.clone(),
            choice: self.guided_choice.clone(),
            grammar: self.guided_grammar.clone(),
        };
        guided.forms(&mut forms)?;
        if let Some(structured) = &self.structured_outputs {
            let others = forms.len();
            structured.forms(&mut forms)?;
            if forms.len() == others {
                let message = "names no form; give one of json, json_object, regex, choice and grammar";
                return Err(ApiError::invalid("structured_outputs", message));
            }
        }
        if forms.len() > 1 {
            return Err(ApiError::invalid(
                "response_format",
                "the answer can have one form only; give one of response_format, structured_outputs and guided_*",
            ));
        }
        Ok(forms.pop())
    }
}

impl StructuredFields {
    fn forms(&self, forms: &mut Vec<Structured>) -> Result<(), ApiError> {
        forms.extend(self.json.as_ref().map(|schema| match schema {
            Value::String(text) => Structured::JsonSchema(text.as_str().into()),
            schema => Structured::JsonSchema(schema.to_string().into()),
        }));
        forms.extend((self.json_object == Some(true)).then_some(Structured::JsonObject));
        forms.extend(self.regex.as_deref().map(|regex| Structured::Regex(regex.into())));
        forms.extend(self.choice.as_ref().map(|texts| Structured::Choice(texts.clone().into())));
        if let Some(grammar) = &self.grammar {
            let lark = lark_from_grammar(grammar).map_err(|message| ApiError::invalid("grammar", message))?;
            forms.push(Structured::Lark(lark.into()));
        }
        Ok(())
    }
}

fn logit_bias(map: BTreeMap<String, f32>) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let mut bias = Vec::with_capacity(map.len());
    for (key, value) in map {
        let id = key.parse().map_err(|_| {
            ApiError::invalid("logit_bias", format!("its keys are token ids, and {key:?} is none"))
        })?;
        bias.push((TokenId(id), value));
    }
    bias.sort_unstable_by_key(|&(id, _)| id);
    bias.dedup_by_key(|&mut (id, _)| id);
    Ok(bias)
}
