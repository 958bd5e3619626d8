//! Sampling defaults from `generation_config.json`.

use std::path::Path;

use crate::{
    error::LoadError,
    ids::TokenId,
    model::{
        fields::{Fields, parse_object},
        files::{GENERATION_CONFIG, ModelFiles},
        spec::ModelSpec,
    },
};

/// What a request gets where it says nothing itself. `None` where the file says nothing either.
///
/// The file is read as vLLM reads it: its fields hold whether or not `do_sample` is there. Only an explicit
/// `do_sample: false` means greedy decoding, and sets the temperature to 0.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end a generation: those of `config.json`, then those that only this file names.
    pub eos: Vec<TokenId>,
    /// Start-of-sequence token of this file, or of `config.json`.
    pub bos: Option<TokenId>,
    /// At least 0; 0 is greedy.
    pub temperature: Option<f32>,
    /// 0 keeps all.
    pub top_k: Option<u32>,
    /// In (0, 1].
    pub top_p: Option<f32>,
    /// In [0, 1].
    pub min_p: Option<f32>,
    /// Over 0.
    pub repetition_penalty: Option<f32>,
    /// At least 1.
    pub max_new_tokens: Option<u32>,
    /// As in the file.
    pub do_sample: Option<bool>,
}

impl GenerationDefaults {
    /// Reads the folder's file, if it has one.
    ///
    /// # Errors
    /// [`LoadError`] naming the field that has a wrong type or is out of range.
    pub fn load(files: &ModelFiles, spec: &ModelSpec) -> Result<Self, LoadError> {
        match files.read(GENERATION_CONFIG)? {
            Some(bytes) => Self::from_json(&files.path(GENERATION_CONFIG), &bytes, spec),
            None => Ok(Self { eos: spec.eos.clone(), bos: spec.bos, ..Self::default() }),
        }
    }

    /// Reads the bytes of a `generation_config.json`; `path` is for messages.
    ///
    /// # Errors
    /// As [`GenerationDefaults::load`].
    pub fn from_json(path: &Path, bytes: &[u8], spec: &ModelSpec) -> Result<Self, LoadError> {
        let map = parse_object(path, bytes)?;
        let fields = Fields::new(path, &map);
        let mut eos = spec.eos.clone();
        for id in fields.token_ids("eos_token_id", spec.vocab_size)? {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        let bos = fields.token_ids("bos_token_id", spec.vocab_size)?.first().copied().or(spec.bos);
        let ranged = |field: &str, wanted: &str, accepts: fn(f64) -> bool| match fields.number(field)? {
            Some(value) if !accepts(value) => {
                Err(fields.bad(field, format!("must be {wanted}, but is {value}")))
            }
            value => Ok(value.map(|value| value as f32)),
        };
        let do_sample = fields.boolean("do_sample")?;
        let temperature = ranged("temperature", "at least 0", |x| x >= 0.0)?;
        Ok(Self {
            eos,
            bos,
            temperature: if do_sample == Some(false) { Some(0.0) } else { temperature },
            top_k: fields.u32("top_k")?,
            top_p: ranged("top_p", "in (0, 1]", |x| x > 0.0 && x <= 1.0)?,
            min_p: ranged("min_p", "in [0, 1]", |x| (0.0..=1.0).contains(&x))?,
            repetition_penalty: ranged("repetition_penalty", "over 0", |x| x > 0.0)?,
            max_new_tokens: fields.count("max_new_tokens", u32::MAX as usize)?.map(|n| n as u32),
            do_sample,
        })
    }
}
