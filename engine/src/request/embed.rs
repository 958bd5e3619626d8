//! Requests for embeddings: through the same door, to the same queue.

use std::{sync::Arc, time::Instant};

use super::{Findings, Prompt, Purpose, ValidatedRequest, Validator};
use crate::{
    error::RequestError,
    ids::{RequestId, TenantId, TokenId},
    sampling::Sampling,
};

/// A request for the embedding of one prompt, as a front end received it.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbedRequest {
    /// The client's name for it; made here when absent.
    pub id: Option<RequestId>,
    /// What to embed.
    pub prompt: Prompt,
    /// The model the client means, if it said.
    pub model: Option<String>,
    /// When the client stops waiting.
    pub deadline: Option<Instant>,
    /// As [`GenerateRequest::priority`](super::GenerateRequest::priority).
    pub priority: i32,
    /// As [`GenerateRequest::tenant`](super::GenerateRequest::tenant).
    pub tenant: TenantId,
    /// As [`GenerateRequest::credential`](super::GenerateRequest::credential).
    pub credential: Arc<str>,
    /// As [`GenerateRequest::cache_salt`](super::GenerateRequest::cache_salt).
    pub cache_salt: String,
    /// As [`GenerateRequest::trace_parent`](super::GenerateRequest::trace_parent).
    pub trace_parent: Option<Arc<str>>,
    /// So many of the first values, for models that were trained for that (Kusupati et al. 2022, Matryoshka); all of them when absent.
    pub dimensions: Option<u32>,
    /// Whether the embedding, after it is cut, is scaled to length 1; absent: as the model folder says.
    pub normalize: Option<bool>,
}

impl EmbedRequest {
    /// A request with neither options nor a deadline.
    pub fn new(prompt: Prompt) -> Self {
        Self {
            id: None,
            prompt,
            model: None,
            deadline: None,
            priority: 0,
            tenant: TenantId::default(),
            credential: "".into(),
            cache_salt: String::new(),
            trace_parent: None,
            dimensions: None,
            normalize: None,
        }
    }
}

/// What is made of the pooled hidden states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EmbeddingShape {
    /// From 1 to the model's.
    pub dimensions: usize,
    pub normalize: bool,
}

/// A request for an embedding that passed [`Validator::validate_embed`]. Cannot be built in any other way.
#[derive(Debug)]
pub struct ValidatedEmbed {
    pub(crate) request: ValidatedRequest,
    pub(crate) shape: EmbeddingShape,
}

impl ValidatedEmbed {
    /// The request's id, the client's or ours.
    pub fn id(&self) -> &RequestId {
        self.request.id()
    }

    /// The prompt as token ids.
    pub fn prompt(&self) -> &[TokenId] {
        self.request.prompt()
    }
}

impl Validator {
    /// Fills in defaults, encodes the prompt and checks everything, as [`validate`](Self::validate) does.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub fn validate_embed(&self, request: EmbedRequest) -> Result<ValidatedEmbed, RequestError> {
        let adapter = self.check_model(request.model.as_deref())?;
        let mut found = Findings::default();
        self.check_id(request.id.as_ref(), &mut found);
        self.check_service(request.priority, &request.tenant, &request.cache_salt, &mut found);
        let most = self.embedding.dimensions;
        let dimensions = request.dimensions.map_or(most, |dimensions| dimensions as usize);
        found.check((1..=most).contains(&dimensions), "dimensions", || {
            format!("{dimensions} is not in [1, {most}], the values of this model's embeddings")
        });
        found.into_result()?;
        let prompt = self.encode(request.prompt, Purpose::Embed)?;
        self.check_fits(prompt.len())?;
        let normalize = request.normalize.unwrap_or(self.embedding.normalize);
        Ok(ValidatedEmbed {
            request: ValidatedRequest {
                id: request.id.filter(|id| !id.as_str().is_empty()).unwrap_or_else(RequestId::random),
                prompt: prompt.into(),
                sampling: Arc::new(Sampling::of_embedding()),
                pooling: Some(self.embedding.pooling),
                stop: Vec::new(),
                n: 1,
                text_output: false,
                include_special_tokens: false,
                deadline: request.deadline,
                priority: request.priority,
                tenant: request.tenant,
                credential: request.credential,
                cache_salt: request.cache_salt,
                trace_parent: request.trace_parent,
                constraints: Vec::new(),
                opens_thinking: false,
                adapter,
            },
            shape: EmbeddingShape { dimensions, normalize },
        })
    }

    fn check_fits(&self, tokens: usize) -> Result<(), RequestError> {
        let capacity = self.kv_capacity_tokens;
        if tokens <= capacity {
            return Ok(());
        }
        let message = format!(
            "the prompt needs {tokens} tokens of KV cache, but the whole cache holds {capacity}; shorten it or start the \
             server with a larger --kv-cache-memory"
        );
        Err(RequestError::invalid("prompt", message))
    }
}
