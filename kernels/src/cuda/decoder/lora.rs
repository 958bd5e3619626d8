//! Low-rank adapters.

use super::products;
use crate::{
    cuda::{
        CudaBatch, CudaOps, CudaWeight,
        driver::Result,
        memory::DeviceBuffer,
        ops::{
            Activation as Gate, LoraAdd, LoraMemory, LoraPlan, LoraRestore, activation as queue_activation,
            lora_add as queue_lora_add, lora_restore,
        },
    },
    ops::{Activation, Epilogue, LoraPart, LoraShape},
    tensor::DType,
};

/// Adapters of one matrix.
pub struct CudaLora(LoraMemory);

/// Where a step's words say who has which adapter.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct LoraStep {
    pub at: usize,
    pub plan: LoraPlan,
}

pub(in crate::cuda) fn lora(ops: &CudaOps, shape: &LoraShape) -> Result<CudaLora> {
    let memory = LoraMemory::new(&ops.device, shape)?;
    let mut uploader = ops.uploader.lock();
    uploader.words(memory.parts.ptr(), &memory.part_words())?;
    uploader.words(memory.table.ptr(), &vec![0; 2 * shape.slots * shape.parts.len()])?;
    drop(uploader);
    let elems = ops.config.max_tokens * shape.parts.len() * shape.max_rank;
    let mut low = ops.low.lock();
    if low.as_ref().is_none_or(|low| low.elems() < elems) {
        // Nothing that is queued may use what goes.
        ops.device.driver().synchronize()?;
        *low = None;
        *low = Some(ops.device.buffer(DType::F32, elems, "adapters")?);
    }
    Ok(CudaLora(memory))
}

pub(in crate::cuda) fn set_lora(
    ops: &CudaOps,
    lora: &mut CudaLora,
    slot: usize,
    parts: &[Option<LoraPart>],
) -> Result<()> {
    let CudaLora(memory) = lora;
    memory.shape.check(slot, parts)?;
    let mut uploader = ops.uploader.lock();
    let mut table = Vec::with_capacity(2 * parts.len());
    for (index, part) in parts.iter().enumerate() {
        if let Some(part) = part {
            uploader.copy(memory.a_of(slot, index), &part.a)?;
            uploader.copy(memory.b_of(slot, index), &part.transposed_b())?;
        }
        let entry = part.as_ref().map_or([0, 0], |part| [part.rank() as u32, part.scale.to_bits()]);
        table.extend(entry);
    }
    uploader.words(memory.table.ptr().offset(4 * 2 * slot * parts.len()), &table)
}

pub(in crate::cuda) fn lora_add(
    ops: &CudaOps,
    out: &mut DeviceBuffer,
    x: &DeviceBuffer,
    lora: &CudaLora,
    batch: &CudaBatch,
) -> Result<()> {
    let (Some(LoraStep { at, plan }), Some(low)) = (batch.lora, &*ops.low.lock()) else { return Ok(()) };
    let steps = ops.steps.lock();
    let words = steps.words(at, plan.words())?;
    queue_lora_add(&ops.device, LoraAdd { out, x, lora: &lora.0, low, words, plan })
}

/// The two halves of a gated block.
pub(in crate::cuda) struct Gated<'a> {
    pub out: &'a mut DeviceBuffer,
    pub scratch: &'a mut DeviceBuffer,
    pub x: &'a DeviceBuffer,
    pub weight: &'a CudaWeight,
    pub activation: Activation,
}

/// The product is rounded before an adapter is added to it. For tokens without one it must not be, so it is computed for them as ever.
pub(in crate::cuda) fn lora_gated(
    ops: &CudaOps,
    call: Gated<'_>,
    lora: &CudaLora,
    batch: &CudaBatch,
) -> Result<()> {
    let Gated { out, scratch, x, weight, activation } = call;
    let (rows, width) = (batch.extent.tokens, lora.0.shape.n() / 2);
    products::linear(ops, scratch, x, weight, (rows, Epilogue::Store))?;
    lora_add(ops, scratch, x, lora, batch)?;
    queue_activation(
        &ops.device,
        Gate { out: &mut *out, x: &*scratch, kind: activation, gated: true, width, rows },
    )?;
    let Some(LoraStep { at, plan }) = batch.lora else { return Ok(()) };
    if plan.tokens == plan.all_tokens {
        return Ok(());
    }
    products::linear_gated(ops, scratch, x, weight, (rows, activation))?;
    let steps = ops.steps.lock();
    let words = steps.words(at, plan.words())?;
    lora_restore(&ops.device, LoraRestore { out, from: scratch, words, plan, width })
}
