//! Formats of quantised checkpoints: what `quantization_config` says, and how stored tensors become a [`QuantMatrix`](tidemill_kernels::tensor::QuantMatrix).
//!
//! The tensors decide matrix by matrix: what stands there in bf16, f16 or f32 under its plain name is taken as it is, so lists of modules that were not
//! converted need no reading. Activations are never quantised, whatever the file says of them: products are at least as precise as it asks for.

mod awq;
mod compressed;
mod fp8;
mod gptq;
mod mxfp4;
mod quantize;
mod raw;

use std::path::Path;

use safetensors::Dtype;
use serde_json::Value;
use tidemill_kernels::tensor::HostMatrix;

pub(crate) use self::quantize::Quantized;
pub(super) use self::raw::Raw;
use super::{
    checkpoint::Checkpoint,
    fields::{Fields, parse_object},
    files::{CONFIG, ModelFiles},
    spec::TensorKind,
};
use crate::error::LoadError;

/// How the matrices of a checkpoint are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    /// bf16, f16 or f32.
    Plain,
    /// F8E4M3 with scales; `Some`: rows and columns of a block.
    Fp8(Option<[usize; 2]>),
    /// Four bits, in the order of AutoAWQ's "gemm".
    Awq(awq::Awq),
    /// Four or eight bits, packed along K.
    Gptq(gptq::Gptq),
    /// compressed-tensors: the tensors' names and types tell which.
    Compressed(compressed::Compressed),
    /// MXFP4 experts of GPT-OSS.
    Mxfp4,
}

/// What to do where a format is not ours.
const INSTEAD: &str =
    "take the unquantised checkpoint and quantise it at load with --quantization int8 or fp8, or a GGUF file";

impl Scheme {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// [`LoadError::Unsupported`] for a method or a variant of one that is not implemented, [`LoadError::Format`] for fields that make no sense.
    pub(super) fn read(files: &ModelFiles) -> Result<Scheme, LoadError> {
        let path = files.path(CONFIG);
        let map = parse_object(&path, &files.require(CONFIG)?)?;
        let top = Fields::new(&path, &map);
        // Models of text and images have the fields of their text part there.
        let text = top.object("text_config")?;
        for fields in [Some(top), text].into_iter().flatten() {
            for name in ["quantization_config", "compression_config"] {
                if let Some(config) = fields.object(name)? {
                    return Scheme::of(&config);
                }
            }
        }
        Ok(Scheme::Plain)
    }

    fn of(config: &Fields<'_>) -> Result<Scheme, LoadError> {
        let Some(method) = config.string("quant_method")? else {
            // bitsandbytes wrote its fields without a name at first.
            let bnb = config.has("load_in_4bit") || config.has("load_in_8bit");
            let detail = if bnb { "is missing: this looks like bitsandbytes" } else { "is missing" };
            return Err(config.unsupported("quant_method", format!("{detail}; {INSTEAD}")));
        };
        match method {
            "fp8" | "fbgemm_fp8" => fp8::read(config).map(Scheme::Fp8),
            "awq" => awq::Awq::read(config).map(Scheme::Awq),
            "gptq" => gptq::Gptq::read(config).map(Scheme::Gptq),
            "compressed-tensors" => compressed::Compressed::read(config).map(Scheme::Compressed),
            "mxfp4" => Ok(Scheme::Mxfp4),
            other => {
                let detail = format!(
                    "is {other:?}; supported: fp8, fbgemm_fp8, awq, gptq, compressed-tensors, mxfp4. Instead, {INSTEAD}"
                );
                Err(config.unsupported("quant_method", detail))
            }
        }
    }

    /// The matrix `name`, which has no plain tensor.
    ///
    /// # Errors
    /// Tensors that are missing, misshapen or of the wrong type, by name.
    pub(super) fn matrix(
        self,
        checkpoint: &Checkpoint,
        name: &str,
        shape: [usize; 2],
    ) -> Result<HostMatrix, LoadError> {
        let parts = Parts { checkpoint, name, shape };
        let matrix = match self {
            Scheme::Fp8(block) => fp8::matrix(&parts, block)?,
            Scheme::Awq(awq) => awq.matrix(&parts)?,
            Scheme::Gptq(gptq) => gptq.matrix(&parts)?,
            Scheme::Compressed(compressed) => compressed.matrix(&parts)?,
            Scheme::Plain | Scheme::Mxfp4 => {
                let weight = parts.require("weight")?;
                return Err(
                    weight.unsupported("config.json has no quantization_config that says what it means")
                );
            }
        };
        Ok(HostMatrix::Quantized(matrix))
    }

