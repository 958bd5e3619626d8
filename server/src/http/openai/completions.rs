//! `/v1/completions`.

mod answer;

use axum::response::Response;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;
use tidemill_engine::{
    ids::{RequestId, TokenId},
    request::{GenerateRequest, Prompt},
};

use self::answer::{CompletionWriter, Echo};
use super::{StreamOptions, stream_options};
use crate::{
    client::{CallError, TokenizeInput},
    http::{
        ApiError, App, Call,
        answer::{Answer, Ask},
        fields::{SamplingFields, part},
    },
};

/// Most prompts of a request.
const MAX_PROMPTS: usize = 256;
/// Length of an answer whose length nobody named: OpenAI's for this route, where a text may go on for ever.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// What is of completions alone.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct CompletionFields {
    /// The model's name; absent for whatever is served.
    #[serde(default)]
    pub model: Option<String>,
    /// What goes on: a text, token ids, or several of either.
    pub prompt: PromptField,
    /// Server-sent events instead of one answer.
    #[serde(default)]
    pub stream: Option<bool>,
    /// More about the stream.
    #[serde(default)]
    pub stream_options: Option<StreamOptions>,
    /// Log-probabilities of tokens and of so many alternatives, up to 20.
    #[serde(default)]
    pub logprobs: Option<u32>,
    /// The prompt stands before the text.
    #[serde(default)]
    pub echo: Option<bool>,
    /// Not supported.
    #[serde(default)]
    pub suffix: Option<String>,
    /// As `n`; other values are not supported.
    #[serde(default)]
    pub best_of: Option<u32>,
    /// The ids of the answer's tokens stand beside its text, as `token_ids`. True by itself where the server runs with --skip-tokenizer-init.
    #[serde(default)]
    pub return_token_ids: Option<bool>,
    /// False leaves the tokenizer's own special tokens out.
    #[serde(default)]
    pub add_special_tokens: Option<bool>,
}

/// One prompt or several.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum PromptField {
    /// A text.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
    /// Texts.
    Texts(Vec<String>),
    /// Lists of token ids.
    IdLists(Vec<Vec<u32>>),
}

impl PromptField {
    /// Each prompt by itself.
    ///
    /// # Errors
    /// 400 for none and for too many.
    pub fn prompts(self) -> Result<Vec<Prompt>, ApiError> {
        let ids = |ids: Vec<u32>| Prompt::TokenIds(ids.into_iter().map(TokenId).collect());
        let prompts: Vec<Prompt> = match self {
            Self::Text(text) => vec![Prompt::Text(text)],
            Self::Ids(list) => vec![ids(list)],
            Self::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
            Self::IdLists(lists) => lists.into_iter().map(ids).collect(),
        };
        match prompts.len() {
            0 => Err(ApiError::invalid("prompt", "is empty; give at least one prompt")),
            count if count > MAX_PROMPTS => Err(ApiError::invalid(
                "prompt",
                format!("has {count} prompts; at most {MAX_PROMPTS} are accepted"),
            )),
            _ => Ok(prompts),
        }
    }
}

/// Goes on with a text.
pub async fn create(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let body: Value = call.json().await?;
    let fields: CompletionFields = part(&body)?;
    let mut sampling: SamplingFields = part(&body)?;
    if fields.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::invalid(
            "suffix",
            "is not supported: text is only added at the end of the prompt",
        ));
    }
    if fields.best_of.is_some_and(|best| best != sampling.n.unwrap_or(1)) {
        return Err(ApiError::invalid("best_of", "must equal n: every answer that is generated is returned"));
    }
    let stream = fields.stream.unwrap_or(false);
    let options = stream_options(stream, fields.stream_options)?;
    sampling.check_stream(stream)?;
    let card = app.model_named(fields.model.as_deref()).await?;
    let request_id = sampling.request_id.take();
    let echo = fields.echo.unwrap_or(false);
    let mut request = GenerateRequest::new(Prompt::Text(String::new()));
    sampling.apply(&mut request)?;
    request.sampling.max_tokens.get_or_insert(DEFAULT_MAX_TOKENS);
    request.model = fields.model.clone();
    request.sampling.logprobs = fields.logprobs;
    if echo && request.sampling.prompt_logprobs.is_none() {
        request.sampling.prompt_logprobs = fields.logprobs;
    }
    call.stamp(&mut request, request_id)?;
    let prompts = fields.prompt.prompts()?;
    let several = prompts.len() > 1;
    let group = app.groups.enter(&call.id, prompts.len());
    let mut writers = Vec::with_capacity(prompts.len());
    for (at, prompt) in prompts.into_iter().enumerate() {
        let mut request = GenerateRequest { prompt, ..request.clone() };
        if several {
            request.id = Some(RequestId::new(format!("{}-{at}", call.id)));
        }
        if fields.add_special_tokens == Some(false) {
            without_special_tokens(&app, &mut request).await?;
        }
        let echo = if echo { Some(Echo::of(&app, &request.prompt).await?) } else { None };
        let ask = Ask { request, parser: None, single_tool_call: false };
        // Those that were started before one is refused end with it: they are dropped.
        writers.push((Answer::start(&app.engine, ask).await?, echo));
    }
    let with_ids = fields.return_token_ids.unwrap_or(!card.has_tokenizer);
    let writer =
        CompletionWriter::new(&call.id, card, fields.logprobs, writers, group).with_token_ids(with_ids);
    if stream { Ok(writer.stream(options)) } else { writer.whole().await }
}

/// Encodes a text here, where the engine would add special tokens.
async fn without_special_tokens(app: &App, request: &mut GenerateRequest) -> Result<(), CallError> {
    if let Prompt::Text(text) = &request.prompt {
        let tokenized = app.engine.tokenize(TokenizeInput::Text(text.clone(), false)).await?;
        request.prompt = Prompt::TokenIds(tokenized.ids);
    }
    Ok(())
}
