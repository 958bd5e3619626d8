//! How a model's embeddings are made, read from the files that sentence-transformers keeps beside it.
//!
//! `modules.json` lists what a text goes through: the model, a pooling with a `config.json` in its own folder, and perhaps a
//! normalisation. A folder without it is a plain decoder: then the last token's state, scaled to length 1, is the embedding.

use std::path::{Component, Path};

use serde_json::{Map, Value};

use crate::{
    error::LoadError,
    info::EmbeddingInfo,
    model::{
        fields::{Fields, parse_array, parse_object},
        files::{CONFIG, MODULES, ModelFiles},
        spec::ModelSpec,
    },
    pooling::Pooling,
};

const SUPPORTED: &str =
    "supported are Transformer, then Pooling (cls, mean or lasttoken), then perhaps Normalize";

/// The modes of older files, one field for each.
const MODE_FIELDS: [(&str, &str); 6] = [
    ("pooling_mode_cls_token", "cls"),
    ("pooling_mode_mean_tokens", "mean"),
    ("pooling_mode_lasttoken", "lasttoken"),
    ("pooling_mode_max_tokens", "max"),
    ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
    ("pooling_mode_weightedmean_tokens", "weightedmean"),
];

/// Reads what the folder says of its embeddings.
///
/// # Errors
/// [`LoadError::Unsupported`] for modules and pooling modes that Tidemill does not implement, [`LoadError::Format`] for files that are
/// missing, malformed or in contradiction. Both name the file and the field.
pub fn embedding_info(files: &ModelFiles, spec: &ModelSpec) -> Result<EmbeddingInfo, LoadError> {
    let (dimensions, is_only_output) = (spec.hidden_size, spec.is_headless());
    let Some(bytes) = files.read(MODULES)? else {
        return Ok(EmbeddingInfo { dimensions, pooling: Pooling::Last, normalize: true, is_only_output });
    };
    let path = files.path(MODULES);
    let list = parse_array(&path, &bytes)?;
    let modules = list.iter().map(|module| Module::read(&path, module)).collect::<Result<Vec<_>, _>>()?;
    let kinds: Vec<&str> = modules.iter().map(|module| module.kind).collect();
    let normalize = match kinds[..] {
        ["Transformer", "Pooling"] => false,
        ["Transformer", "Pooling", "Normalize"] => true,
        _ => {
            let detail = format!("the modules are {}; {SUPPORTED}", kinds.join(", "));
            return Err(LoadError::Unsupported { path, detail });
        }
    };
    if !matches!(modules[0].path, "" | ".") {
        let detail =
            "the module Transformer has a folder of its own; pass that folder as the model".to_owned();
        return Err(LoadError::Unsupported { path, detail });
    }
    let folder = Path::new(modules[1].path);
    if !folder.components().all(|part| matches!(part, Component::Normal(_))) {
        let detail =
            format!("the module Pooling has the path {folder:?}, which is not inside the model folder");
        return Err(LoadError::Format { path, detail });
    }
    let name = folder.join(CONFIG).to_string_lossy().into_owned();
    let path = files.path(&name);
    let map = parse_object(&path, &files.require(&name)?)?;
    let pooling = pooling(&Fields::new(&path, &map), dimensions)?;
    Ok(EmbeddingInfo { dimensions, pooling, normalize, is_only_output })
}

/// An entry of `modules.json`.
struct Module<'a> {
    /// The last part of its class name, which is all that has stayed the same.
    kind: &'a str,
    path: &'a str,
}

impl<'a> Module<'a> {
    fn read(file: &'a Path, module: &'a Map<String, Value>) -> Result<Self, LoadError> {
        let fields = Fields::new(file, module);
        let class = fields.string("type")?.ok_or_else(|| fields.bad("type", "is missing"))?;
        let kind = class.rsplit('.').next().unwrap_or(class);
        Ok(Self { kind, path: fields.string("path")?.unwrap_or("") })
    }
}

fn pooling(fields: &Fields<'_>, hidden_size: usize) -> Result<Pooling, LoadError> {
    for field in ["word_embedding_dimension", "embedding_dimension"] {
        if let Some(width) = fields.count(field, usize::MAX)?.filter(|&width| width != hidden_size) {
            return Err(
                fields.bad(field, format!("is {width}, but hidden_size of {CONFIG} is {hidden_size}"))
            );
        }
    }
    if fields.boolean("include_prompt")? == Some(false) {
        let detail = "is false; leaving an instruction's tokens out is not supported, only true is";
        return Err(fields.unsupported("include_prompt", detail));
    }
    let mut modes: Vec<(&str, &str)> = Vec::new();
    if fields.has("pooling_mode") {
        let mode = fields.string("pooling_mode")?.unwrap_or("");
        modes.push(("pooling_mode", mode));
    } else {
        for (field, mode) in MODE_FIELDS {
            if fields.boolean(field)?.unwrap_or(false) {
                modes.push((field, mode));
            }
        }
    }
    match modes[..] {
        [(_, "cls")] => Ok(Pooling::Cls),
        [(_, "mean")] => Ok(Pooling::Mean),
        [(_, "lasttoken")] => Ok(Pooling::Last),
        [] => Err(fields.bad("pooling_mode", format!("is missing; {SUPPORTED}"))),
        [(field, mode)] => {
            Err(fields.unsupported(field, format!("asks for the pooling {mode:?}; {SUPPORTED}")))
        }
        [_, (field, _), ..] => {
            Err(fields.unsupported(field, format!("asks for a second pooling beside the first; {SUPPORTED}")))
        }
    }
}
