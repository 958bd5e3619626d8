//! Requests for embeddings for the wire, and their answers from it.

use tidemill_engine::{
    output::Embedding,
    request::{EmbedRequest, Prompt},
};
use tidemill_proto::v1;

use crate::client::CallError;

/// A request as a message. Its deadline and its trace parent travel in headers.
///
/// # Errors
/// A bug of ours: conversations have no embeddings.
pub fn embed_message(request: EmbedRequest) -> Result<v1::EmbedRequest, CallError> {
    use v1::embed_request::Prompt as Wire;
    let EmbedRequest {
        id,
        prompt,
        model,
        deadline: _,
        priority,
        tenant,
        credential,
        cache_salt,
        trace_parent: _,
        dimensions,
        normalize,
    } = request;
    let prompt = match prompt {
        Prompt::Text(text) => Wire::Text(text),
        Prompt::TokenIds(ids) => {
            Wire::TokenIds(v1::TokenIds { ids: ids.into_iter().map(|id| id.0).collect() })
        }
        Prompt::Chat(_) => return Err(CallError::internal("an embedding of a conversation")),
    };
    Ok(v1::EmbedRequest {
        request_id: id.map(|id| id.as_str().to_owned()).unwrap_or_default(),
        prompt: Some(prompt),
        model: model.unwrap_or_default(),
        priority,
        tenant: tenant.as_str().to_owned(),
        cache_salt,
        dimensions,
        normalize,
        end_client: (*credential).to_owned(),
    })
}

/// An answer in the engine's terms.
pub fn embedding(response: v1::EmbedResponse) -> Embedding {
    Embedding {
        values: response.values,
        prompt_tokens: response.prompt_tokens as usize,
        cached_tokens: response.cached_tokens as usize,
    }
}

#[cfg(test)]
mod tests {
    use tidemill_engine::ids::{RequestId, TenantId, TokenId};

    use super::*;
    use crate::convert;

    #[test]
    fn a_request_and_its_answer_are_the_same_after_the_wire() {
        let id = RequestId::new("e");
        for prompt in [Prompt::Text("é".into()), Prompt::TokenIds(vec![TokenId(7), TokenId(0)])] {
            let request = EmbedRequest {
                id: Some(id.clone()),
                model: Some("m".into()),
                deadline: None,
                priority: -3,
                tenant: TenantId::new("t"),
                credential: "c".into(),
                cache_salt: "s".into(),
                trace_parent: None,
                dimensions: Some(5),
                normalize: Some(false),
                prompt,
            };
            let message = embed_message(request.clone()).unwrap();
            assert_eq!(convert::embed_request(id.clone(), message).unwrap(), request);
        }
        let answer = Embedding { values: vec![0.5, -1.0], prompt_tokens: 3, cached_tokens: 2 };
        assert_eq!(embedding(convert::embed_response(&id, answer.clone())), answer);
    }
}
