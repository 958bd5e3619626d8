//! Where a tokenizer comes from: `tokenizer.json` where a folder has it, or what stands in for it.
//!
//! Whatever the file, it becomes what `tokenizer.json` would hold, so that everything after is the same for all.

mod added;
mod byte_level;
mod definition;
mod families;
mod normalize;
mod proto;
mod sentencepiece;
mod wire;

use std::{fmt, path::PathBuf};

use tokenizers::Tokenizer;

pub(super) use normalize::Normalizer;

use crate::{
    error::LoadError,
    model::{
        fields::{Fields, parse_object},
        files::{CONFIG, ModelFiles, TOKENIZER, TOKENIZER_CONFIG, utf8},
    },
};
use added::FolderTokens;
use byte_level::Merged;
use families::Family;
use proto::SentencePieces;

/// SentencePiece models by their names, and lists of ranks.
const MODELS: [&str; 5] =
    ["tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "spm.model", "tiktoken.model"];
const RANKS: &str = "tiktoken";
const VOCAB: &str = "vocab.json";
const MERGES: &str = "merges.txt";

/// The kind of file that a tokenizer was made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenizerKind {
    /// `tokenizer.json`.
    TokenizerJson,
    /// A SentencePiece model.
    SentencePiece,
    /// A list of ranks.
    Tiktoken,
    /// `vocab.json` and `merges.txt`.
    VocabAndMerges,
}

impl fmt::Display for TokenizerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TokenizerJson => "tokenizer.json",
            Self::SentencePiece => "SentencePiece",
            Self::Tiktoken => "tiktoken",
            Self::VocabAndMerges => "vocab.json and merges.txt",
        })
    }
}

/// A tokenizer that is still to be built.
pub(super) struct Source {
    pub(super) kind: TokenizerKind,
    /// The file, for messages.
    pub(super) path: PathBuf,
    /// What `tokenizer.json` holds, or would.
    pub(super) json: bytes::Bytes,
    /// Done to texts before the tokenizer sees them.
    pub(super) normalizer: Option<Normalizer>,
    folder: FolderTokens,
}

impl Source {
    /// Finds the folder's tokenizer and reads it.
    ///
    /// # Errors
    /// [`LoadError`] for a file that is broken or of a kind that is not supported, or where there is none.
    pub(super) fn find(files: &ModelFiles) -> Result<Self, LoadError> {
        let folder = FolderTokens::read(files)?;
        if files.contains(TOKENIZER) {
            return Ok(Self {
                kind: TokenizerKind::TokenizerJson,
                path: files.path(TOKENIZER),
                json: files.require(TOKENIZER)?,
                normalizer: None,
                folder,
            });
        }
        let model_type = model_type(files)?;
        let model = MODELS.into_iter().find(|name| files.contains(name)).map(str::to_owned);
        if let Some(name) = model.or(files.find(RANKS)?) {
            return Self::model_file(files, &name, folder, model_type.as_deref());
        }
        if files.contains(VOCAB) && files.contains(MERGES) {
            return Self::vocab_and_merges(files, folder, model_type.as_deref());
        }
        Err(LoadError::Format {
            path: files.path(TOKENIZER),
            detail: "the folder has no tokenizer: it must hold tokenizer.json, tokenizer.model, a *.tiktoken file, or vocab.json and \
                     merges.txt; to serve token ids alone, start with --skip-tokenizer-init"
                .to_owned(),
        })
    }

