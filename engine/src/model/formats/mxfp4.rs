//! MXFP4 experts as GPT-OSS stores them: `name_blocks` `[X, N, K / 32, 16]` and `name_scales` `[X, N, K / 32]`, both bytes.

use bytes::Bytes;
use safetensors::Dtype;
use tidemill_kernels::tensor::{HostMatrix, QuantFormat, QuantMatrix};

use super::{Parts, raw::repacked};
use crate::error::LoadError;

/// Scale and sixteen bytes of values.
const BLOCK: usize = 17;

/// The matrices of all experts, or nothing where there is no such tensor.
pub(super) fn stacked(parts: &Parts, count: usize) -> Result<Option<Vec<HostMatrix>>, LoadError> {
    let Parts { checkpoint, name, shape: [n, k] } = *parts;
    let Some(blocks) = checkpoint.raw(&format!("{name}_blocks")) else { return Ok(None) };
    if k == 0 || k % 32 != 0 {
        return Err(parts.bad("MXFP4 has groups of 32 inputs"));
    }
    let blocks = blocks.typed(Dtype::U8)?.shaped(&[count, n, k / 32, 16])?;
    let scales_name = format!("{name}_scales");
    let Some(scales) = checkpoint.raw(&scales_name) else {
        let (path, expected) = (checkpoint.path().to_path_buf(), vec![count, n, k / 32]);
        return Err(LoadError::MissingTensor { path, tensor: scales_name, expected });
    };
    let scales = scales.typed(Dtype::U8)?.shaped(&[count, n, k / 32])?;
    let matrix = n * k / 32 * BLOCK;
    let data = repacked(count * matrix, k / 32 * BLOCK, |row, out| {
        for (i, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let at = row * (k / 32) + i;
            out[0] = scales.data[at];
            out[1..].copy_from_slice(&blocks.data[16 * at..16 * at + 16]);
        }
    })?;
    let expert = |x: usize| QuantMatrix {
        name: format!("{name}[{x}]"),
        shape: [n, k],
        format: QuantFormat::Mxfp4,
        data: data.slice(x * matrix..(x + 1) * matrix),
        scales: Bytes::new(),
        offsets: Bytes::new(),
    };
    Ok(Some((0..count).map(|x| expert(x).into()).collect()))
}
