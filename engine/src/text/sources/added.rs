//! What a folder says of its tokens beside the vocabulary: `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use serde::Serialize;
use serde_json::{Map, Value};

use super::proto::{MAX_PIECE_BYTES, shown};
use crate::{
    error::LoadError,
    model::{
        fields::{Fields, parse_object},
        files::{ModelFiles, TOKENIZER_CONFIG},
    },
};

const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
const ADDED_TOKENS: &str = "added_tokens.json";

/// Fields that name a special token, in both files.
const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A token that is found in a text before anything else is done to it; as in `tokenizer.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct AddedToken {
    pub id: u32,
    pub content: String,
    /// Only where no letter or digit is beside it.
    pub single_word: bool,
    /// Takes the white space before it.
    pub lstrip: bool,
    /// Takes the white space after it.
    pub rstrip: bool,
    /// Looked for in the normalised text.
    pub normalized: bool,
    /// Stands for no text of its own.
    pub special: bool,
}

impl AddedToken {
    pub(crate) fn new(id: u32, content: impl Into<String>, special: bool) -> Self {
        let content = content.into();
        Self { id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special }
    }
}

/// A token without its id, as it is written in several files.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Written {
    content: String,
    /// Absent where only the text is given.
    flags: Option<Flags>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Flags {
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: Option<bool>,
}

/// What the three files say together.
#[derive(Debug, Clone, Default)]
pub(super) struct FolderTokens {
    /// `added_tokens_decoder`.
    decoder: BTreeMap<u32, Written>,
    /// Where that stands.
    path: PathBuf,
    /// `added_tokens.json`.
    added: BTreeMap<String, u32>,
    roles: BTreeMap<&'static str, Written>,
    additional: Vec<Written>,
    pub(super) class: Option<String>,
    pub(super) add_bos: Option<bool>,
    pub(super) add_eos: Option<bool>,
    pub(super) add_prefix_space: Option<bool>,
    pub(super) legacy: Option<bool>,
}

impl FolderTokens {
    /// # Errors
    /// [`LoadError`] naming file and field.
    pub(super) fn read(files: &ModelFiles) -> Result<Self, LoadError> {
        let mut tokens = Self { path: files.path(TOKENIZER_CONFIG), ..Self::default() };
        if let Some(bytes) = files.read(ADDED_TOKENS)? {
            let path = files.path(ADDED_TOKENS);
            let map = parse_object(&path, &bytes)?;
            let fields = Fields::new(&path, &map);
            for (content, value) in &map {
                let id = fields
                    .u32(content)?
                    .ok_or_else(|| fields.bad(content, format!("is {value}, not an id")))?;
                tokens.added.insert(content.clone(), id);
            }
        }
        if let Some(bytes) = files.read(SPECIAL_TOKENS_MAP)? {
            let path = files.path(SPECIAL_TOKENS_MAP);
            tokens.roles(&path, &parse_object(&path, &bytes)?)?;
        }
        if let Some(bytes) = files.read(TOKENIZER_CONFIG)? {
            let path = files.path(TOKENIZER_CONFIG);
            tokens.config(&path, &parse_object(&path, &bytes)?)?;
        }
        Ok(tokens)
    }

    fn roles(&mut self, path: &Path, map: &Map<String, Value>) -> Result<(), LoadError> {
        let fields = Fields::new(path, map);
        for role in ROLES {
            // An empty text or false is how some folders write that there is none.
            let given = fields.get(role).filter(|value| *value != "" && *value != &Value::Bool(false));
            if let Some(value) = given {
                self.roles.insert(role, written(&fields, role, value)?);
            }
        }
        let field = "additional_special_tokens";
        if let Some(value) = fields.get(field) {
            let list = value.as_array().ok_or_else(|| fields.bad(field, "must be a list of tokens"))?;
            self.additional =
                list.iter().map(|value| written(&fields, field, value)).collect::<Result<_, _>>()?;
        }
        Ok(())
    }

    fn config(&mut self, path: &Path, map: &Map<String, Value>) -> Result<(), LoadError> {
        let fields = Fields::new(path, map);
        self.roles(path, map)?;
        self.class = fields.string("tokenizer_class")?.map(str::to_owned);
        self.add_bos = fields.boolean("add_bos_token")?;
        self.add_eos = fields.boolean("add_eos_token")?;
        self.add_prefix_space = fields.boolean("add_prefix_space")?;
        self.legacy = fields.boolean("legacy")?;
        let field = "added_tokens_decoder";
        if let Some(decoder) = fields.object(field)? {
            for id in decoder.names() {
                let number = id
                    .parse::<u32>()
                    .map_err(|_| fields.bad(field, format!("has the key {:?}, which is no id", shown(id))))?;
                let value = decoder.get(id).ok_or_else(|| decoder.bad(id, "is null"))?;
                self.decoder.insert(number, written(&decoder, id, value)?);
            }
        }
        Ok(())
    }

    /// The text of the special token with this role, such as `bos_token`.
    pub(super) fn role(&self, role: &str) -> Option<&str> {
        self.roles.get(role).map(|written| written.content.as_str())
    }

    /// Whether any file names tokens with their ids.
    pub(super) fn has_ids(&self) -> bool {
        !self.decoder.is_empty() || !self.added.is_empty()
    }

    /// All added tokens by id: those of the vocabulary, those of the files, which count for more. `id_of` is the vocabulary.
    ///
    /// # Errors
    /// [`LoadError::Format`] for two tokens with one id.
    pub(super) fn merge(
        &self,
        base: Vec<AddedToken>,
        id_of: impl Fn(&str) -> Option<u32>,
    ) -> Result<Vec<AddedToken>, LoadError> {
        let mut tokens: BTreeMap<u32, AddedToken> = base.into_iter().map(|token| (token.id, token)).collect();
        let mut ids: HashMap<String, u32> =
            tokens.values().map(|token| (token.content.clone(), token.id)).collect();
        for (content, &id) in &self.added {
            tokens.insert(id, AddedToken::new(id, content, false));
            ids.insert(content.clone(), id);
        }
        for (&id, written) in &self.decoder {
            tokens.insert(id, written.token(id, false));
            ids.insert(written.content.clone(), id);
        }
        for written in self.roles.values().chain(&self.additional) {
            let Some(id) = ids.get(&written.content).copied().or_else(|| id_of(&written.content)) else {
                continue;
            };
            match tokens.get_mut(&id) {
                Some(token) => token.special = true,
                None => drop(tokens.insert(id, written.token(id, true))),
            }
        }
        let mut seen = HashMap::new();
        for token in tokens.values() {
            if let Some(other) = seen.insert(token.content.as_str(), token.id) {
                let detail =
                    format!("token {:?} has two ids, {other} and {}", shown(&token.content), token.id);
                return Err(LoadError::Format { path: self.path.clone(), detail });
            }
        }
        Ok(tokens.into_values().collect())
    }

    /// Tokens of `added_tokens_decoder` that a complete tokenizer lacks, by id.
    pub(super) fn missing(&self, has: impl Fn(&str) -> bool) -> Vec<AddedToken> {
        let all = self.decoder.iter().filter(|(_, written)| !has(&written.content));
        all.map(|(&id, written)| written.token(id, false)).collect()
    }
}

impl Written {
    fn token(&self, id: u32, special: bool) -> AddedToken {
        let plain = AddedToken::new(id, &self.content, special);
        match self.flags {
            None => plain,
            Some(Flags { single_word, lstrip, rstrip, normalized, special: given }) => AddedToken {
                single_word,
                lstrip,
                rstrip,
                normalized,
                special: given.unwrap_or(special),
                ..plain
            },
        }
    }
}

/// A token as text, or as an object with its flags.
fn written(fields: &Fields<'_>, field: &str, value: &Value) -> Result<Written, LoadError> {
    let (content, flags) = match value {
        Value::String(content) => (Some(content.as_str()), None),
        Value::Object(token) => {
            let flag = |name: &str| match token.get(name) {
                None | Some(Value::Null) => Ok(None),
                Some(Value::Bool(flag)) => Ok(Some(*flag)),
                Some(_) => Err(fields.bad(field, format!("has a `{name}` that is neither true nor false"))),
            };
            let flags = Flags {
                single_word: flag("single_word")?.unwrap_or(false),
                lstrip: flag("lstrip")?.unwrap_or(false),
                rstrip: flag("rstrip")?.unwrap_or(false),
                normalized: flag("normalized")?.unwrap_or(false),
                special: flag("special")?,
            };
            (token.get("content").and_then(Value::as_str), Some(flags))
        }
        _ => (None, None),
    };
    let content =
        content.ok_or_else(|| fields.bad(field, "must be a token: a string, or an object with `content`"))?;
    if content.is_empty() || content.len() > MAX_PIECE_BYTES {
        return Err(fields.bad(
            field,
            format!("is a token of {} bytes; 1 to {MAX_PIECE_BYTES} are accepted", content.len()),
        ));
    }
    Ok(Written { content: content.to_owned(), flags })
}