    fn model_file(
        files: &ModelFiles,
        name: &str,
        folder: FolderTokens,
        model_type: Option<&str>,
    ) -> Result<Self, LoadError> {
        let (path, bytes) = (files.path(name), files.require(name)?);
        let fail = |detail: String| LoadError::Format { path: path.clone(), detail };
        if byte_level::looks_like_ranks(&bytes) {
            let family = family(&folder, model_type, &path, Family::has_ranks)?;
            let merged = byte_level::ranks(&bytes).map_err(fail)?;
            return Self::byte_level(TokenizerKind::Tiktoken, path, folder, (family, &merged));
        }
        if !proto::looks_like(&bytes) {
            return Err(fail("neither a SentencePiece model nor a list of tiktoken ranks".to_owned()));
        }
        let model = SentencePieces::parse(&bytes).map_err(fail)?;
        let converted = sentencepiece::convert(&model, &folder, model_type, fail)?;
        Ok(Self {
            kind: TokenizerKind::SentencePiece,
            json: converted.json.into(),
            normalizer: Some(converted.normalizer),
            path,
            folder,
        })
    }

    fn vocab_and_merges(
        files: &ModelFiles,
        folder: FolderTokens,
        model_type: Option<&str>,
    ) -> Result<Self, LoadError> {
        let (path, merges) = (files.path(VOCAB), files.path(MERGES));
        let family =
            family(&folder, model_type, &path, |family| !matches!(family, Family::Llama3 | Family::GptOss))?;
        let vocab = byte_level::vocab(&files.require(VOCAB)?)
            .map_err(|detail| LoadError::Format { path: path.clone(), detail })?;
        let merged = byte_level::merges(utf8(&merges, &files.require(MERGES)?)?, vocab)
            .map_err(|detail| LoadError::Format { path: merges.clone(), detail })?;
        Self::byte_level(TokenizerKind::VocabAndMerges, path, folder, (family, &merged))
    }

    fn byte_level(
        kind: TokenizerKind,
        path: PathBuf,
        folder: FolderTokens,
        (family, merged): (Family, &Merged),
    ) -> Result<Self, LoadError> {
        let fail = |detail: String| LoadError::Format { path: path.clone(), detail };
        let json = byte_level::convert(merged, &folder, family, fail)?.into();
        Ok(Self { kind, path, json, normalizer: None, folder })
    }

    /// Gives a tokenizer the tokens that `tokenizer_config.json` names and `tokenizer.json` lacks. The error says which cannot be.
    pub(super) fn complete(&self, tokenizer: &mut Tokenizer) -> Result<(), String> {
        for token in self.folder.missing(|content| tokenizer.token_to_id(content).is_some()) {
            let added = tokenizers::AddedToken::from(token.content.clone(), token.special)
                .single_word(token.single_word)
                .lstrip(token.lstrip)
                .rstrip(token.rstrip)
                .normalized(token.normalized);
            tokenizer.add_tokens([added]).map_err(|error| error.to_string())?;
            let id = tokenizer.token_to_id(&token.content);
            if id != Some(token.id) {
                return Err(format!(
                    "{TOKENIZER_CONFIG} gives the token {:?} the id {}, but the next that is free is {}",
                    token.content,
                    token.id,
                    id.map_or("none".to_owned(), |id| id.to_string())
                ));
            }
        }
        Ok(())
    }
}

/// The family whose way to split texts applies.
fn family(
    folder: &FolderTokens,
    model_type: Option<&str>,
    path: &std::path::Path,
    fits: impl Fn(Family) -> bool,
) -> Result<Family, LoadError> {
    Family::of(folder, model_type).filter(|&family| fits(family)).ok_or_else(|| LoadError::Unsupported {
        path: path.to_path_buf(),
        detail: format!(
            "how the tokenizer of {:?} splits texts is not known; known for ranks are Llama 3, Qwen and GPT-OSS, for vocab.json with \
             merges.txt GPT-2, RoBERTa and Qwen; a tokenizer.json in the folder says it itself",
            folder.class.as_deref().or(model_type).unwrap_or("a model without a type")
        ),
    })
}

fn model_type(files: &ModelFiles) -> Result<Option<String>, LoadError> {
    let path = files.path(CONFIG);
    let Some(bytes) = files.read(CONFIG)? else { return Ok(None) };
    let map = parse_object(&path, &bytes)?;
    Ok(Fields::new(&path, &map).string("model_type")?.map(str::to_owned))
}
