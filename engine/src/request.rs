//! Requests: what a client asks ([`GenerateRequest`]) and what the engine accepts ([`ValidatedRequest`]).
//!
//! [`Validator::validate`] is the one door: nothing else builds a [`ValidatedRequest`], and only that can be submitted, so every
//! front end gives the same verdict.

mod embed;
mod prompt;
mod score;
mod words;

use std::{sync::Arc, time::Instant};

pub(crate) use embed::EmbeddingShape;
pub use embed::{EmbedRequest, ValidatedEmbed};
use prompt::Purpose;
pub use score::{ScoreInput, ScoreRequest, ValidatedScore};

use crate::{
    adapter::Adapter,
    adapters::Adapters,
    constraint::Constraint,
    error::{RequestError, Violation},
    heads::Heads,
    ids::{RequestId, TenantId, TokenId},
    info::{EmbeddingInfo, ScoringInfo},
    model::generation_config::GenerationDefaults,
    pooling::Pooling,
    sampling::{Sampling, SamplingParams},
    scheduler::Policy,
    structured::{Structured, Thinking},
    text::{
        TextModel,
        chat::ChatPrompt,
        grammar::{Form, FormRequest, Forms},
    },
};

/// What is to be completed.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Plain text, encoded with the model's tokenizer and its special tokens.
    Text(String),
    /// Token ids, used as they are.
    TokenIds(Vec<TokenId>),
    /// A conversation, rendered with the model's chat template.
    Chat(ChatPrompt),
}

/// A request as a front end received it.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateRequest {
    /// The client's name for it; made here when absent.
    pub id: Option<RequestId>,
    /// What to complete.
    pub prompt: Prompt,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// The form that the completion must have.
    pub structured: Option<Structured>,
    /// How the model marks its thoughts, where that matters: for a budget of them, or for a form of what follows.
    pub thinking: Option<Thinking>,
    /// Do not detokenise; incompatible with stop strings.
    pub token_ids_only: bool,
    /// Let special tokens stand in the text.
    pub include_special_tokens: bool,
    /// The model the client means, or one of its adapters, if it said.
    pub model: Option<String>,
    /// When the client stops waiting.
    pub deadline: Option<Instant>,
    /// Under the policy `priority`: lower is served first. Under others it must be 0.
    pub priority: i32,
    /// Under the policy `fair`: who shares the engine with whom. Under others it is shown in explanations and changes nothing.
    pub tenant: TenantId,
    /// What the client authenticated with, in whatever form; empty for nothing. Requests share cached prefixes only with others of the
    /// same credential.
    pub credential: Arc<str>,
    /// Narrows that further: only requests of the same salt share cached prefixes.
    pub cache_salt: String,
    /// What the caller calls the larger undertaking that this is a part of. Means nothing here: it is handed back with the request's
    /// [`EndedLife`](crate::explain::EndedLife).
    pub trace_parent: Option<Arc<str>>,
}

impl GenerateRequest {
    /// A request with neither options nor a deadline.
    pub fn new(prompt: Prompt) -> Self {
        Self {
            id: None,
            prompt,
            sampling: SamplingParams::default(),
            structured: None,
            thinking: None,
            token_ids_only: false,
            include_special_tokens: false,
            model: None,
            deadline: None,
            priority: 0,
            tenant: TenantId::default(),
            credential: "".into(),
            cache_salt: String::new(),
            trace_parent: None,
        }
    }
}

/// A request that passed [`Validator::validate`]. Cannot be built in any other way.
#[derive(Debug)]
pub struct ValidatedRequest {
    pub(crate) id: RequestId,
    pub(crate) prompt: Arc<[TokenId]>,
    pub(crate) sampling: Arc<Sampling>,
    /// The request is for an embedding; nothing is sampled.
    pub(crate) pooling: Option<Pooling>,
    /// All of the prompt is computed in one step.
    pub(crate) is_whole: bool,
    /// Segment of each token of the prompt; none: all are 0.
    pub(crate) segments: Option<Arc<[u32]>>,
    pub(crate) stop: Vec<String>,
    pub(crate) n: u32,
    pub(crate) text_output: bool,
    pub(crate) include_special_tokens: bool,
    pub(crate) deadline: Option<Instant>,
    pub(crate) priority: i32,
    pub(crate) tenant: TenantId,
    pub(crate) credential: Arc<str>,
    pub(crate) cache_salt: String,
    pub(crate) trace_parent: Option<Arc<str>>,
    /// One for each completion, or none.
    pub(crate) constraints: Vec<Box<dyn Constraint>>,
    pub(crate) opens_thinking: bool,
    pub(crate) adapter: Option<Adapter>,
}

