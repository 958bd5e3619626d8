//! The engine as the HTTP front sees it: in the same process ([`LocalEngine`]) or behind gRPC. Handlers hold an
//! `Arc<dyn EngineClient>` and cannot tell which.

mod error;
mod local;
mod remote;

use std::{fmt, pin::Pin, sync::Arc};

use futures_util::Stream;
use tidemill_engine::{
    AdapterInfo, EngineStats,
    activity::Activity,
    ids::{RequestId, TokenId},
    output::{AbortReceipt, Embedding, Output, Score},
    request::{EmbedRequest, GenerateRequest, ScoreRequest},
    text::{TextModel, chat::ChatPrompt},
};

pub use error::CallError;
pub use local::LocalEngine;
pub use remote::RemoteEngine;

use crate::{
    grpc::Phase,
    http::answer::parsers::{ReasoningFormat, ToolFormat},
};

/// Outputs of one request, in order; an error is the last thing that comes. Dropping it before its end aborts the request.
pub type OutputStream = Pin<Box<dyn Stream<Item = Result<Output, CallError>> + Send>>;

/// What is loaded, as far as a front end needs to know.
#[derive(Debug, Clone)]
pub struct ModelCard {
    /// The name clients use.
    pub served_model_name: String,
    /// Tokens of prompt and completion together.
    pub max_model_len: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Whether chat prompts can be rendered.
    pub has_chat_template: bool,
    /// Whether there is text at all; without it prompts and answers are token ids.
    pub has_tokenizer: bool,
    /// Tokens per KV block.
    pub block_size: usize,
    /// KV blocks in all.
    pub num_kv_blocks: usize,
    /// What each token stands for.
    pub tokens: TokenBytes,
    /// The tokenizer's special tokens, by id.
    pub special_tokens: Vec<(TokenId, String)>,
    /// How the model writes tool calls, if it does.
    pub tool_format: Option<ToolFormat>,
    /// How the model marks its thoughts, if it does.
    pub reasoning: Option<ReasoningFormat>,
    /// When it was loaded, in seconds since 1970.
    pub created: u64,
}

impl ModelCard {
    /// The id of the special token with this text.
    pub fn special_token(&self, text: &str) -> Option<u32> {
        self.special_tokens.iter().find(|(_, token)| token == text).map(|(id, _)| id.0)
    }

    /// The texts of all special tokens.
    pub fn special_texts(&self) -> Vec<String> {
        self.special_tokens.iter().map(|(_, text)| text.clone()).collect()
    }
}

/// The bytes that tokens stand for.
#[derive(Debug, Clone)]
pub enum TokenBytes {
    /// Of the model in this process.
    Model(Arc<TextModel>),
    /// A copy.
    Table(Arc<[Vec<u8>]>),
}

impl TokenBytes {
    /// The bytes of a token within a text; they need not be UTF-8 on their own. Empty for an unknown id.
    pub fn bytes(&self, id: TokenId) -> &[u8] {
        match self {
            Self::Model(text) => text.token_bytes(id),
            Self::Table(table) => table.get(id.0 as usize).map_or(&[], Vec::as_slice),
        }
    }
}

/// A request that the engine has taken.
pub struct Accepted {
    /// The request's name in the engine.
    pub id: RequestId,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// The prompt ends within the model's thoughts.
    pub opens_thinking: bool,
    /// What it generates.
    pub outputs: OutputStream,
}

/// What is to be encoded.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenizeInput {
    /// Plain text; `true` lets the tokenizer add its own special tokens around it.
    Text(String, bool),
    /// A conversation, rendered with the model's chat template.
    Chat(ChatPrompt),
}

/// An encoded text.
#[derive(Debug, Clone, PartialEq)]
pub struct Tokenized {
    /// The ids.
    pub ids: Vec<TokenId>,
    /// The text that was encoded: the rendered template for conversations.
    pub text: String,
}

/// An engine, wherever it is.
#[tonic::async_trait]
pub trait EngineClient: Send + Sync + fmt::Debug {
    /// Where it is in its life. [`Phase::Loading`] for an engine that cannot be reached.
    fn phase(&self) -> Phase;

    /// Whether it is ready and its steps go on.
    fn is_healthy(&self) -> bool;

    /// What is loaded.
    ///
    /// # Errors
    /// UNAVAILABLE until something is.
    fn model(&self) -> Result<Arc<ModelCard>, CallError>;

    /// Checks a request and hands it to the engine.
    ///
    /// # Errors
    /// Why it was not taken.
    async fn generate(&self, request: GenerateRequest) -> Result<Accepted, CallError>;

    /// The embedding of a prompt. Dropping the future aborts the request.
    ///
    /// # Errors
    /// Why there is none; CANCELLED when it was aborted by its id.
    async fn embed(&self, request: EmbedRequest) -> Result<Embedding, CallError>;

    /// How well a document answers a query. Dropping the future aborts the request.
    ///
    /// # Errors
    /// Why there is no score; CANCELLED when it was aborted by its id.
    async fn score(&self, request: ScoreRequest) -> Result<Score, CallError>;

    /// Text or a conversation as token ids.
    ///
    /// # Errors
    /// What is wrong with it.
    async fn tokenize(&self, input: TokenizeInput) -> Result<Tokenized, CallError>;

    /// Token ids as text, with or without special tokens.
    ///
    /// # Errors
    /// What is wrong with them.
    async fn detokenize(&self, ids: Vec<TokenId>, special: bool) -> Result<String, CallError>;

    /// Ends a request at any stage. Unknown and finished ids are answers, not errors.
    ///
    /// # Errors
    /// When the engine is gone.
    async fn abort(&self, id: RequestId) -> Result<AbortReceipt, CallError>;

    /// The adapters that requests can name in place of the model.
    ///
    /// # Errors
    /// When the engine is gone.
    async fn adapters(&self) -> Result<Vec<AdapterInfo>, CallError>;

    /// Loads an adapter from a folder that the server allows.
    ///
    /// # Errors
    /// Why it was not; see [`Adapters::load`](tidemill_engine::Adapters::load).
    async fn load_adapter(&self, name: String, path: String) -> Result<(), CallError>;

    /// Takes an adapter's name away; requests that named it before keep it.
    ///
    /// # Errors
    /// NOT_FOUND for a name that there is not.
    async fn unload_adapter(&self, name: String) -> Result<(), CallError>;

    /// A reading of gauges, counters and distributions.
    ///
    /// # Errors
    /// When the engine is gone.
    async fn stats(&self) -> Result<EngineStats, CallError>;

    /// The engine at work: batch, queue, blocks and the last aborts.
    ///
    /// # Errors
    /// When the engine is gone.
    async fn activity(&self) -> Result<Activity, CallError>;
}
