//! Requests for scores from the wire, and their answers.

use tidemill_engine::{
    RequestError,
    ids::{RequestId, TenantId},
    output::Score,
    request::{ScoreInput, ScoreRequest},
};
use tidemill_proto::v1;

use super::request::{end_client, token_ids};

/// A request of the wire in the engine's terms, under the id that it has or was given.
///
/// # Errors
/// When there is nothing to score.
pub fn score_request(id: RequestId, request: v1::ScoreRequest) -> Result<ScoreRequest, RequestError> {
    use v1::score_request::{Input, Pair, Tokens};
    let input = match request.input {
        Some(Input::Pair(Pair { query, document })) => ScoreInput::Pair { query, document },
        Some(Input::Tokens(Tokens { ids, segments })) => {
            ScoreInput::TokenIds { ids: token_ids(ids), segments }
        }
        None => return Err(RequestError::invalid("input", "is absent; set pair or tokens")),
    };
    Ok(ScoreRequest {
        id: Some(id),
        instruction: request.instruction,
        model: Some(request.model).filter(|model| !model.is_empty()),
        priority: request.priority,
        tenant: TenantId::new(request.tenant),
        credential: end_client(request.end_client)?,
        cache_salt: request.cache_salt,
        truncate_prompt_tokens: request.truncate_prompt_tokens,
        use_activation: request.use_activation,
        ..ScoreRequest::new(input)
    })
}

/// A score as the answer to its request.
pub fn score_response(id: &RequestId, score: Score) -> v1::ScoreResponse {
    v1::ScoreResponse {
        request_id: id.as_str().to_owned(),
        score: score.value,
        prompt_tokens: score.prompt_tokens as u32,
        cached_tokens: score.cached_tokens as u32,
    }
}
