//! GGUF: a whole model in one file. It is read as if it were a model folder: the metadata become `config.json`, `tokenizer.json` and so on, and its
//! tensors get the names that they have on the hub.

mod config;
mod names;
mod reader;
mod tokenizer;

use std::{
    collections::BTreeMap,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use safetensors::Dtype;
use serde_json::json;
use tidemill_kernels::tensor::GgmlType;

use self::{
    config::Meta,
    reader::{Head, Value},
};
use super::files::{CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG};
use crate::error::LoadError;

/// An opened file.
#[derive(Debug, Clone)]
pub(super) struct Gguf(Arc<Opened>);

#[derive(Debug)]
struct Opened {
    path: PathBuf,
    bytes: Bytes,
    /// By name: what a model folder would hold.
    files: BTreeMap<&'static str, Bytes>,
    tensors: Vec<(String, Stored)>,
}

/// A tensor as it is stored.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub format: Format,
    pub shape: Vec<usize>,
    /// Place in the file.
    pub range: Range<usize>,
    /// Rows of heads of this width that are stored as llama.cpp rotates them: `(i, i + D/2)` side by side.
    pub paired_heads: Option<usize>,
}

/// Elements of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Plain(Dtype),
    Blocks(GgmlType),
}

/// A file's head and bytes.
struct Source {
    head: Head,
    bytes: Bytes,
}

impl Gguf {
    /// Reads the head of a mapped file.
    ///
    /// # Errors
    /// [`LoadError::Format`], naming the file and what of it is wrong or not supported.
    pub fn open(path: &Path, bytes: Bytes) -> Result<Gguf, LoadError> {
        let opened = Self::read(path, bytes).map_err(|detail| LoadError::Format {
            path: path.to_path_buf(),
            detail: format!("the file {detail}"),
        })?;
        Ok(Gguf(Arc::new(opened)))
    }

    fn read(path: &Path, bytes: Bytes) -> Result<Opened, String> {
        let head = reader::read(&bytes)?;
        let source = Source { head, bytes };
        let tensors = source.tensors()?;
        let json = |value: serde_json::Value| Bytes::from(value.to_string());
        let mut files = BTreeMap::from([
            (CONFIG, json(config::config(&source)?)),
            (GENERATION_CONFIG, json(config::generation(&source.head))),
            (TOKENIZER, json(tokenizer::tokenizer(&source.head)?)),
        ]);
        let special = |key: &str| tokenizer::special(&source.head, key);
        let template = match source.head.metadata.get("tokenizer.chat_template") {
            Some(Value::Text(template)) => Some(template.clone()),
            _ => None,
        };
        let mut texts = json!({ "bos_token": special("bos_token_id"), "eos_token": special("eos_token_id") });
        if let (Some(map), Some(template)) = (texts.as_object_mut(), template) {
            map.insert("chat_template".into(), template.into());
        }
        files.insert(TOKENIZER_CONFIG, json(texts));
        Ok(Opened { path: path.to_path_buf(), bytes: source.bytes, files, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Its bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.0.bytes
    }

    /// What a file of a model folder would hold.
    pub fn file(&self, name: &str) -> Option<Bytes> {
        self.0.files.get(name).cloned()
    }

    /// All tensors, by their names on the hub.
    pub fn tensors(&self) -> &[(String, Stored)] {
        &self.0.tensors
    }
}

impl Source {
    fn tensors(&self) -> Result<Vec<(String, Stored)>, String> {
        let (meta, _) = Meta::new(&self.head)?;
        let head_dim = meta.head_dim()?;
        let is_paired = |name: &str| meta.architecture == "llama" && names::has_rotated_heads(name);
        let mut tensors = Vec::with_capacity(self.head.tensors.len());
        for name in self.head.tensors.keys().filter(|name| *name != "rope_freqs.weight") {
            let Some(hub) = names::hub_name(name) else {
                return Err(format!(
                    "holds tensor {name:?}, which is none of a {} that we know",
                    meta.architecture
                ));
            };
            let mut stored = self.stored(name)?;
            if is_paired(&hub) {
                let dim = usize::try_from(head_dim).ok().filter(|d| *d > 0 && d % 2 == 0);
                let dim = dim.filter(|d| stored.shape[0].is_multiple_of(*d));
                let dim = dim.ok_or_else(|| {
                    format!("has heads of {head_dim}, which tensor {name:?} has no rows for")
                })?;
                stored.paired_heads = Some(dim);
            }
            tensors.push((hub, stored));
        }
        let mut places: Vec<_> = tensors.iter().map(|(name, stored)| (stored.range.clone(), name)).collect();
        places.sort_by_key(|(range, _)| range.start);
        match places.windows(2).find(|pair| pair[0].0.end > pair[1].0.start) {
            Some(pair) => Err(format!("has tensors {:?} and {:?} in one place", pair[0].1, pair[1].1)),
            None => Ok(tensors),
        }
    }

    fn stored(&self, name: &str) -> Result<Stored, String> {
        let info = &self.head.tensors[name];
        let blocks = |ty: GgmlType| (Format::Blocks(ty), ty.block(), ty.block_bytes());
        let (format, block, block_bytes) = match info.kind {
            0 => (Format::Plain(Dtype::F32), 1, 4),
            1 => (Format::Plain(Dtype::F16), 1, 2),
            30 => (Format::Plain(Dtype::BF16), 1, 2),
            2 => blocks(GgmlType::Q4_0),
            8 => blocks(GgmlType::Q8_0),
            12 => blocks(GgmlType::Q4_K),
            13 => blocks(GgmlType::Q5_K),
            14 => blocks(GgmlType::Q6_K),
            other => {
                return Err(format!(
                    "holds tensor {name:?} as {}; supported: F32, F16, BF16, Q4_0, Q8_0, Q4_K, Q5_K, Q6_K. Take a file of one of \
                     those, as Q4_K_M",
                    type_name(other)
                ));
            }
        };
        let width = *info.shape.last().unwrap_or(&0);
        if !width.is_multiple_of(block) {
            return Err(format!(
                "holds tensor {name:?} {:?} in blocks of {block}, which do not divide its rows",
                info.shape
            ));
        }
        if block > 1 && info.shape.len() != 2 {
            return Err(format!("holds tensor {name:?} {:?} in blocks, but it is no matrix", info.shape));
        }
        // Four extents of at most 2^31 fit.
        let elems: u128 = info.shape.iter().map(|&extent| extent as u128).product();
        let range = reader::extent(info.start, elems / block as u128 * block_bytes as u128, self.bytes.len());
        let range = range
            .ok_or_else(|| format!("is cut short: tensor {name:?} {:?} lies beyond its end", info.shape))?;
        Ok(Stored { format, shape: info.shape.clone(), range, paired_heads: None })
    }

    /// A small tensor in f32.
    fn floats(&self, name: &str) -> Result<Option<Vec<f32>>, String> {
        if !self.head.tensors.contains_key(name) {
            return Ok(None);
        }
        let stored = self.stored(name)?;
        if stored.format != Format::Plain(Dtype::F32) {
            return Err(format!("holds tensor {name:?} in another type than F32"));
        }
        let bytes = &self.bytes[stored.range];
        Ok(Some(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()))
    }
}

/// GGML's name of a type that is not supported.
fn type_name(kind: u32) -> String {
    let name = match kind {
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        other => return format!("type {other}"),
    };
    name.to_owned()
}
