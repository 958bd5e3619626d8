//! A model's text side: tokenizer, decoder and chat template, loaded once and shared.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::{
    error::{LoadError, RequestError},
    ids::TokenId,
    model::{
        files::{ModelFiles, TOKENIZER},
        spec::ModelSpec,
    },
    text::{
        bound::max_bytes_per_token,
        chat::{ChatPrompt, ChatTemplates},
        detokenize::Detokenizer,
        guard::caught,
        vocab::{Pipeline, TokenTable},
    },
};

/// Text to token ids and back. Cloning is cheap: clones share everything.
#[derive(Debug, Clone)]
pub struct TextModel {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    files: ModelFiles,
    tokenizer: Tokenizer,
    table: Arc<TokenTable>,
    chat: Option<ChatTemplates>,
    max_bytes_per_token: Option<usize>,
}

/// The parts of a `tokenizer.json` that we read ourselves; the rest is the tokenizers crate's.
#[derive(Debug, Deserialize)]
pub(super) struct TokenizerFile {
    pub(super) normalizer: Option<Value>,
    pub(super) pre_tokenizer: Option<Value>,
    decoder: Option<Value>,
    #[serde(default)]
    pub(super) added_tokens: Vec<AddedTokenEntry>,
    pub(super) model: ModelHead,
}

#[derive(Debug, Deserialize)]
pub(super) struct AddedTokenEntry {
    id: u32,
    content: String,
    #[serde(default)]
    pub(super) lstrip: bool,
    #[serde(default)]
    pub(super) rstrip: bool,
}

#[derive(Debug, Deserialize)]
pub(super) struct ModelHead {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    #[serde(default)]
    pub(super) byte_fallback: bool,
    pub(super) continuing_subword_prefix: Option<String>,
    pub(super) end_of_word_suffix: Option<String>,
}

impl TextModel {
    /// Loads `tokenizer.json` and the chat template.
    ///
    /// # Errors
    /// [`LoadError`] for a file that is missing or broken, a tokenizer with ids that the model does not have, a decoder
    /// that cannot be streamed exactly, a template that does not compile.
    pub fn load(files: &ModelFiles, spec: &ModelSpec) -> Result<Self, LoadError> {
        let path = files.path(TOKENIZER);
        let bytes = files.require(TOKENIZER)?;
        let format = |detail: String| LoadError::Format { path: path.clone(), detail };
        let file: TokenizerFile =
            serde_json::from_slice(&bytes).map_err(|error| format(format!("not a tokenizer: {error}")))?;
        let tokenizer = build_tokenizer(&bytes).map_err(&format)?;
        check_ids(&file, &tokenizer, spec.vocab_size).map_err(&format)?;
        let pipeline = Pipeline::new(file.decoder.as_ref())
            .map_err(|detail| LoadError::Unsupported { path: path.clone(), detail })?;
        let table = TokenTable::new(&tokenizer, &pipeline, spec.vocab_size).map_err(&format)?;
        let max_bytes_per_token = max_bytes_per_token(&file, &tokenizer);
        let chat = ChatTemplates::load(files)?;
        let (files, table) = (files.clone(), Arc::new(table));
        let model = Self { inner: Arc::new(Inner { files, tokenizer, table, chat, max_bytes_per_token }) };
        // The post-processor has ids of its own; nothing else shows whether they are the model's.
        model.encode("", true).map_err(|error| format(error.to_string()))?;
        Ok(model)
    }

    /// The files that it was loaded from.
    pub fn files(&self) -> &ModelFiles {
        &self.inner.files
    }

