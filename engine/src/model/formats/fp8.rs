//! F8E4M3 weights with a scale for the whole matrix, for each row, or for each block (DeepSeek-V3, arXiv 2412.19437, section 3.3).

use safetensors::Dtype;
use tidemill_kernels::tensor::{QuantFormat, QuantMatrix};

use super::{Parts, raw::float_bytes};
use crate::{error::LoadError, model::fields::Fields};

/// Rows and columns of a block, where there are blocks.
pub(super) fn read(config: &Fields<'_>) -> Result<Option<[usize; 2]>, LoadError> {
    let field = "weight_block_size";
    let Some(value) = config.get(field) else { return Ok(None) };
    block(value).map(Some).ok_or_else(|| {
        config.unsupported(field, format!("is {value}; supported: two numbers, the second a multiple of 16"))
    })
}

/// Two positive numbers that our products can use.
pub(super) fn block(value: &serde_json::Value) -> Option<[usize; 2]> {
    let [rows, columns] = value.as_array()?.as_slice() else { return None };
    let number =
        |v: &serde_json::Value| v.as_u64().filter(|&n| (1..=1 << 24).contains(&n)).map(|n| n as usize);
    let (rows, columns) = (number(rows)?, number(columns)?);
    columns.is_multiple_of(16).then_some([rows, columns])
}

/// `weight` `[N, K]` in F8E4M3 with `weight_scale_inv` or `weight_scale`. (The name of the former notwithstanding, weights are multiplied with it.)
pub(super) fn matrix(parts: &Parts, block: Option<[usize; 2]>) -> Result<QuantMatrix, LoadError> {
    let [n, k] = parts.shape;
    let weight = parts.require("weight")?.shaped(&parts.shape)?;
    if weight.dtype != Dtype::F8_E4M3 {
        return Err(weight.unsupported("is no type of weights here; supported: F8_E4M3, BF16, F16, F32"));
    }
    let scale = match parts.get("weight_scale_inv") {
        Some(scale) => scale,
        None => parts.require("weight_scale")?,
    };
    let blocks = block.map(|[rows, columns]| [n.div_ceil(rows), k.div_ceil(columns)]);
    let [rows, columns] = match (scale.shape, block, blocks) {
        (shape, Some(block), Some(blocks)) if shape == blocks => block,
        ([] | [1] | [1, 1], None, _) => [n, k],
        (&[m] | &[m, 1], None, _) if m == n => [1, k],
        _ => {
            let expected = blocks.map_or_else(|| vec![n, 1], Vec::from);
            return Err(scale
                .shaped(&expected)
                .err()
                .unwrap_or_else(|| parts.bad("scales of another shape")));
        }
    };
    Ok(QuantMatrix {
        name: weight.name,
        shape: parts.shape,
        format: QuantFormat::Fp8 { rows: rows.max(1), columns: columns.max(1) },
        data: weight.data,
        scales: float_bytes(scale.floats()?),
        offsets: bytes::Bytes::new(),
    })
}
