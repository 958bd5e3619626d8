//! Requests for scores of pairs: through the same door, to the same queue.

use std::{sync::Arc, time::Instant};

use super::{
    Findings, Prompt, Purpose, ValidatedRequest, Validator,
    embed::{Service, cut},
};
use crate::{
    error::RequestError,
    ids::{RequestId, TenantId, TokenId},
    info::PairFormat,
    text::{Encoded, MAX_CUT_BYTES},
};

/// What is to be scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ScoreInput {
    /// A query and a document, which become one prompt by the model's [`PairFormat`].
    Pair {
        /// What is asked.
        query: String,
        /// What may answer it.
        document: String,
    },
    /// The whole prompt, used as it is.
    TokenIds {
        /// Its tokens.
        ids: Vec<TokenId>,
        /// Segment of each; empty: all are 0.
        segments: Vec<u32>,
    },
}

/// A request for the score of one pair, as a front end received it.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoreRequest {
    /// The client's name for it; made here when absent.
    pub id: Option<RequestId>,
    /// What to score.
    pub input: ScoreInput,
    /// What makes a document right for a query, for models that are told ([`PairFormat::YesNo`]); absent: its own.
    pub instruction: Option<String>,
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
    /// Leaves the ends of texts out where the prompt has more tokens; -1: than the model takes. Absent: what is too long is refused.
    pub truncate_prompt_tokens: Option<i32>,
    /// Whether the model's function (the logistic one, mostly) is applied to what its head gives; absent: yes.
    pub use_activation: Option<bool>,
}

impl ScoreRequest {
    /// A request with neither options nor a deadline.
    pub fn new(input: ScoreInput) -> Self {
        Self {
            id: None,
            input,
            instruction: None,
            model: None,
            deadline: None,
            priority: 0,
            tenant: TenantId::default(),
            credential: "".into(),
            cache_salt: String::new(),
            trace_parent: None,
            truncate_prompt_tokens: None,
            use_activation: None,
        }
    }
}

/// A request for a score that passed [`Validator::validate_score`]. Cannot be built in any other way.
#[derive(Debug)]
pub struct ValidatedScore {
    pub(crate) request: ValidatedRequest,
    pub(crate) use_activation: bool,
}

impl ValidatedScore {
    /// The request's id, the client's or ours.
    pub fn id(&self) -> &RequestId {
        self.request.id()
    }

    /// The prompt as token ids.
    pub fn prompt(&self) -> &[TokenId] {
        self.request.prompt()
    }
}

/// The instruction of a pair whose request has none: that of the Qwen3 rerankers' model card.
pub const DEFAULT_INSTRUCTION: &str =
    "Given a web search query, retrieve relevant passages that answer the query";
/// Longest instruction in bytes.
const MAX_INSTRUCTION_BYTES: usize = 4 << 10;
/// What stands before a question, in the format that the Qwen3 rerankers were trained with (ibid.).
const BEFORE: &str = "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. \
                      Note that the answer can only be \"yes\" or \"no\".<|im_end|>\n<|im_start|>user\n";
/// What stands behind it.
const BEHIND: &str = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";

