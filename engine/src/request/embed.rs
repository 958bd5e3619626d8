//! Requests for embeddings: through the same door, to the same queue.

use std::{sync::Arc, time::Instant};

use super::{Findings, Prompt, Purpose, ValidatedRequest, Validator};
use crate::{
    adapter::Adapter,
    error::RequestError,
    ids::{RequestId, TenantId, TokenId},
    sampling::Sampling,
    text::{Encoded, MAX_CUT_BYTES},
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
    /// Which of the model's prompts is put before a text, such as `query`; absent: the model's default, if it has one; empty: none.
    pub prompt_name: Option<String>,
    /// Leaves the end of a prompt out that has more tokens; -1: than the model takes. Absent: what is too long is refused.
    pub truncate_prompt_tokens: Option<i32>,
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
            prompt_name: None,
            truncate_prompt_tokens: None,
        }
    }
}

/// Token ids without those behind the first `most`.
pub(super) fn cut(prompt: Prompt, most: Option<usize>) -> Prompt {
    match (prompt, most) {
        (Prompt::TokenIds(mut ids), Some(most)) => {
            ids.truncate(most);
            Prompt::TokenIds(ids)
        }
        (prompt, _) => prompt,
    }
}

/// Whom a request is for and when it is served.
pub(super) struct Service {
    pub id: Option<RequestId>,
    pub deadline: Option<Instant>,
    pub priority: i32,
    pub tenant: TenantId,
    pub credential: Arc<str>,
    pub cache_salt: String,
    pub trace_parent: Option<Arc<str>>,
    pub adapter: Option<Adapter>,
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
        if self.scores_only() {
            let message = "this model scores pairs of texts and gives no embeddings; use /v1/rerank, /v1/score or Inference.Score";
            return Err(RequestError::Unsupported(message.into()));
        }
        let mut found = Findings::default();
        self.check_id(request.id.as_ref(), &mut found);
        self.check_service(request.priority, &request.tenant, &request.cache_salt, &mut found);
        let most = self.embedding.dimensions;
        let dimensions = request.dimensions.map_or(most, |dimensions| dimensions as usize);
        found.check((1..=most).contains(&dimensions), "dimensions", || {
            format!("{dimensions} is not in [1, {most}], the values of this model's embeddings")
        });
        found.check(
            request.prompt_name.as_ref().is_none_or(|name| self.knows_prompt(name)),
            "prompt_name",
            || self.known_prompts(),
        );
        let most = self.cut_at(request.truncate_prompt_tokens, &mut found);
        found.into_result()?;
        let prompt = match request.prompt {
            Prompt::Text(text) => {
                let text = self.worded(text, request.prompt_name.as_deref());
                self.encode_texts(&text, None, most)?
            }
            Prompt::TokenIds(_) if request.prompt_name.is_some() => {
                let message = "is put before a text; token ids are used as they are";
                return Err(RequestError::invalid("prompt_name", message));
            }
            other => {
                let mut ids = self.encode(cut(other, most), Purpose::Embed)?;
                ids.shrink_to_fit();
                Encoded { ids, segments: Vec::new() }
            }
        };
        let service = Service {
            id: request.id,
            deadline: request.deadline,
            priority: request.priority,
            tenant: request.tenant,
            credential: request.credential,
            cache_salt: request.cache_salt,
            trace_parent: request.trace_parent,
            adapter,
        };
        let normalize = request.normalize.unwrap_or(self.embedding.normalize);
        let shape = EmbeddingShape { dimensions, normalize };
        Ok(ValidatedEmbed { request: self.pooled(service, prompt)?, shape })
    }

    /// A request whose prompt comes to one pooled state.
    pub(super) fn pooled(&self, service: Service, prompt: Encoded) -> Result<ValidatedRequest, RequestError> {
        self.check_fits(prompt.ids.len())?;
        let knows_segments = self.heads.texts.num_segments > 0;
        let segments = Some(prompt.segments).filter(|of| knows_segments && of.iter().any(|&s| s > 0));
        Ok(ValidatedRequest {
            id: service.id.filter(|id| !id.as_str().is_empty()).unwrap_or_else(RequestId::random),
            prompt: prompt.ids.into(),
            sampling: Arc::new(Sampling::of_embedding()),
            pooling: Some(self.embedding.pooling),
            is_whole: self.is_bidirectional,
            segments: segments.map(Into::into),
            stop: Vec::new(),
            n: 1,
            text_output: false,
            include_special_tokens: false,
            deadline: service.deadline,
            priority: service.priority,
            tenant: service.tenant,
            credential: service.credential,
            cache_salt: service.cache_salt,
            trace_parent: service.trace_parent,
            constraints: Vec::new(),
            opens_thinking: false,
            adapter: service.adapter,
        })
    }

    /// Tokens that a text is cut to, if it is; -1 asks for as many as the model takes.
    pub(super) fn cut_at(&self, asked: Option<i32>, found: &mut Findings) -> Option<usize> {
        let most = self.longest_prompt(Purpose::Embed);
        let asked = asked?;
        let tokens = if asked == -1 { most } else { usize::try_from(asked).unwrap_or(0) };
        found.check((1..=most).contains(&tokens), "truncate_prompt_tokens", || {
            format!("{asked} is neither -1, for as many tokens as the model takes, nor in [1, {most}]")
        });
        Some(tokens)
    }

    /// One text or two as a prompt of the model, cut where that was asked for.
    pub(super) fn encode_texts(
        &self,
        first: &str,
        second: Option<&str>,
        most: Option<usize>,
    ) -> Result<Encoded, RequestError> {
        let bytes = first.len() + second.map_or(0, str::len);
        let field = "prompt.text";
        match most {
            None => self.refuse_gigantic(bytes, field, Purpose::Embed)?,
            Some(_) if bytes > MAX_CUT_BYTES => {
                let message = format!("has {bytes} bytes; at most {MAX_CUT_BYTES} are cut to fit");
                return Err(RequestError::invalid(field, message));
            }
            Some(_) => {}
        }
        let encoded = self.text.encode_pair(first, second, most)?;
        self.check_length(field, encoded.ids.len())?;
        let rows = self.heads.texts.num_segments;
        if rows > 0 && encoded.segments.iter().any(|&segment| segment as usize >= rows) {
            let message = format!("the tokenizer gives segments that the model lacks: it has {rows}");
            return Err(RequestError::Internal(message));
        }
        Ok(encoded)
    }

    pub(super) fn check_length(&self, field: &'static str, tokens: usize) -> Result<(), RequestError> {
        match tokens {
            0 => Err(RequestError::invalid(field, "the prompt is empty; give at least one token")),
            _ if tokens > self.longest_prompt(Purpose::Embed) => {
                Err(self.too_long(field, tokens, Purpose::Embed))
            }
            _ => Ok(()),
        }
    }

    fn knows_prompt(&self, name: &str) -> bool {
        name.is_empty() || self.heads.texts.prompts.contains_key(name)
    }

    fn known_prompts(&self) -> String {
        let names: Vec<&str> = self.heads.texts.prompts.keys().map(String::as_str).collect();
        match names[..] {
            [] => "this model has no prompts by name; leave it out".to_owned(),
            _ => format!("is none of this model's prompts: {}", names.join(", ")),
        }
    }

    /// A text as the model was trained to read it, behind the prompt of this name; an empty name is none.
    fn worded(&self, text: String, prompt_name: Option<&str>) -> String {
        let rules = &self.heads.texts;
        let name = prompt_name.or(rules.default_prompt_name.as_deref());
        let prompt = name.and_then(|name| rules.prompts.get(name)).map_or("", String::as_str);
        self.cased(if prompt.is_empty() { text } else { format!("{prompt}{text}") })
    }

    /// A text in lower case, for models that were trained on that.
    pub(super) fn cased(&self, text: String) -> String {
        if self.heads.texts.do_lower_case { text.to_lowercase() } else { text }
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
