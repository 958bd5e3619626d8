//! Products with resident matrices.

use crate::{
    cuda::{
        CudaExperts, CudaOps, CudaWeight,
        driver::Result,
        memory::DeviceBuffer,
        ops::{Linear, LinearEpilogue, LinearHeads, linear as queue_linear, linear_heads as queue_heads},
    },
    ops::{Activation, Epilogue},
};

pub(in crate::cuda) fn linear(
    ops: &CudaOps,
    out: &mut DeviceBuffer,
    x: &DeviceBuffer,
    weight: &CudaWeight,
    (rows, epilogue): (usize, Epilogue),
) -> Result<()> {
    let epilogue = match epilogue {
        Epilogue::Store => LinearEpilogue::Store,
        Epilogue::Add => LinearEpilogue::Add,
        Epilogue::Activate(activation) => LinearEpilogue::Activate(activation),
        Epilogue::SoftCap(cap) => LinearEpilogue::SoftCap(cap),
    };
    let CudaWeight { matrix, bias, n, k } = weight;
    let call = Linear { out, x, weight: matrix, bias: bias.as_ref(), rows, n: *n, k: *k, epilogue };
    queue_linear(&ops.device, call)
}

pub(in crate::cuda) fn linear_gated(
    ops: &CudaOps,
    out: &mut DeviceBuffer,
    x: &DeviceBuffer,
    weight: &CudaWeight,
    (rows, activation): (usize, Activation),
) -> Result<()> {
    let CudaWeight { matrix, bias, n, k } = weight;
    let epilogue = LinearEpilogue::Gated(activation);
    let call = Linear { out, x, weight: matrix, bias: bias.as_ref(), rows, n: n / 2, k: *k, epilogue };
    queue_linear(&ops.device, call)
}

pub(in crate::cuda) fn linear_heads(
    ops: &CudaOps,
    out: &mut DeviceBuffer,
    x: &DeviceBuffer,
    heads: &CudaExperts,
    rows: usize,
) -> Result<()> {
    let CudaExperts { matrix, bias, count, n, k } = heads;
    let (bias, heads) = (bias.as_ref(), *count);
    queue_heads(&ops.device, LinearHeads { out, x, weight: matrix, bias, rows, heads, n: *n, k: *k })
}