impl ValidatedRequest {
    /// The request's id, the client's or ours.
    pub fn id(&self) -> &RequestId {
        &self.id
    }

    /// The prompt as token ids.
    pub fn prompt(&self) -> &[TokenId] {
        &self.prompt
    }

    /// Sampling with defaults filled in.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Whether the completions begin within thoughts, because the prompt ends with their mark: the text that comes does not have it.
    pub fn opens_thinking(&self) -> bool {
        self.opens_thinking
    }
}

/// Documented bounds of a request.
pub mod limits {
    use std::time::Duration;

    /// Completions of one prompt.
    pub const MAX_N: u32 = 8;
    /// Stop strings.
    pub const MAX_STOP: usize = 16;
    /// Bytes of one stop string.
    pub const MAX_STOP_BYTES: usize = 256;
    /// Stop token ids.
    pub const MAX_STOP_TOKEN_IDS: usize = 64;
    /// Most likely tokens reported per position.
    pub const MAX_LOGPROBS: u32 = 20;
    /// Entries of `logit_bias`.
    pub const MAX_LOGIT_BIAS: usize = 1024;
    /// `max_tokens` where neither the client nor the model gives one.
    pub const DEFAULT_MAX_TOKENS: usize = 1024;
    /// Bytes of `cache_salt`.
    pub const MAX_CACHE_SALT_BYTES: usize = 256;
    /// Bytes of what says the form of an answer: a schema, an expression, a grammar, all texts of a choice.
    pub const MAX_STRUCTURED_BYTES: usize = 256 << 10;
    /// What compiling that may take.
    pub const STRUCTURED_COMPILE_TIME: Duration = Duration::from_secs(5);
    /// Bytes of a mark that begins or ends thoughts.
    pub const MAX_THINKING_MARK_BYTES: usize = 64;
}

/// The one door: checks a request against the model and the engine's limits.
#[derive(Debug)]
pub struct Validator {
    pub(crate) text: Arc<TextModel>,
    pub(crate) defaults: GenerationDefaults,
    pub(crate) served_model_name: String,
    pub(crate) vocab_size: usize,
    pub(crate) max_model_len: usize,
    /// Tokens that the KV pool holds in all.
    pub(crate) kv_capacity_tokens: usize,
    pub(crate) eos_token_ids: Vec<TokenId>,
    pub(crate) policy: Policy,
    pub(crate) embedding: EmbeddingInfo,
    pub(crate) scoring: Option<ScoringInfo>,
    pub(crate) is_bidirectional: bool,
    pub(crate) heads: Arc<Heads>,
    pub(crate) forms: Forms,
    pub(crate) adapters: Arc<Adapters>,
}

/// Collects everything that is wrong, so that a client learns it in one answer.
#[derive(Default)]
struct Findings(Vec<Violation>);

impl Findings {
    fn check(&mut self, ok: bool, field: &'static str, message: impl FnOnce() -> String) {
        if !ok {
            self.0.push(Violation { field, message: message() });
        }
    }

    fn into_result(self) -> Result<(), RequestError> {
        if self.0.is_empty() { Ok(()) } else { Err(RequestError::Invalid(self.0)) }
    }

    fn range(&mut self, value: f32, field: &'static str, low: f32, high: f32) {
        self.check((low..=high).contains(&value), field, || format!("{value} is not in [{low}, {high}]"));
    }
}

