//! Requests for embeddings from the wire, and their answers.

use tidemill_engine::{
    RequestError,
    ids::{RequestId, TenantId},
    output::Embedding,
    request::{EmbedRequest, Prompt},
};
use tidemill_proto::v1;

use super::request::{end_client, token_ids};

/// A request of the wire in the engine's terms, under the id that it has or was given.
///
/// # Errors
/// When there is no prompt.
pub fn embed_request(id: RequestId, request: v1::EmbedRequest) -> Result<EmbedRequest, RequestError> {
    use v1::embed_request::Prompt as Wire;
    let prompt = match request.prompt {
        Some(Wire::Text(text)) => Prompt::Text(text),
        Some(Wire::TokenIds(ids)) => Prompt::TokenIds(token_ids(ids.ids)),
        None => return Err(RequestError::invalid("prompt", "is absent; set text or token_ids")),
    };
    Ok(EmbedRequest {
        id: Some(id),
        model: Some(request.model).filter(|model| !model.is_empty()),
        priority: request.priority,
        tenant: TenantId::new(request.tenant),
        credential: end_client(request.end_client)?,
        cache_salt: request.cache_salt,
        dimensions: request.dimensions,
        normalize: request.normalize,
        prompt_name: request.prompt_name,
        truncate_prompt_tokens: request.truncate_prompt_tokens,
        ..EmbedRequest::new(prompt)
    })
}

/// An embedding as the answer to its request.
pub fn embed_response(id: &RequestId, embedding: Embedding) -> v1::EmbedResponse {
    v1::EmbedResponse {
        request_id: id.as_str().to_owned(),
        values: embedding.values,
        prompt_tokens: embedding.prompt_tokens as u32,
        cached_tokens: embedding.cached_tokens as u32,
    }
}
