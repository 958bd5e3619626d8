//! A gateway's requests for embeddings, and their answers.

use tidemill_engine::{
    RequestError,
    ids::RequestId,
    output::Embedding,
    request::{EmbedRequest, Prompt},
};
use tidemill_proto::vllm::grpc::engine as vllm;

use crate::convert::token_ids;

/// A request in the engine's terms, under the id that it has or was given; the embedding is as the model folder says.
///
/// # Errors
/// When there is no prompt.
pub fn embed_request(id: RequestId, request: vllm::EmbedRequest) -> Result<EmbedRequest, RequestError> {
    let Some(tokenized) = request.tokenized else {
        return Err(RequestError::invalid("tokenized", "is absent; set the prompt's token ids"));
    };
    let prompt = Prompt::TokenIds(token_ids(tokenized.input_ids));
    Ok(EmbedRequest { id: Some(id), ..EmbedRequest::new(prompt) })
}

/// An embedding as the answer to its request.
pub fn embed_response(embedding: Embedding) -> vllm::EmbedResponse {
    vllm::EmbedResponse {
        prompt_tokens: embedding.prompt_tokens as u32,
        embedding_dim: embedding.values.len() as u32,
        embedding: embedding.values,
    }
}