impl Validator {
    /// Fills in defaults, encodes the prompt and checks everything.
    ///
    /// Encoding a long prompt takes time: call this off any thread that must stay responsive.
    ///
    /// # Errors
    /// [`RequestError::Invalid`] with every violation found; [`RequestError::ModelNotFound`];
    /// [`RequestError::Unsupported`] for a chat prompt without a template, and where the model generates nothing.
    pub fn validate(&self, request: GenerateRequest) -> Result<ValidatedRequest, RequestError> {
        let adapter = self.check_model(request.model.as_deref())?;
        if self.embedding.is_only_output {
            let what = if self.scores_only() { "scores pairs of texts" } else { "gives embeddings" };
            let message = format!("this model has no output layer: it {what} and generates nothing");
            return Err(RequestError::Unsupported(message));
        }
        let mut found = Findings::default();
        self.check_id(request.id.as_ref(), &mut found);
        self.check_stops(&request, &mut found);
        self.check_service(request.priority, &request.tenant, &request.cache_salt, &mut found);
        found.check(
            request.structured.is_none() || !request.sampling.ignore_eos,
            "sampling.ignore_eos",
            || {
                "an answer of a given form ends where the form does; leave ignore_eos or structured out"
                    .into()
            },
        );
        self.check_text(&request)?;
        let sampling = self.sampling_without_lengths(&request.sampling, &mut found);
        let n = request.sampling.n.unwrap_or(1);
        found.check((1..=limits::MAX_N).contains(&n), "sampling.n", || {
            format!("{n} is not in [1, {}]", limits::MAX_N)
        });
        // A prompt is encoded only for a request that is otherwise sound: encoding is the expensive part.
        found.into_result()?;
        let prompt = self.encode(request.prompt, Purpose::Generate)?;
        let sampling = self.with_lengths(sampling, &request.sampling, prompt.len())?;
        let form = self.forms.compile(FormRequest {
            structured: request.structured.as_ref(),
            thinking: request.thinking.as_ref(),
            prompt: &prompt,
            // Log-probabilities are of tokens that the model was asked for.
            jump_ahead: sampling.logprobs.is_none(),
        })?;
        let id = request.id.filter(|id| !id.as_str().is_empty());
        Ok(ValidatedRequest {
            id: id.unwrap_or_else(RequestId::random),
            prompt: prompt.into(),
            sampling: Arc::new(sampling),
            pooling: None,
            is_whole: false,
            segments: None,
            stop: request.sampling.stop,
            n,
            text_output: !request.token_ids_only && self.text.tokenizer_kind().is_some(),
            include_special_tokens: request.include_special_tokens,
            deadline: request.deadline,
            priority: request.priority,
            tenant: request.tenant,
            credential: request.credential,
            cache_salt: request.cache_salt,
            trace_parent: request.trace_parent,
            opens_thinking: form.opens_thinking,
            adapter,
            constraints: each(form, n),
        })
    }

    fn check_id(&self, id: Option<&RequestId>, found: &mut Findings) {
        let Some(id) = id else { return };
        found.check(id.as_str().len() <= RequestId::MAX_BYTES, "request_id", || {
            format!("longer than {} bytes", RequestId::MAX_BYTES)
        });
        found.check(!id.as_str().chars().any(char::is_control), "request_id", || {
            "holds control characters".into()
        });
    }

    /// The adapter that a request names in place of the model, if it names one.
    fn check_model(&self, asked: Option<&str>) -> Result<Option<Adapter>, RequestError> {
        let Some(asked) = asked.filter(|asked| !asked.is_empty() && *asked != self.served_model_name) else {
            return Ok(None);
        };
        let adapter = self.adapters.find(asked);
        let served = || self.served_model_name.clone();
        adapter
            .map(Some)
            .ok_or_else(|| RequestError::ModelNotFound { asked: asked.to_owned(), served: served() })
    }

    /// What says who is served when, and with whom prefixes are shared.
    fn check_service(&self, priority: i32, tenant: &TenantId, cache_salt: &str, found: &mut Findings) {
        found.check(tenant.as_str().len() <= TenantId::MAX_BYTES, "tenant", || {
            format!("longer than {} bytes", TenantId::MAX_BYTES)
        });
        found.check(cache_salt.len() <= limits::MAX_CACHE_SALT_BYTES, "cache_salt", || {
            format!("longer than {} bytes", limits::MAX_CACHE_SALT_BYTES)
        });
        found.check(priority == 0 || self.policy == Policy::Priority, "priority", || {
            "counts only where the server runs with --scheduling-policy priority; leave it 0 here".into()
        });
    }

