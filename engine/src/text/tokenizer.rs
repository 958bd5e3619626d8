//! A model's text side: tokenizer, decoder and chat template, loaded once and shared.

use std::{borrow::Cow, sync::Arc};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::{
    error::{LoadError, RequestError},
    ids::TokenId,
    model::{files::ModelFiles, spec::ModelSpec},
    text::{
        bound::max_bytes_per_token,
        chat::{ChatPrompt, ChatTemplates},
        detokenize::Detokenizer,
        guard::caught,
        sources::{Normalizer, Source, TokenizerKind},
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
    /// None where the server was told to do without.
    words: Option<Words>,
    table: Arc<TokenTable>,
    chat: Option<ChatTemplates>,
}

/// The way from text to ids.
#[derive(Debug)]
pub(super) struct Words {
    kind: TokenizerKind,
    /// Done to texts before the tokenizer sees them.
    normalizer: Option<Normalizer>,
    pub(super) tokenizer: Tokenizer,
    max_bytes_per_token: Option<usize>,
}

impl Words {
    /// A text as the tokenizer wants it.
    pub(super) fn normalized<'a>(&self, text: &'a str) -> Cow<'a, str> {
        self.normalizer.as_ref().map_or(text.into(), |rules| Cow::Owned(rules.normalize(text)))
    }
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
    /// Loads the tokenizer and the chat template.
    ///
    /// # Errors
    /// [`LoadError`] for a file that is missing or broken, a tokenizer with ids that the model does not have, a decoder
    /// that cannot be streamed exactly, a template that does not compile.
    pub fn load(files: &ModelFiles, spec: &ModelSpec) -> Result<Self, LoadError> {
        let source = Source::find(files)?;
        let path = &source.path;
        let format = |detail: String| LoadError::Format { path: path.clone(), detail };
        let file: TokenizerFile = serde_json::from_slice(&source.json)
            .map_err(|error| format(format!("not a tokenizer: {error}")))?;
        let tokenizer = build_tokenizer(&source).map_err(&format)?;
        check_ids(&file, &tokenizer, spec.vocab_size).map_err(&format)?;
        let pipeline = Pipeline::new(file.decoder.as_ref())
            .map_err(|detail| LoadError::Unsupported { path: path.clone(), detail })?;
        let table = TokenTable::new(&tokenizer, &pipeline, spec.vocab_size).map_err(&format)?;
        let keeps_text = source.normalizer.as_ref().is_none_or(Normalizer::keeps_text);
        let max_bytes_per_token = max_bytes_per_token(&file, &tokenizer).filter(|_| keeps_text);
        let chat = ChatTemplates::load(files)?;
        let Source { kind, normalizer, .. } = source;
        let words = Some(Words { kind, normalizer, tokenizer, max_bytes_per_token });
        let model =
            Self { inner: Arc::new(Inner { files: files.clone(), words, table: Arc::new(table), chat }) };
        // The post-processor has ids of its own; nothing else shows whether they are the model's.
        model.encode("", true).map_err(|error| format(error.to_string()))?;
        Ok(model)
    }

    /// A model without a tokenizer, whose prompts and answers are token ids: no file is read, and what is about text is refused.
    pub fn without_tokenizer(files: &ModelFiles, spec: &ModelSpec) -> Self {
        let table = TokenTable::without_text(spec.vocab_size);
        let inner = Inner { files: files.clone(), words: None, table: Arc::new(table), chat: None };
        Self { inner: Arc::new(inner) }
    }

    /// The kind of tokenizer; none where the server was told to do without.
    pub fn tokenizer_kind(&self) -> Option<TokenizerKind> {
        self.inner.words.as_ref().map(|words| words.kind)
    }

    /// Checks that there is a tokenizer; `what` needs one.
    ///
    /// # Errors
    /// [`RequestError::Unsupported`] where there is none.
    pub fn require(&self, what: &str) -> Result<(), RequestError> {
        self.words(what).map(drop)
    }

    pub(super) fn words(&self, what: &str) -> Result<&Words, RequestError> {
        self.inner.words.as_ref().ok_or_else(|| {
            RequestError::Unsupported(format!(
                "{what} needs a tokenizer, and this server was started with --skip-tokenizer-init: send the prompt as token_ids and \
                 read token_ids, or start it without that option"
            ))
        })
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
    /// [`RequestError::Internal`] where the tokenizer panics, which ends this request alone;
    /// [`RequestError::Unsupported`] where there is no tokenizer.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, RequestError> {
        let words = self.words("text")?;
        let encoding = caught(|| words.tokenizer.encode_fast(words.normalized(text), add_special))
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
    /// [`RequestError::Invalid`] on `token_ids` for an id outside of the vocabulary; [`RequestError::Unsupported`] where there is no
    /// tokenizer.
    pub fn decode(&self, ids: &[TokenId], include_special: bool) -> Result<String, RequestError> {
        self.require("to make text of ids")?;
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
        self.inner.words.as_ref()?.max_bytes_per_token
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
        let words = self.inner.words.iter();
        let added = words.flat_map(|words| words.tokenizer.get_added_tokens_decoder());
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
        self.require("a conversation")?;
        match &self.inner.chat {
            Some(chat) => chat.render(prompt),
            None => Err(RequestError::Unsupported(
                "this model has no chat template; send text or token_ids, or start the server with --chat-template"
                    .to_owned(),
            )),
        }
    }
}

fn build_tokenizer(source: &Source) -> Result<Tokenizer, String> {
    let mut tokenizer = caught(|| Tokenizer::from_bytes(&source.json))
        .map_err(|panic| format!("not a tokenizer: {panic}"))?
        .map_err(|error| format!("not a tokenizer: {error}"))?;
    // Left over from training; a prompt is neither cut nor padded.
    tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
    tokenizer.with_padding(None);
    caught(|| source.complete(&mut tokenizer)).flatten()?;
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
