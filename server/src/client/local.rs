//! The engine in the same process.

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, OnceLock},
};

use futures_util::{FutureExt, stream};
use tidemill_engine::{
    AdapterInfo, EngineHandle, EngineStats, Generation, RequestError,
    activity::Activity,
    ids::{RequestId, TokenId},
    output::{AbortReceipt, Embedding, Score},
    request::{EmbedRequest, GenerateRequest, ScoreRequest},
};

use super::{
    Accepted, CallError, EngineClient, ModelCard, OutputStream, TokenBytes, TokenizeInput, Tokenized,
};
use crate::{
    clock::since_1970,
    grpc::{Lifecycle, Phase, TextWorkers},
    http::answer::Parsers,
};

/// Longest text in bytes that is encoded for its own sake: some seconds of work.
const MAX_TOKENIZE_BYTES: usize = 4 << 20;
/// Most tokens that are decoded for their own sake: a text of some megabytes.
const MAX_DETOKENIZE_IDS: usize = 1 << 20;

/// The engine of this process, once it is there.
#[derive(Debug)]
pub struct LocalEngine {
    lifecycle: Arc<Lifecycle>,
    texts: TextWorkers,
    parsers: Parsers,
    card: OnceLock<Arc<ModelCard>>,
}

impl LocalEngine {
    /// The engine that `lifecycle` will have or has.
    pub fn new(lifecycle: Arc<Lifecycle>, parsers: Parsers) -> Self {
        Self { lifecycle, texts: TextWorkers::default(), parsers, card: OnceLock::new() }
    }

    fn engine(&self) -> Result<&EngineHandle, CallError> {
        self.lifecycle.engine().map_err(|_| CallError::loading())
    }
}

#[tonic::async_trait]
impl EngineClient for LocalEngine {
    fn phase(&self) -> Phase {
        self.lifecycle.phase()
    }

    fn is_healthy(&self) -> bool {
        self.lifecycle.is_healthy()
    }

    fn model(&self) -> Result<Arc<ModelCard>, CallError> {
        let engine = self.engine()?;
        Ok(self.card.get_or_init(|| Arc::new(card(engine, &self.parsers))).clone())
    }

    async fn generate(&self, request: GenerateRequest) -> Result<Accepted, CallError> {
        let engine = self.engine()?.clone();
        // Asked again by the engine; here it saves the time to encode the prompt.
        if self.phase() > Phase::Ready {
            return Err(RequestError::Draining.into());
        }
        let (engine, validated) =
            self.texts.run(move || engine.validate(request).map(|valid| (engine, valid))).await?;
        let (id, prompt_tokens) = (validated.id().clone(), validated.prompt().len());
        let opens_thinking = validated.opens_thinking();
        let outputs = outputs(engine.submit(validated)?);
        Ok(Accepted { id, prompt_tokens, opens_thinking, outputs })
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embedding, CallError> {
        let engine = self.engine()?.clone();
        if self.phase() > Phase::Ready {
            return Err(RequestError::Draining.into());
        }
        let (engine, validated) =
            self.texts.run(move || engine.validate_embed(request).map(|valid| (engine, valid))).await?;
        Ok(engine.submit_embed(validated)?.wait().await?)
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score, CallError> {
        let engine = self.engine()?.clone();
        if self.phase() > Phase::Ready {
            return Err(RequestError::Draining.into());
        }
        let (engine, validated) =
            self.texts.run(move || engine.validate_score(request).map(|valid| (engine, valid))).await?;
        Ok(engine.submit_score(validated)?.wait().await?)
    }

    async fn tokenize(&self, input: TokenizeInput) -> Result<Tokenized, CallError> {
        let engine = self.engine()?.clone();
        let work = move || {
            let (field, text, add_special) = match input {
                TokenizeInput::Text(text, add_special) => ("prompt", text, add_special),
                // The template writes special tokens itself.
                TokenizeInput::Chat(chat) => ("messages", engine.text().render_chat(&chat)?, false),
            };
            if text.len() > MAX_TOKENIZE_BYTES {
                let message = format!("has {} bytes; at most {MAX_TOKENIZE_BYTES} are encoded", text.len());
                return Err(RequestError::invalid(field, message));
            }
            Ok(Tokenized { ids: engine.text().encode(&text, add_special)?, text })
        };
        Ok(self.texts.run(work).await?)
    }

    async fn detokenize(&self, ids: Vec<TokenId>, special: bool) -> Result<String, CallError> {
        let engine = self.engine()?.clone();
        let work = move || {
            if ids.len() > MAX_DETOKENIZE_IDS {
                let message = format!("has {} ids; at most {MAX_DETOKENIZE_IDS} are decoded", ids.len());
                return Err(RequestError::invalid("tokens", message));
            }
            engine.text().decode(&ids, special)
        };
        Ok(self.texts.run(work).await?)
    }

    async fn abort(&self, id: RequestId) -> Result<AbortReceipt, CallError> {
        Ok(self.engine()?.abort(id).await?)
    }

    async fn adapters(&self) -> Result<Vec<AdapterInfo>, CallError> {
        Ok(self.engine()?.adapters().list())
    }

    async fn load_adapter(&self, name: String, path: String) -> Result<(), CallError> {
        let adapters = self.engine()?.adapters().clone();
        Ok(self.texts.run(move || adapters.load(&name, &path)).await?)
    }

    async fn unload_adapter(&self, name: String) -> Result<(), CallError> {
        Ok(self.engine()?.adapters().unload(&name)?)
    }

    async fn stats(&self) -> Result<EngineStats, CallError> {
        Ok(self.engine()?.stats())
    }

    async fn activity(&self) -> Result<Activity, CallError> {
        Ok(self.engine()?.activity().await?)
    }
}

fn outputs(generation: Generation) -> OutputStream {
    Box::pin(stream::unfold(Some(generation), |state| async {
        let mut generation = state?;
        let next = match AssertUnwindSafe(generation.next()).catch_unwind().await {
            Ok(next) => next?.map_err(CallError::from),
            // A panic of the detokeniser, say: this request alone ends.
            Err(_) => Err(CallError::internal("a stream panicked")),
        };
        let state = next.is_ok().then_some(generation);
        Some((next, state))
    }))
}

fn card(engine: &EngineHandle, parsers: &Parsers) -> ModelCard {
    let (info, text) = (engine.info(), engine.text());
    let (tool_format, reasoning) = parsers.resolve(text.chat_template_source());
    ModelCard {
        served_model_name: info.served_model_name.clone(),
        max_model_len: info.max_model_len,
        vocab_size: info.vocab_size,
        has_chat_template: info.has_chat_template,
        has_tokenizer: text.tokenizer_kind().is_some(),
        block_size: info.block_size,
        num_kv_blocks: info.num_kv_blocks,
        tokens: TokenBytes::Model(text.clone()),
        special_tokens: text.special_tokens(),
        tool_format,
        reasoning,
        created: since_1970().as_secs(),
    }
}
