//! GPTQ (Frantar et al. 2022, arXiv 2210.17323) as AutoGPTQ and GPTQModel store it: `qweight` `[K / p, N]`, `p` rows of K to a word, the first lowest;
//! `qzeros` `[K / g, N / p]`, `scales` `[K / g, N]`, and `g_idx` `[K]`, the group of each row; `w = (q - zero) * scale`.

use bytes::Bytes;
use safetensors::Dtype;
use tidemill_kernels::tensor::{QuantFormat, QuantMatrix};

use super::{
    Parts, group_size,
    raw::{float_bytes, transposed_words},
};
use crate::{error::LoadError, model::fields::Fields};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) struct Gptq {
    /// 4 or 8.
    bits: usize,
    /// Rows of K that share a scale; all of them where absent.
    group: Option<usize>,
    /// Whether a stored zero is one less than what is meant, as in the first version of the format.
    zeros_less_one: bool,
}

impl Gptq {
    pub(super) fn read(config: &Fields<'_>) -> Result<Gptq, LoadError> {
        let bits = config.required_count("bits", 32)?;
        if bits != 4 && bits != 8 {
            let detail = format!("is {bits}; supported: 4 and 8. Instead, {}", super::INSTEAD);
            return Err(config.unsupported("bits", detail));
        }
        let zeros_less_one = match config.string("checkpoint_format")? {
            None | Some("gptq") => true,
            Some("gptq_v2") => false,
            Some(other) => {
                let detail =
                    format!("is {other:?}; supported: \"gptq\", \"gptq_v2\". Instead, {}", super::INSTEAD);
                return Err(config.unsupported("checkpoint_format", detail));
            }
        };
        Ok(Gptq { bits, group: group_size(config, "group_size")?, zeros_less_one })
    }

    pub(super) fn matrix(self, parts: &Parts) -> Result<QuantMatrix, LoadError> {
        let [n, k] = parts.shape;
        let (pack, group) = (32 / self.bits, self.group.unwrap_or(k).min(k));
        if n % pack != 0 || k % pack != 0 || group == 0 || k % group != 0 {
            return Err(
                parts.bad(format!("GPTQ packs {pack} numbers to a word, and groups of {group} inputs"))
            );
        }
        let groups = k / group;
        let qweight = parts.require("qweight")?.typed(Dtype::I32)?.shaped(&[k / pack, n])?;
        let qzeros = parts.require("qzeros")?.typed(Dtype::I32)?.shaped(&[groups, n / pack])?;
        let scales = parts.require("scales")?.shaped(&[groups, n])?.floats()?;
        self.check_order(parts, group)?;
        // A row's words are its bytes; ours are signed where there are eight bits.
        let eight = self.bits == 8;
        let data = transposed_words(&qweight, k / pack, n, if eight { 0x80 } else { 0 })?;
        let zero = |row: usize, g: usize| {
            let word = qzeros.word(g * (n / pack) + row / pack);
            let stored = word >> (row % pack * self.bits) & ((1 << self.bits) - 1);
            stored as f32 + if self.zeros_less_one { 1.0 } else { 0.0 }
        };
        let middle = if eight { 128.0 } else { 0.0 };
        let each = || (0..n).flat_map(|row| (0..groups).map(move |g| (row, g)));
        Ok(QuantMatrix {
            name: qweight.name.clone(),
            shape: parts.shape,
            format: if eight { QuantFormat::Int8 { group } } else { QuantFormat::Int4 { group } },
            data,
            scales: float_bytes(each().map(|(row, g)| scales[g * n + row])),
            offsets: without_zeros(each().map(|(row, g)| (middle - zero(row, g)) * scales[g * n + row])),
        })
    }

    /// Groups must be of neighbours.
    fn check_order(self, parts: &Parts, group: usize) -> Result<(), LoadError> {
        let Some(g_idx) = parts.get("g_idx") else { return Ok(()) };
        let g_idx = g_idx.typed(Dtype::I32)?.shaped(&[parts.shape[1]])?;
        if (0..parts.shape[1]).all(|i| g_idx.word(i) as usize == i / group) {
            return Ok(());
        }
        let detail = "is in the order of activations (desc_act), which is not supported; take a checkpoint made with desc_act=false";
        Err(g_idx.unsupported(detail))
    }
}

/// Offsets, or nothing where all of them are 0.
fn without_zeros(offsets: impl Iterator<Item = f32> + Clone) -> Bytes {
    if offsets.clone().all(|offset| offset == 0.0) { Bytes::new() } else { float_bytes(offsets) }
}