    /// The tensor that stands for `name`, if that is quantised.
    pub(super) fn stored_as(self, checkpoint: &Checkpoint, name: &str, kind: TensorKind) -> Option<String> {
        let matrix = || name.strip_suffix(".weight").filter(|_| kind == TensorKind::Matrix);
        let is_plain = |raw: &Raw| matches!(raw.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
        let stored = match self {
            Scheme::Plain => return None,
            Scheme::Mxfp4 if kind == TensorKind::Experts => format!("{name}_blocks"),
            Scheme::Mxfp4 => return None,
            Scheme::Awq(_) | Scheme::Gptq(_) => format!("{}.qweight", matrix()?),
            Scheme::Fp8(_) | Scheme::Compressed(_) => {
                let packed = format!("{}.weight_packed", matrix()?);
                if checkpoint.contains(&packed) { packed } else { name.to_owned() }
            }
        };
        checkpoint.raw(&stored).is_some_and(|raw| !is_plain(&raw)).then_some(stored)
    }

    /// The matrices of experts that one quantised tensor holds; `None` where `name` is stored in another way.
    ///
    /// # Errors
    /// As [`Scheme::matrix`].
    pub(super) fn experts(
        self,
        checkpoint: &Checkpoint,
        name: &str,
        [count, n, k]: [usize; 3],
    ) -> Result<Option<Vec<HostMatrix>>, LoadError> {
        match self {
            Scheme::Mxfp4 => mxfp4::stacked(&Parts { checkpoint, name, shape: [n, k] }, count),
            _ => Ok(None),
        }
    }
}

/// Where the tensors of one matrix `[N, K]` are.
struct Parts<'a> {
    checkpoint: &'a Checkpoint,
    name: &'a str,
    shape: [usize; 2],
}

impl<'a> Parts<'a> {
    fn get(&self, suffix: &str) -> Option<Raw<'a>> {
        self.checkpoint.raw(&self.join(suffix))
    }

    fn require(&self, suffix: &str) -> Result<Raw<'a>, LoadError> {
        self.get(suffix).ok_or_else(|| {
            let (path, tensor) = (self.checkpoint.path().to_path_buf(), self.join(suffix));
            LoadError::MissingTensor { path, tensor, expected: self.shape.into() }
        })
    }

    fn join(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.name)
    }

    /// What is wrong with the matrix as a whole.
    fn bad(&self, detail: impl std::fmt::Display) -> LoadError {
        let path = self.checkpoint.path().to_path_buf();
        LoadError::Format { path, detail: format!("matrix {:?} {:?}: {detail}", self.name, self.shape) }
    }
}

/// Columns of a group, from a field that says -1 for all of them: `None`.
fn group_size(config: &Fields<'_>, field: &str) -> Result<Option<usize>, LoadError> {
    match config.get(field) {
        None => Ok(None),
        Some(value) if value.as_i64() == Some(-1) => Ok(None),
        Some(_) => match config.required_count(field, 1 << 24)? {
            group if group.is_multiple_of(16) => Ok(Some(group)),
            group => Err(config.unsupported(field, format!("is {group}; supported: multiples of 16, or -1"))),
        },
    }
}

/// A field that must have this value where it is there.
fn only(config: &Fields<'_>, field: &str, wanted: &Value) -> Result<(), LoadError> {
    match config.get(field) {
        Some(value) if value != wanted => {
            Err(config.unsupported(field, format!("is {value}; supported: {wanted}. Instead, {INSTEAD}")))
        }
        _ => Ok(()),
    }
}

/// Refuses a file by name.
pub(super) fn unsupported(path: &Path, detail: String) -> LoadError {
    LoadError::Unsupported { path: path.to_path_buf(), detail }
}
