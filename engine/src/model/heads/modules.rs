//! `modules.json`, which sentence-transformers keeps beside a model: what a text goes through.
//!
//! The model comes first, then a pooling and what follows it, each with a `config.json` and perhaps weights in a folder of its own.

use std::path::{Component, Path};

use serde_json::{Map, Value};

use crate::{
    error::LoadError,
    ids::TokenId,
    model::{
        fields::{Fields, parse_array, parse_object},
        files::{CONFIG, MODULES, ModelFiles},
        spec::ModelSpec,
    },
    pooling::{HeadFunction, Pooling},
};

const SUPPORTED: &str = "supported are Transformer, then Pooling (cls, mean, lasttoken, max, weightedmean or mean_sqrt_len_tokens), then \
                         any of Dense, LayerNorm, Normalize and Dropout; or Transformer, then LogitScore";

/// The modes of older files, one field for each.
const MODE_FIELDS: [(&str, &str); 6] = [
    ("pooling_mode_cls_token", "cls"),
    ("pooling_mode_mean_tokens", "mean"),
    ("pooling_mode_lasttoken", "lasttoken"),
    ("pooling_mode_max_tokens", "max"),
    ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
    ("pooling_mode_weightedmean_tokens", "weightedmean"),
];

/// What `modules.json` lists.
#[derive(Debug, PartialEq)]
pub(super) enum Modules {
    /// Texts become embeddings.
    Embed {
        pooling: Pooling,
        /// What follows it, but for a normalisation at the end.
        steps: Vec<Step>,
        /// There is one at the end.
        normalize: bool,
    },
    /// Pairs of texts are scored by logits.
    Score(LogitScore),
}

/// A module behind the pooling.
#[derive(Debug, PartialEq)]
pub(super) enum Step {
    /// A matrix product, a bias and a function.
    Dense(Dense),
    /// A layer norm, whose weights are in this folder.
    LayerNorm(String),
    Normalize,
}

/// The module Dense.
#[derive(Debug, PartialEq)]
pub(super) struct Dense {
    /// Where its weights are.
    pub folder: String,
    pub inputs: usize,
    pub outputs: usize,
    pub bias: bool,
    pub function: Option<HeadFunction>,
}

/// The module LogitScore: the logit of one token, less that of another if there is one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct LogitScore {
    pub yes: TokenId,
    pub no: Option<TokenId>,
}

/// Reads `modules.json`, if there is one, and the configuration of each module.
///
/// # Errors
/// [`LoadError::Unsupported`] for modules and pooling modes that Tidemill does not implement, [`LoadError::Format`] for files that are
/// missing, malformed or in contradiction. Both name the file and the field.
pub(super) fn read(files: &ModelFiles, spec: &ModelSpec) -> Result<Option<Modules>, LoadError> {
    let Some(bytes) = files.read(MODULES)? else { return Ok(None) };
    let path = files.path(MODULES);
    let list = parse_array(&path, &bytes)?;
    let modules = list.iter().map(|module| Module::read(&path, module)).collect::<Result<Vec<_>, _>>()?;
    let kinds: Vec<&str> = modules.iter().map(|module| module.kind).collect();
    let unsupported = |detail: String| LoadError::Unsupported { path: path.clone(), detail };
    let others = || unsupported(format!("the modules are {}; {SUPPORTED}", kinds.join(", ")));
    if kinds.first() != Some(&"Transformer") {
        return Err(others());
    }
    if !matches!(modules[0].path, "" | ".") {
        let detail = "the module Transformer has a folder of its own; pass that folder as the model";
        return Err(unsupported(detail.to_owned()));
    }
    match kinds[1..] {
        ["LogitScore"] => Ok(Some(Modules::Score(logit_score(files, &modules[1], spec)?))),
        ["Pooling", ..] => {
            let pooling = modules[1].config(files, |fields| pooling(fields, spec.hidden_size))?;
            let mut steps = Vec::new();
            let mut width = spec.hidden_size;
            for module in &modules[2..] {
                match module.kind {
                    "Dense" => {
                        let dense = dense(files, module, width)?;
                        width = dense.outputs;
                        steps.push(Step::Dense(dense));
                    }
                    "LayerNorm" => steps.push(Step::LayerNorm(module.folder(files)?)),
                    "Normalize" => steps.push(Step::Normalize),
                    // It does nothing but in training.
                    "Dropout" => {}
                    _ => return Err(others()),
                }
            }
            let normalize = steps.pop_if(|step| *step == Step::Normalize).is_some();
            Ok(Some(Modules::Embed { pooling, steps, normalize }))
        }
        _ => Err(others()),
    }
}

