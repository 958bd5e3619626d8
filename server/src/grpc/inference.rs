//! `tidemill.v1.Inference`.

use tidemill_engine::{EngineHandle, RequestError, ids::RequestId, text::TextModel};
use tidemill_proto::v1::{self, inference_server::Inference};
use tonic::{Request, Response, Status};

use super::{
    call::Call,
    door::{Door, Origin, request_id},
    stream::{Answer, ResponseStream},
    vocabulary,
};
use crate::{
    convert::{self, ResponseWriter},
    http::answer::Parsers,
};

/// How many tokens a prompt has, in the headers of its response: known before its first output.
pub const PROMPT_TOKENS: &str = "x-prompt-tokens";
/// Whether it ends within the model's thoughts: 1 or 0.
pub const OPENS_THINKING: &str = "x-opens-thinking";

/// Turns prompts into tokens, embeddings or scores.
#[derive(Debug)]
pub struct InferenceService {
    door: Door,
    /// How answers are to be read, for those who ask what is loaded.
    parsers: Parsers,
}

impl InferenceService {
    /// A service over the server's engine.
    pub fn new(door: Door, parsers: Parsers) -> Self {
        Self { door, parsers }
    }
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = ResponseStream<v1::GenerateResponse>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let origin = Origin::of(&request);
        let request = request.into_inner();
        let id = request_id(&request.request_id);
        let mut call = Call::start("Generate", id.clone());
        let named = id.clone();
        let read = move || convert::generate_request(named, request);
        match self.door.admit(&id, origin, read).await {
            Ok(admitted) => {
                call.prompt_tokens(admitted.prompt_tokens);
                let mut response = call.respond(());
                let metadata = response.metadata_mut();
                metadata.insert(PROMPT_TOKENS, admitted.prompt_tokens.into());
                metadata.insert(OPENS_THINKING, u32::from(admitted.opens_thinking).into());
                let writer = ResponseWriter::new(id, admitted.prompt_logprobs);
                let answer = Answer::new(admitted.generation, writer, call);
                Ok(response.map(|()| answer.into_stream()))
            }
            Err(status) => Err(call.fail(status)),
        }
    }

    async fn embed(&self, request: Request<v1::EmbedRequest>) -> Result<Response<v1::EmbedResponse>, Status> {
        let origin = Origin::of(&request);
        let request = request.into_inner();
        let id = request_id(&request.request_id);
        let mut call = Call::start("Embed", id.clone());
        let named = id.clone();
        let read = move || convert::embed_request(named, request);
        let embedding = self.door.embed(&mut call, origin, read).await;
        let response = embedding.map(|embedding| convert::embed_response(&id, embedding));
        call.end(response)
    }

    async fn score(&self, request: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        let origin = Origin::of(&request);
        let request = request.into_inner();
        let id = request_id(&request.request_id);
        let mut call = Call::start("Score", id.clone());
        let named = id.clone();
        let read = move || convert::score_request(named, request);
        let score = self.door.score(&mut call, origin, read).await;
        let response = score.map(|score| convert::score_response(&id, score));
        call.end(response)
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let call = Call::start("Tokenize", RequestId::random());
        let request = request.into_inner();
        let result = self.door.with_text(&call, |text, engine| tokenize(text, engine, request)).await;
        call.end(result)
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let call = Call::start("Detokenize", RequestId::random());
        let request = request.into_inner();
        let result = self.door.with_text(&call, |text, _| detokenize(text, request)).await;
        call.end(result)
    }

    async fn get_model(
        &self,
        _: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        let call = Call::start("GetModel", RequestId::random());
        let model = self.door.engine().map(|engine| {
            let formats = self.parsers.resolve(engine.text().chat_template_source());
            let model = convert::model_response(engine.info(), engine.text(), formats);
            v1::GetModelResponse { adapters: convert::adapter_messages(engine.adapters().list()), ..model }
        });
        call.end(model)
    }

    type GetVocabularyStream = ResponseStream<v1::GetVocabularyResponse>;

    async fn get_vocabulary(
        &self,
        _: Request<v1::GetVocabularyRequest>,
    ) -> Result<Response<Self::GetVocabularyStream>, Status> {
        let call = Call::start("GetVocabulary", RequestId::random());
        let chunks = self.door.engine().map(|engine| vocabulary::chunks(engine.text().clone()));
        call.end(chunks)
    }
}

/// Longest text in bytes that `Tokenize` encodes: some seconds of work.
const MAX_TOKENIZE_BYTES: usize = 4 << 20;

/// Most tokens that `Detokenize` decodes: a text of some megabytes.
const MAX_DETOKENIZE_IDS: usize = 1 << 20;

fn detokenize(
    text: &TextModel,
    request: v1::DetokenizeRequest,
) -> Result<v1::DetokenizeResponse, RequestError> {
    let count = request.token_ids.len();
    if count > MAX_DETOKENIZE_IDS {
        let message = format!("has {count} ids; at most {MAX_DETOKENIZE_IDS} are decoded");
        return Err(RequestError::invalid("token_ids", message));
    }
    let ids = convert::token_ids(request.token_ids);
    Ok(v1::DetokenizeResponse { text: text.decode(&ids, request.include_special_tokens)? })
}

fn tokenize(
    text: &TextModel,
    engine: &EngineHandle,
    request: v1::TokenizeRequest,
) -> Result<v1::TokenizeResponse, RequestError> {
    use v1::tokenize_request::Input;
    let (field, content, add_special) = match request.input {
        Some(Input::Text(content)) => ("text", content, request.add_special_tokens.unwrap_or(true)),
        // The template writes special tokens itself.
        Some(Input::Chat(chat)) => ("chat", text.render_chat(&convert::chat_prompt(chat, "chat")?)?, false),
        None => return Err(RequestError::invalid("input", "is absent; set text or chat")),
    };
    if content.len() > MAX_TOKENIZE_BYTES {
        let message = format!("has {} bytes; at most {MAX_TOKENIZE_BYTES} are encoded", content.len());
        return Err(RequestError::invalid(field, message));
    }
    let ids = text.encode(&content, add_special)?;
    Ok(v1::TokenizeResponse {
        token_ids: ids.into_iter().map(|id| id.0).collect(),
        text: content,
        max_model_len: engine.info().max_model_len as u32,
    })
}
