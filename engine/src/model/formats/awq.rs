//! AWQ (Lin et al. 2023, arXiv 2306.00978) as AutoAWQ's "gemm" version stores it: `qweight` `[K, N / 8]` and `qzeros` `[K / g, N / 8]`, eight
//! columns of N to a word, and `scales` `[K / g, N]`; `w = (q - zero) * scale`.

use safetensors::Dtype;
use serde_json::json;
use tidemill_kernels::tensor::{QuantFormat, QuantMatrix};

use super::{
    Parts, group_size, only,
    raw::{float_bytes, repacked},
};
use crate::{error::LoadError, model::fields::Fields};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) struct Awq {
    /// Rows of K that share a scale; all of them where absent.
    group: Option<usize>,
}

/// The shift at which a word has each of its columns: nibble `i` is of column `[0, 2, 4, 6, 1, 3, 5, 7][i]`.
const SHIFTS: [u32; 8] = [0, 16, 4, 20, 8, 24, 12, 28];

/// Words of a line of the cache, which are unpacked together.
const WORDS: usize = 16;

impl Awq {
    pub(super) fn read(config: &Fields<'_>) -> Result<Awq, LoadError> {
        only(config, "bits", &json!(4))?;
        only(config, "w_bit", &json!(4))?;
        only(config, "zero_point", &json!(true))?;
        if let Some(version) = config.string("version")?
            && !version.eq_ignore_ascii_case("gemm")
        {
            let detail = format!("is {version:?}; supported: \"gemm\". Instead, {}", super::INSTEAD);
            return Err(config.unsupported("version", detail));
        }
        let field = if config.has("q_group_size") { "q_group_size" } else { "group_size" };
        Ok(Awq { group: group_size(config, field)? })
    }

    pub(super) fn matrix(self, parts: &Parts) -> Result<QuantMatrix, LoadError> {
        let [n, k] = parts.shape;
        let group = self.group.unwrap_or(k).min(k);
        if n % 8 != 0 || k % 2 != 0 || group == 0 || k % group != 0 {
            return Err(parts.bad(format!("AWQ packs 8 outputs to a word, and groups of {group} inputs")));
        }
        let (words, groups) = (n / 8, k / group);
        let qweight = parts.require("qweight")?.typed(Dtype::I32)?.shaped(&[k, words])?;
        let qzeros = parts.require("qzeros")?.typed(Dtype::I32)?.shaped(&[groups, words])?;
        let scales = parts.require("scales")?.shaped(&[groups, n])?.floats()?;
        let data = repacked(n * k / 2, WORDS * 8 * k / 2, |piece, out| {
            let first = piece * WORDS;
            for pair in 0..k / 2 {
                for w in 0..out.len() / (8 * k / 2) {
                    let at = 2 * pair * words + first + w;
                    let (even, odd) = (qweight.word(at), qweight.word(at + words));
                    for (c, shift) in SHIFTS.iter().enumerate() {
                        let byte = (even >> shift & 15) | (odd >> shift & 15) << 4;
                        out[(8 * w + c) * (k / 2) + pair] = byte as u8;
                    }
                }
            }
        })?;
        let each = || (0..n).flat_map(|row| (0..groups).map(move |g| (row, g)));
        let zero = |row: usize, g: usize| qzeros.word(g * words + row / 8) >> SHIFTS[row % 8] & 15;
        Ok(QuantMatrix {
            name: qweight.name.clone(),
            shape: parts.shape,
            format: QuantFormat::Int4 { group },
            data,
            scales: float_bytes(each().map(|(row, g)| scales[g * n + row])),
            offsets: float_bytes(each().map(|(row, g)| -(zero(row, g) as f32) * scales[g * n + row])),
        })
    }
}