impl Validator {
    /// Encodes the pair and checks everything, as [`validate`](Self::validate) does.
    ///
    /// # Errors
    /// As [`validate`](Self::validate); [`RequestError::Unsupported`] where the model scores no pairs.
    pub fn validate_score(&self, request: ScoreRequest) -> Result<ValidatedScore, RequestError> {
        let adapter = self.check_model(request.model.as_deref())?;
        let Some(scoring) = self.scoring else { return Err(self.scores_nothing()) };
        let mut found = Findings::default();
        self.check_id(request.id.as_ref(), &mut found);
        self.check_service(request.priority, &request.tenant, &request.cache_salt, &mut found);
        let instruction = request.instruction.as_deref();
        found.check(
            instruction.is_none_or(|text| text.len() <= MAX_INSTRUCTION_BYTES),
            "instruction",
            || format!("longer than {MAX_INSTRUCTION_BYTES} bytes"),
        );
        found.check(instruction.is_none() || scoring.format == PairFormat::YesNo, "instruction", || {
            "this model reads a query and a document, and no instruction; leave it out".into()
        });
        let most = self.cut_at(request.truncate_prompt_tokens, &mut found);
        found.into_result()?;
        let prompt = match (request.input, scoring.format) {
            (ScoreInput::Pair { query, document }, format) => {
                not_empty("query", &query)?;
                not_empty("document", &document)?;
                let (query, document) = (self.cased(query), self.cased(document));
                match format {
                    PairFormat::Pair => self.encode_texts(&query, Some(&document), most)?,
                    PairFormat::YesNo => {
                        let instruction = instruction.unwrap_or(DEFAULT_INSTRUCTION);
                        let question =
                            format!("<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}");
                        self.encode_question(&question, most)?
                    }
                }
            }
            (ScoreInput::TokenIds { ids, segments }, _) => self.given(ids, segments, most)?,
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
        let use_activation = request.use_activation.unwrap_or(true);
        Ok(ValidatedScore { request: self.pooled(service, prompt)?, use_activation })
    }

    fn scores_nothing(&self) -> RequestError {
        let does = match self.embedding.is_only_output {
            true => "gives embeddings (/v1/embeddings, Inference.Embed)",
            false => {
                "generates (/v1/chat/completions, Inference.Generate) and gives embeddings (/v1/embeddings, Inference.Embed)"
            }
        };
        let message = format!(
            "this model scores no pairs of texts: it {does}; a reranker that answers with yes or no is started with \
             --classifier-from-token no,yes"
        );
        RequestError::Unsupported(message)
    }

    /// A question between what stands around it, each encoded by itself, as the models were trained; the question alone is cut.
    fn encode_question(&self, question: &str, most: Option<usize>) -> Result<Encoded, RequestError> {
        let field = "prompt.text";
        match most {
            None => self.refuse_gigantic(question.len(), field, Purpose::Embed)?,
            Some(_) if question.len() > MAX_CUT_BYTES => {
                let message = format!("has {} bytes; at most {MAX_CUT_BYTES} are cut to fit", question.len());
                return Err(RequestError::invalid(field, message));
            }
            Some(_) => {}
        }
        let (mut ids, behind) = (self.text.encode(BEFORE, false)?, self.text.encode(BEHIND, false)?);
        let mut question = self.text.encode(question, false)?;
        if let Some(most) = most {
            question.truncate(most.saturating_sub(ids.len() + behind.len()));
        }
        ids.extend(question);
        ids.extend(behind);
        self.check_length(field, ids.len())?;
        Ok(Encoded { ids, segments: Vec::new() })
    }

    /// A prompt that was given as token ids.
    fn given(
        &self,
        ids: Vec<TokenId>,
        segments: Vec<u32>,
        most: Option<usize>,
    ) -> Result<Encoded, RequestError> {
        if !segments.is_empty() && segments.len() != ids.len() {
            let message = format!("there are {} for {} token ids", segments.len(), ids.len());
            return Err(RequestError::invalid("segments", message));
        }
        let rows = self.heads.texts.num_segments.max(1);
        if let Some(segment) = segments.iter().find(|&&segment| segment as usize >= rows) {
            let message = format!("{segment} is not below {rows}, the segments of this model");
            return Err(RequestError::invalid("segments", message));
        }
        let ids = self.encode(cut(Prompt::TokenIds(ids), most), Purpose::Embed)?;
        let segments = segments.into_iter().take(ids.len()).collect();
        Ok(Encoded { ids, segments })
    }
}

fn not_empty(field: &'static str, text: &str) -> Result<(), RequestError> {
    if text.is_empty() { Err(RequestError::invalid(field, "is empty; give a text")) } else { Ok(()) }
}
