//! `embedding.cu`.

use crate::{
    DType, KernelError,
    cuda::{
        Device,
        driver::{DevPtr, LaunchConfig, Result},
        memory::{DeviceBuffer, require_multiple},
        table::kernels,
        words::DeviceWords,
    },
};

kernels! {
    file "embedding";
    /// One block per token.
    fn embedding_bf16(out: DevPtr, table: DevPtr, token_ids: DevPtr, feedback: DevPtr, width: i32, scale: f32);
    /// One block per token.
    fn embedding_add_bf16(out: DevPtr, table: DevPtr, rows: DevPtr, first: u32, width: i32);
}

const OP: &str = "embedding";
const THREADS: u32 = 256;

/// Arguments of [`embedding`]. Letters as in [`crate::ops`].
pub struct Embedding<'a> {
    /// `[T, H]` bf16, written.
    pub out: &'a mut DeviceBuffer,
    /// `[V, H]` bf16.
    pub table: &'a DeviceBuffer,
    /// `[T]` ids below V, or [`FEEDBACK`](crate::ops::FEEDBACK) and an index into `feedback`.
    pub token_ids: DeviceWords<'a>,
    /// Ids that [`super::sample`] wrote. Without it no id may have that bit set.
    pub feedback: Option<DeviceWords<'a>>,
    /// H, a multiple of 8.
    pub width: usize,
    /// What the embedding is multiplied with; 1 copies the bits.
    pub scale: f32,
    /// T; 0 does nothing.
    pub tokens: usize,
}

/// Queues the embedding of a step's tokens; see [`crate::Ops::embedding`].
///
/// The ids are read on the device: that they are below V was checked when the request came in.
///
/// # Errors
/// A buffer that is smaller or of another type than the contract says; what the driver reports.
pub fn embedding(device: &Device, call: Embedding<'_>) -> Result<()> {
    let Embedding { out, table, token_ids, feedback, width, scale, tokens } = call;
    require_multiple(OP, "H", width, 8)?;
    if tokens == 0 {
        return Ok(());
    }
    if !table.elems().is_multiple_of(width) {
        let detail = format!("the table's {} elements are no rows of {width}", table.elems());
        return Err(KernelError::Unsupported { op: OP, detail });
    }
    let out = out.at_least(OP, "out", DType::Bf16, tokens * width)?;
    let table = table.at_least(OP, "table", DType::Bf16, width)?;
    let token_ids = token_ids.at_least(OP, "token_ids", tokens)?;
    let feedback = match feedback {
        Some(feedback) => feedback.at_least(OP, "feedback", 1)?,
        None => DevPtr::NULL,
    };
    let config = LaunchConfig::linear(tokens, THREADS);
    // SAFETY: out and token_ids were checked above; the ids lie below V, as the engine checks each request's, and the sampler writes no others.
    unsafe { embedding_bf16(device.driver(), config, out, table, token_ids, feedback, width as i32, scale) }
}

/// Arguments of [`embedding_add`].
pub struct EmbeddingAdd<'a> {
    /// `[T, H]` bf16, added to.
    pub out: &'a mut DeviceBuffer,
    /// `[_, H]` bf16.
    pub table: &'a DeviceBuffer,
    /// `[T]` rows of the table, counted from `first`.
    pub rows: DeviceWords<'a>,
    /// The row that 0 means.
    pub first: usize,
    /// H, a multiple of 8.
    pub width: usize,
    /// T; 0 does nothing.
    pub tokens: usize,
}

/// Queues `out[t, :] += table[rows[t] + first, :]`: positions and segments; see [`crate::ops::Lookup`].
///
/// # Errors
/// A buffer that is smaller or of another type than the contract says; what the driver reports.
pub fn embedding_add(device: &Device, call: EmbeddingAdd<'_>) -> Result<()> {
    let EmbeddingAdd { out, table, rows, first, width, tokens } = call;
    require_multiple(OP, "H", width, 8)?;
    if tokens == 0 {
        return Ok(());
    }
    let out = out.at_least(OP, "out", DType::Bf16, tokens * width)?;
    let table = table.at_least(OP, "table", DType::Bf16, (first + 1) * width)?;
    let rows = rows.at_least(OP, "rows", tokens)?;
    let config = LaunchConfig::linear(tokens, THREADS);
    // SAFETY: out and rows were checked above; positions and segments have their rows, as the engine checks each request's.
    unsafe { embedding_add_bf16(device.driver(), config, out, table, rows, first as u32, width as i32) }
}
