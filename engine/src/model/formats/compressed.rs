//! compressed-tensors: `weight_packed` (four or eight bits, packed along K), or `weight` in I8 or F8E4M3, with `weight_scale` and perhaps
//! `weight_zero_point`. `w = (q - zero) * scale`.

use bytes::Bytes;
use safetensors::Dtype;
use serde_json::json;
use tidemill_kernels::tensor::{QuantFormat, QuantMatrix};

use super::{
    Parts, Raw, fp8, only,
    raw::{float_bytes, repacked},
};
use crate::{error::LoadError, model::fields::Fields};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) struct Compressed {
    /// 4 or 8.
    bits: usize,
    /// Rows and columns of a block that shares a scale, for F8E4M3.
    block: Option<[usize; 2]>,
}

const FORMATS: [&str; 5] = ["dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"];

impl Compressed {
    pub(super) fn read(config: &Fields<'_>) -> Result<Compressed, LoadError> {
        let refuse = |config: &Fields<'_>, field: &str, detail: String| {
            Err(config.unsupported(field, format!("{detail}. Instead, {}", super::INSTEAD)))
        };
        if let Some(format) = config.string("format")?
            && !FORMATS.contains(&format)
        {
            return refuse(config, "format", format!("is {format:?}; supported: {}", FORMATS.join(", ")));
        }
        if let Some(sparsity) = config.object("sparsity_config")?
            && let Some(format) = sparsity.string("format")?
            && format != "dense"
        {
            return refuse(&sparsity, "format", format!("is {format:?}; sparse weights are not supported"));
        }
        let mut all = None;
        let Some(groups) = config.object("config_groups")? else {
            return Err(config.bad("config_groups", "is missing"));
        };
        for name in groups.names() {
            let Some(group) = groups.object(name)? else { continue };
            let Some(weights) = group.object("weights")? else { continue };
            let one = Self::weights(&weights)?;
            if all.is_some_and(|all| all != one) {
                return refuse(&groups, name, "differs from other groups in bits or blocks".to_owned());
            }
            all = Some(one);
        }
        all.ok_or_else(|| config.bad("config_groups", "has no group with weights"))
    }

    fn weights(weights: &Fields<'_>) -> Result<Compressed, LoadError> {
        let bits = weights.required_count("num_bits", 32)?;
        let is_float = weights.string("type")? == Some("float");
        if !(bits == 8 || bits == 4 && !is_float) {
            let detail = format!("is {bits}; supported: integers of 4 and 8 bits, and floats of 8");
            return Err(weights.unsupported("num_bits", format!("{detail}. Instead, {}", super::INSTEAD)));
        }
        // "weight" and "static" reorder nothing that is stored; groups of the order of activations have a `weight_g_idx`.
        only(weights, "dynamic", &json!(false))?;
        let block =
            match weights.get("block_structure").filter(|_| weights.get("strategy") == Some(&json!("block")))
            {
                None => None,
                Some(value) => Some(fp8::block(value).ok_or_else(|| {
                    let detail = format!("is {value}; supported: two numbers, the second a multiple of 16");
                    weights.unsupported("block_structure", detail)
                })?),
            };
        Ok(Compressed { bits, block })
    }

    pub(super) fn matrix(self, parts: &Parts) -> Result<QuantMatrix, LoadError> {
        if let Some(g_idx) = parts.get("weight_g_idx") {
            let detail = "says that groups are in the order of activations, which is not supported; take a checkpoint made with actorder \
                          null or \"weight\" without it";
            return Err(g_idx.unsupported(detail));
        }
        let data = match parts.get("weight_packed") {
            Some(packed) => self.packed(parts, packed)?,
            None => {
                let weight = parts.require("weight")?.shaped(&parts.shape)?;
                match weight.dtype {
                    Dtype::F8_E4M3 => return fp8::matrix(parts, self.block),
                    Dtype::I8 => weight.data,
                    _ => {
                        let detail = "is no type of weights here; supported: I8, F8_E4M3, BF16, F16, F32";
                        return Err(weight.unsupported(detail));
                    }
                }
            }
        };
        let packed = parts.get("weight_packed").is_some();
        self.with_scales(parts, data, packed)
    }

    /// Words hold their numbers lowest first, and numbers are moved up to be positive, so four bits are as ours already.
    fn packed(self, parts: &Parts, packed: Raw) -> Result<Bytes, LoadError> {
        let [n, k] = parts.shape;
        let pack = 32 / self.bits;
        if k % pack != 0 {
            return Err(parts.bad(format!("the width is no multiple of {pack}, as many as a word holds")));
        }
        let packed = packed.typed(Dtype::I32)?.shaped(&[n, k / pack])?;
        if self.bits == 4 {
            return Ok(packed.data);
        }
        repacked(n * k, 1 << 20, |piece, out| {
            for (o, b) in out.iter_mut().zip(&packed.data[piece << 20..]) {
                *o = b ^ 0x80;
            }
        })
    }

    fn with_scales(self, parts: &Parts, data: Bytes, packed: bool) -> Result<QuantMatrix, LoadError> {
        let [n, k] = parts.shape;
        let scale = parts.require("weight_scale")?;
        // For all, for each row, or for groups of each row.
        let (columns, stored_rows) = match *scale.shape {
            [] | [1] => (1, 1),
            [rows] if rows == n => (1, n),
            [rows, columns] if rows == n && columns > 0 && k % columns == 0 => (columns, n),
            [1, 1] => (1, 1),
            _ => {
                return Err(scale
                    .shaped(&[n, 1])
                    .err()
                    .unwrap_or_else(|| parts.bad("scales of another shape")));
            }
        };
        let group = k / columns;
        if group != k && group % 16 != 0 {
            return Err(
                scale.unsupported(&format!("makes groups of {group} columns; supported: multiples of 16"))
            );
        }
        let stored = scale.floats()?;
        let scales: Vec<f32> =
            (0..n * columns).map(|i| stored[if stored_rows == n { i } else { 0 }]).collect();
        let zeros = self.zeros(parts, n, columns, stored_rows)?;
        // What is packed was moved up by half the range; eight bits moved down again.
        let middle = if packed && self.bits == 4 { 8.0 } else { 0.0 };
        let offset = |i: usize| -(middle + zeros.as_ref().map_or(0.0, |zeros| zeros[i])) * scales[i];
        let offsets = if middle == 0.0 && zeros.is_none() {
            Bytes::new()
        } else {
            float_bytes((0..n * columns).map(offset))
        };
        let four = packed && self.bits == 4;
        Ok(QuantMatrix {
            name: format!("{}.weight", parts.name),
            shape: parts.shape,
            format: if four { QuantFormat::Int4 { group } } else { QuantFormat::Int8 { group } },
            data,
            scales: float_bytes(scales.iter().copied()),
            offsets,
        })
    }

    /// Signed zero points, one for each scale: in I8, or packed along N.
    fn zeros(
        self,
        parts: &Parts,
        n: usize,
        columns: usize,
        stored_rows: usize,
    ) -> Result<Option<Vec<f32>>, LoadError> {
        let Some(zeros) = parts.get("weight_zero_point") else { return Ok(None) };
        let values = n * columns;
        if zeros.dtype == Dtype::I8 {
            if zeros.shape.iter().product::<usize>() != stored_rows * columns {
                return Err(zeros
                    .shaped(&[stored_rows, columns])
                    .err()
                    .unwrap_or_else(|| parts.bad("zero points")));
            }
            let at = |i: usize| f32::from(zeros.data[if stored_rows == n { i } else { 0 }] as i8);
            return Ok(Some((0..values).map(at).collect()));
        }
        let (pack, middle) = (32 / self.bits, 1 << (self.bits - 1));
        let zeros = zeros.typed(Dtype::I32)?.shaped(&[n.div_ceil(pack), columns])?;
        let at = |i: usize| {
            let (row, column) = (i / columns, i % columns);
            let word = zeros.word(row / pack * columns + column);
            let stored = word >> (row % pack * self.bits) & ((1 << self.bits) - 1);
            (stored as i32 - middle) as f32
        };
        Ok(Some((0..values).map(at).collect()))
    }
}