    /// Text to ids. Special tokens that stand in the text are recognised, as Hugging Face tokenizers do; `add_special` lets
    /// the tokenizer add its own around it (a start-of-sequence token, usually).
    ///
    /// # Errors
    /// [`RequestError::Invalid`] on `prompt.text` where the tokenizer has no tokens for the text;
    /// [`RequestError::Internal`] where the tokenizer panics, which ends this request alone.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, RequestError> {
        let encoding = caught(|| self.inner.tokenizer.encode_fast(text, add_special))
            .map_err(|panic| RequestError::Internal(format!("the tokenizer failed: {panic}")))?
            .map_err(|error| RequestError::invalid("prompt.text", format!("cannot be encoded: {error}")))?;
        let ids = encoding.get_ids();
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab_size()) {
            return Err(RequestError::Internal(format!("the tokenizer gave id {id}, which the model lacks")));
        }
        Ok(ids.iter().copied().map(TokenId).collect())
    }

    /// Ids to text, with or without special tokens. Equal to what [`TextModel::detokenizer`] streams.
    ///
    /// The `clean_up_tokenization_spaces` of some older tokenizers is not applied: no stream could undo a space.
    ///
    /// # Errors
    /// [`RequestError::Invalid`] on `token_ids` for an id outside of the vocabulary.
    pub fn decode(&self, ids: &[TokenId], include_special: bool) -> Result<String, RequestError> {
        let vocab_size = self.vocab_size();
        if let Some(id) = ids.iter().find(|id| id.0 as usize >= vocab_size) {
            let message = format!("{id} is not a token of this model; ids are below {vocab_size}");
            return Err(RequestError::invalid("token_ids", message));
        }
        let mut detokenizer = self.detokenizer(include_special);
        let mut text = String::new();
        for &id in ids {
            detokenizer.push_into(id, &mut text);
        }
        text.push_str(&detokenizer.finish());
        Ok(text)
    }

    /// A decoder for one sequence that grows token by token.
    pub fn detokenizer(&self, include_special: bool) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.inner.table), include_special)
    }

    /// The bytes that a token contributes within a text; they need not be UTF-8 on their own. Empty for an unknown id.
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.inner.table.bytes(id.0)
    }

    pub(super) fn tokenizer(&self) -> &Tokenizer {
        &self.inner.tokenizer
    }

    /// What each token contributes to the text.
    pub(super) fn table(&self) -> &TokenTable {
        &self.inner.table
    }

    /// Ids that the model has; the tokenizer's are all below.
    pub fn vocab_size(&self) -> usize {
        self.inner.table.len()
    }

    /// The most bytes of text that one token can stand for; `None` where this tokenizer has no such limit.
    pub fn max_token_bytes(&self) -> Option<usize> {
        self.inner.max_bytes_per_token
    }

    /// A number of tokens that no text of so many bytes is below. For refusing a gigantic prompt without encoding it. 0
    /// where the tokenizer may delete text.
    pub fn min_tokens_for_bytes(&self, bytes: usize) -> usize {
        self.max_token_bytes().map_or(0, |max| bytes.div_ceil(max))
    }

    /// Whether conversations can be rendered.
    pub fn has_chat_template(&self) -> bool {
        self.inner.chat.is_some()
    }

    /// The chat template as the model folder has it.
    pub fn chat_template_source(&self) -> Option<&str> {
        self.inner.chat.as_ref().map(ChatTemplates::source)
    }

    /// The tokens that stand for no text of their own, such as `<|im_end|>`, by id.
    pub fn special_tokens(&self) -> Vec<(TokenId, String)> {
        let added = self.inner.tokenizer.get_added_tokens_decoder().into_iter();
        let special = added.filter(|(_, token)| token.special);
        let mut special: Vec<_> = special.map(|(id, token)| (TokenId(id), token.content)).collect();
        special.sort_unstable_by_key(|&(id, _)| id);
        special
    }

    /// A conversation as the text that the model was trained on. Encode it with `add_special: false`: the template writes
    /// special tokens itself.
    ///
    /// # Errors
    /// [`RequestError::Unsupported`] where the model has no chat template; [`RequestError::Invalid`] on `prompt.chat` where
    /// the template refuses the conversation or exceeds its limits.
    pub fn render_chat(&self, prompt: &ChatPrompt) -> Result<String, RequestError> {
        match &self.inner.chat {
            Some(chat) => chat.render(prompt),
            None => Err(RequestError::Unsupported(
                "this model has no chat template; send text or token_ids, or start the server with --chat-template"
                    .to_owned(),
            )),
        }
    }
}

fn build_tokenizer(bytes: &[u8]) -> Result<Tokenizer, String> {
    let mut tokenizer = caught(|| Tokenizer::from_bytes(bytes))
        .map_err(|panic| format!("not a tokenizer: {panic}"))?
        .map_err(|error| format!("not a tokenizer: {error}"))?;
    // Left over from training; a prompt is neither cut nor padded.
    tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// Every id must be the model's, and added tokens must have the ids that the file gives them.
fn check_ids(file: &TokenizerFile, tokenizer: &Tokenizer, vocab_size: usize) -> Result<(), String> {
    for (token, id) in tokenizer.get_vocab(true) {
        if id as usize >= vocab_size {
            return Err(format!(
                "token {token:?} has id {id}, but the model's vocab_size is {vocab_size}; the tokenizer is of another model"
            ));
        }
    }
    for token in &file.added_tokens {
        let id = tokenizer.token_to_id(&token.content);
        if id != Some(token.id) {
            let detail = id.map_or("no id".to_owned(), |id| format!("id {id}"));
            return Err(format!(
                "added token {:?} is declared with id {} but the vocabulary gives it {detail}",
                token.content, token.id
            ));
        }
    }
    Ok(())
}
