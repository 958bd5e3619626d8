//! Products with resident matrices.

use crate::{
    cuda::{
        CudaOps, CudaWeight,
        driver::Result,
        memory::DeviceBuffer,
        ops::{Linear, LinearEpilogue, linear as queue_linear},
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