    /// Everything of [`Sampling`] that does not depend on the prompt's length.
    fn sampling_without_lengths(&self, asked: &SamplingParams, found: &mut Findings) -> Sampling {
        let defaults = &self.defaults;
        let ids = &asked.stop_token_ids;
        found.check(ids.len() <= limits::MAX_STOP_TOKEN_IDS, "sampling.stop_token_ids", || {
            format!("{} ids; at most {}", ids.len(), limits::MAX_STOP_TOKEN_IDS)
        });
        self.check_ids(ids.iter().copied(), "sampling.stop_token_ids", found);
        let bias = &asked.logit_bias;
        found.check(bias.len() <= limits::MAX_LOGIT_BIAS, "sampling.logit_bias", || {
            format!("{} entries; at most {}", bias.len(), limits::MAX_LOGIT_BIAS)
        });
        self.check_ids(bias.iter().map(|b| b.0), "sampling.logit_bias", found);
        bias.iter().for_each(|&(_, value)| found.range(value, "sampling.logit_bias", -100.0, 100.0));
        for (field, value) in
            [("sampling.logprobs", asked.logprobs), ("sampling.prompt_logprobs", asked.prompt_logprobs)]
        {
            found.check(value.is_none_or(|v| v <= limits::MAX_LOGPROBS), field, || {
                format!("{} is over {}", value.unwrap_or(0), limits::MAX_LOGPROBS)
            });
        }
        let sampling = Sampling {
            temperature: asked.temperature.or(defaults.temperature).unwrap_or(1.0),
            top_k: asked.top_k.or(defaults.top_k).unwrap_or(0),
            top_p: asked.top_p.or(defaults.top_p).unwrap_or(1.0),
            min_p: asked.min_p.or(defaults.min_p).unwrap_or(0.0),
            repetition_penalty: asked.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
            presence_penalty: asked.presence_penalty.unwrap_or(0.0),
            frequency_penalty: asked.frequency_penalty.unwrap_or(0.0),
            logit_bias: bias.clone(),
            seed: asked.seed.unwrap_or_else(rand::random),
            max_tokens: 0,
            min_tokens: 0,
            stop_token_ids: ids.clone(),
            eos_token_ids: if asked.ignore_eos { Vec::new() } else { self.eos_token_ids.clone() },
            logprobs: asked.logprobs,
            prompt_logprobs: asked.prompt_logprobs,
        };
        // Defaults were checked when the model was loaded, so what fails here is the client's.
        found.range(sampling.temperature, "sampling.temperature", 0.0, 100.0);
        found.check(sampling.top_p > 0.0 && sampling.top_p <= 1.0, "sampling.top_p", || {
            format!("{} is not in (0, 1]", sampling.top_p)
        });
        found.range(sampling.min_p, "sampling.min_p", 0.0, 1.0);
        let repetition = sampling.repetition_penalty;
        found.check(repetition > 0.0 && repetition <= 100.0, "sampling.repetition_penalty", || {
            format!("{repetition} is not in (0, 100]")
        });
        found.range(sampling.presence_penalty, "sampling.presence_penalty", -2.0, 2.0);
        found.range(sampling.frequency_penalty, "sampling.frequency_penalty", -2.0, 2.0);
        sampling
    }

    fn check_ids(&self, mut ids: impl Iterator<Item = TokenId>, field: &'static str, found: &mut Findings) {
        let bad = ids.find(|id| id.0 as usize >= self.vocab_size);
        found.check(bad.is_none(), field, || self.outside_vocabulary(bad));
    }

    fn with_lengths(
        &self,
        sampling: Sampling,
        asked: &SamplingParams,
        prompt_len: usize,
    ) -> Result<Sampling, RequestError> {
        let mut found = Findings::default();
        let room = self.max_model_len - prompt_len;
        let max_tokens = match asked.max_tokens {
            Some(max) => {
                let max = max as usize;
                found.check(max >= 1, "sampling.max_tokens", || "must be at least 1".into());
                found.check(max <= room, "sampling.max_tokens", || {
                    format!(
                        "{max} is over the {room} tokens that a prompt of {prompt_len} leaves of max_model_len {}",
                        self.max_model_len
                    )
                });
                max
            }
            None => {
                self.defaults.max_new_tokens.map_or(limits::DEFAULT_MAX_TOKENS, |max| max as usize).min(room)
            }
        };
        let min_tokens = asked.min_tokens.unwrap_or(0) as usize;
        found.check(min_tokens <= max_tokens, "sampling.min_tokens", || {
            format!("{min_tokens} is over max_tokens, {max_tokens}")
        });
        // The last token is never written to the cache: nothing comes after it.
        let kv_tokens = prompt_len + max_tokens - usize::from(max_tokens > 0);
        found.check(kv_tokens <= self.kv_capacity_tokens, "sampling.max_tokens", || {
            format!(
                "prompt and completion need {kv_tokens} tokens of KV cache, but the whole cache holds {}; \
                 lower max_tokens or start the server with a larger --kv-cache-memory",
                self.kv_capacity_tokens
            )
        });
        if found.0.is_empty() {
            Ok(Sampling { max_tokens, min_tokens, ..sampling })
        } else {
            Err(RequestError::Invalid(found.0))
        }
    }
}

/// A form's constraint for each of `n` completions.
fn each(form: Form, n: u32) -> Vec<Box<dyn Constraint>> {
    let forks = |constraint: Box<dyn Constraint>| {
        let more: Vec<_> = (1..n).map(|_| constraint.fork()).collect();
        std::iter::once(constraint).chain(more)
    };
    form.constraint.into_iter().flat_map(forks).collect()
}