fn logit_score(files: &ModelFiles, module: &Module<'_>, spec: &ModelSpec) -> Result<LogitScore, LoadError> {
    module.config(files, |fields| {
        let token = |field| Ok::<_, LoadError>(fields.token_ids(field, spec.vocab_size)?.first().copied());
        let yes = token("true_token_id")?.ok_or_else(|| fields.bad("true_token_id", "is missing"))?;
        Ok(LogitScore { yes, no: token("false_token_id")? })
    })
}

fn dense(files: &ModelFiles, module: &Module<'_>, width: usize) -> Result<Dense, LoadError> {
    let folder = module.folder(files)?;
    module.config(files, |fields| {
        let (inputs, outputs) = (
            fields.required_count("in_features", MAX_WIDTH)?,
            fields.required_count("out_features", MAX_WIDTH)?,
        );
        if inputs != width {
            return Err(
                fields.bad("in_features", format!("is {inputs}, but what comes before has {width} values"))
            );
        }
        let function = function(fields, "activation_function", Some(HeadFunction::Tanh))?;
        Ok(Dense { folder, inputs, outputs, bias: fields.boolean("bias")?.unwrap_or(true), function })
    })
}

/// No known module is wider.
const MAX_WIDTH: usize = 1 << 16;

/// A function by the name of its class in PyTorch; `otherwise` where there is none.
pub(super) fn function(
    fields: &Fields<'_>,
    field: &str,
    otherwise: Option<HeadFunction>,
) -> Result<Option<HeadFunction>, LoadError> {
    let Some(class) = fields.string(field)? else { return Ok(otherwise) };
    match class.rsplit('.').next() {
        Some("Identity") => Ok(None),
        Some("Tanh") => Ok(Some(HeadFunction::Tanh)),
        Some("ReLU") => Ok(Some(HeadFunction::Relu)),
        Some("GELU") => Ok(Some(HeadFunction::Gelu)),
        Some("SiLU") => Ok(Some(HeadFunction::Silu)),
        Some("Sigmoid") => Ok(Some(HeadFunction::Sigmoid)),
        _ => {
            let detail = format!(
                "is {class:?}; supported are Identity, Tanh, ReLU, GELU, SiLU and Sigmoid of torch.nn"
            );
            Err(fields.unsupported(field, detail))
        }
    }
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

    /// Its folder within the model's.
    fn folder(&self, files: &ModelFiles) -> Result<String, LoadError> {
        let folder = Path::new(self.path);
        if folder.components().all(|part| matches!(part, Component::Normal(_))) {
            return Ok(folder.to_string_lossy().into_owned());
        }
        let detail =
            format!("the module {} has the path {folder:?}, which is not inside the model folder", self.kind);
        Err(LoadError::Format { path: files.path(MODULES), detail })
    }

    /// Reads its `config.json`.
    fn config<T>(
        &self,
        files: &ModelFiles,
        read: impl FnOnce(&Fields<'_>) -> Result<T, LoadError>,
    ) -> Result<T, LoadError> {
        let name = Path::new(&self.folder(files)?).join(CONFIG).to_string_lossy().into_owned();
        let path = files.path(&name);
        let map = parse_object(&path, &files.require(&name)?)?;
        read(&Fields::new(&path, &map))
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
        [(_, "max")] => Ok(Pooling::Max),
        [(_, "weightedmean")] => Ok(Pooling::WeightedMean),
        [(_, "mean_sqrt_len_tokens")] => Ok(Pooling::MeanSqrtLen),
        [] => Err(fields.bad("pooling_mode", format!("is missing; {SUPPORTED}"))),
        [(field, mode)] => {
            Err(fields.unsupported(field, format!("asks for the pooling {mode:?}; {SUPPORTED}")))
        }
        [_, (field, _), ..] => {
            Err(fields.unsupported(field, format!("asks for a second pooling beside the first; {SUPPORTED}")))
        }
    }
}
