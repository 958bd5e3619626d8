//! Ops over rows: lookups, norms, sums.

use std::ops::Range;

use crate::{
    cuda::{
        CudaBatch, CudaOps, CudaWeight,
        driver::Result,
        memory::DeviceBuffer,
        ops::{
            Embedding, EmbeddingAdd, GatherRows, Norm as NormCall, embedding as embed, embedding_add,
            gather_rows as gather, norm as queue_norm, whole_rows,
        },
    },
    ops::{Lookup, Norm, Slices},
};

pub(in crate::cuda) fn embedding(
    ops: &CudaOps,
    out: &mut DeviceBuffer,
    table: &CudaWeight,
    batch: &CudaBatch,
    lookup: Lookup,
) -> Result<()> {
    let steps = ops.steps.lock();
    let CudaBatch { extent, layout, .. } = batch;
    let (tokens, width, table) = (extent.tokens, table.k, table.matrix.bf16("embedding")?);
    let (section, first) = match lookup {
        Lookup::Tokens { scale } => {
            let token_ids = steps.words(layout.token_ids, tokens)?;
            let feedback = Some(steps.feedback());
            let call = Embedding { out, table, token_ids, feedback, width, scale, tokens };
            return embed(&ops.device, call);
        }
        Lookup::Positions { offset } => (layout.positions, offset),
        Lookup::Segments => (layout.segments, 0),
    };
    let rows = steps.words(section, tokens)?;
    embedding_add(&ops.device, EmbeddingAdd { out, table, rows, first, width, tokens })
}

/// `out = norm(x)`, or `out += norm(x)`.
pub(in crate::cuda) fn norm(
    ops: &CudaOps,
    out: &mut DeviceBuffer,
    x: &DeviceBuffer,
    form: Norm<'_, DeviceBuffer>,
    (rows, add): (usize, bool),
) -> Result<()> {
    let (Norm::Rms { weight, .. } | Norm::Layer { weight, .. }) = form;
    let slices = whole_rows(rows, weight.elems());
    queue_norm(&ops.device, NormCall { out, x: Some(x), form, slices, add })
}

pub(in crate::cuda) fn norm_slices(
    ops: &CudaOps,
    x: &mut DeviceBuffer,
    form: Norm<'_, DeviceBuffer>,
    slices: Slices,
) -> Result<()> {
    queue_norm(&ops.device, NormCall { out: x, x: None, form, slices, add: false })
}

pub(in crate::cuda) fn gather_rows(
    ops: &CudaOps,
    out: &mut DeviceBuffer,
    x: &DeviceBuffer,
    batch: &CudaBatch,
    (rows, width): (Range<usize>, usize),
) -> Result<()> {
    let steps = ops.steps.lock();
    let logits_indices = steps.words(batch.layout.logits_indices + rows.start, rows.len())?;
    gather(&ops.device, GatherRows { out, x, logits_indices, width, rows: rows.len() })
}
