//! The ops of the decoder on a GPU.

use std::{ops::Range, sync::Arc};

use parking_lot::Mutex;

use super::{
    CudaBatch, CudaConfig, CudaExperts, CudaHostKv, CudaKvCache, CudaLora, CudaPending, CudaRoutes, Device,
    decoder::{attention, cache, experts, lora, products, rows, step},
    driver::Result,
    memory::DeviceBuffer,
    ops::{AddGated, add, add_gated},
    steps::Steps,
    weights::{CudaWeight, Uploader},
};
use crate::{
    ops::{
        Activation, BatchMeta, BlockCopy, Epilogue, Extent, HeadShape, KvShape, LatentShape, Lookup,
        LoraPart, LoraShape, Norm, Ops, QkTransform, Rotary, Routing, Scoring, Slices, StepResults,
    },
    sampling::RowTask,
    tensor::{DType, ExpertParts, HostMatrix, HostTensor},
};

/// A GPU as a device of the decoder. Everything is queued on one stream.
pub struct CudaOps {
    // Dropped in this order: what is queued ends first.
    pub(super) steps: Mutex<Steps>,
    pub(super) uploader: Mutex<Uploader>,
    /// Between the two products of adapters, where there are any.
    pub(super) low: Mutex<Option<DeviceBuffer>>,
    pub(super) device: Device,
    pub(super) config: CudaConfig,
}

impl CudaOps {
    /// Allocates what all steps share.
    ///
    /// # Errors
    /// [`crate::KernelError::OutOfMemory`]; [`crate::KernelError::Unsupported`] for a model that the kernels cannot take.
    pub fn new(device: Device, config: CudaConfig) -> Result<Self> {
        config.attention.check()?;
        Ok(Self {
            steps: Mutex::new(Steps::new(&device, &config, config.max_logits_rows())?),
            uploader: Mutex::new(Uploader::new(&device)?),
            low: Mutex::default(),
            device,
            config,
        })
    }

    /// Bytes of device memory that are left when `share` of all of it may be used.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn memory_left(&self, share: f64) -> Result<usize> {
        let driver = self.device.driver();
        driver.synchronize()?;
        let kept = (driver.info().total_memory as f64 * (1.0 - share)) as usize;
        Ok(driver.free_memory()?.saturating_sub(kept))
    }
}

impl Ops for CudaOps {
    type Buffer = DeviceBuffer;
    type Weight = CudaWeight;
    type Vector = DeviceBuffer;
    type Experts = CudaExperts;
    type Lora = CudaLora;
    type Routes = CudaRoutes;
    type KvCache = CudaKvCache;
    type HostKv = CudaHostKv;
    type Batch = CudaBatch;
    type Pending = CudaPending;

    fn buffer(&self, elems: usize) -> Result<DeviceBuffer> {
        self.device.buffer(DType::Bf16, elems, "activations")
    }

    fn logits_buffer(&self, elems: usize) -> Result<DeviceBuffer> {
        self.device.buffer(DType::F32, elems, "logits")
    }

    fn scratch_buffer(&self, _elems: usize) -> Result<DeviceBuffer> {
        self.buffer(0)
    }

    fn max_logits_rows(&self) -> usize {
        self.config.max_logits_rows()
    }

    fn decode_sizes(&self) -> Vec<usize> {
        let steps = self.steps.lock();
        if steps.graphs.sizes().is_empty() { vec![1] } else { steps.graphs.sizes().to_vec() }
    }

    fn weight(&self, parts: &[HostMatrix], bias: &[HostTensor]) -> Result<CudaWeight> {
        self.uploader.lock().weight(parts, bias)
    }

    fn table(&self, matrix: &HostMatrix) -> Result<CudaWeight> {
        self.uploader.lock().table(matrix)
    }

    fn experts(&self, experts: &[ExpertParts]) -> Result<CudaExperts> {
        self.uploader.lock().experts(experts)
    }

    fn lora(&self, shape: &LoraShape) -> Result<CudaLora> {
        lora::lora(self, shape)
    }

    fn set_lora(&self, lora: &mut CudaLora, slot: usize, parts: &[Option<LoraPart>]) -> Result<()> {
        lora::set_lora(self, lora, slot, parts)
    }

    fn routes(&self, tokens: usize, routing: &Routing) -> Result<CudaRoutes> {
        experts::routes(self, tokens, routing)
    }

    fn vector(&self, values: &[f32]) -> Result<DeviceBuffer> {
        self.uploader.lock().vector(values)
    }

    fn kv_cache(&self, shape: KvShape) -> Result<CudaKvCache> {
        cache::kv_cache(self, shape)
    }

    fn host_kv(&self, shape: KvShape) -> Result<CudaHostKv> {
        cache::host_kv(self, shape)
    }

    fn copy_blocks(&self, kv: &mut CudaKvCache, host: &mut CudaHostKv, copies: &[BlockCopy]) -> Result<()> {
        cache::copy_blocks(self, kv, host, copies)
    }

    fn synchronize(&self) -> Result<()> {
        self.device.driver().synchronize()
    }

    fn upload(&self, meta: Arc<BatchMeta>, tasks: Arc<[RowTask]>) -> Result<CudaBatch> {
        step::upload(self, meta, tasks)
    }

    fn extent(&self, batch: &CudaBatch) -> Extent {
        batch.extent
    }

    fn run(&self, batch: &CudaBatch, ops: impl FnMut() -> Result<()> + Send) -> Result<()> {
        step::run(self, batch, ops)
    }

    fn embedding(
        &self,
        out: &mut DeviceBuffer,
        table: &CudaWeight,
        batch: &CudaBatch,
        lookup: Lookup,
    ) -> Result<()> {
        rows::embedding(self, out, table, batch, lookup)
    }

    fn norm(
        &self,
        out: &mut DeviceBuffer,
        x: &DeviceBuffer,
        norm: Norm<'_, DeviceBuffer>,
        rows: usize,
    ) -> Result<()> {
        rows::norm(self, out, x, norm, (rows, false))
    }

    fn norm_add(
        &self,
        out: &mut DeviceBuffer,
        x: &DeviceBuffer,
        norm: Norm<'_, DeviceBuffer>,
        rows: usize,
    ) -> Result<()> {
        rows::norm(self, out, x, norm, (rows, true))
    }

    fn norm_slices(&self, x: &mut DeviceBuffer, norm: Norm<'_, DeviceBuffer>, slices: Slices) -> Result<()> {
        rows::norm_slices(self, x, norm, slices)
    }

    fn linear(
        &self,
        out: &mut DeviceBuffer,
        x: &DeviceBuffer,
        weight: &CudaWeight,
        rows: usize,
        epilogue: Epilogue,
    ) -> Result<()> {
        products::linear(self, out, x, weight, (rows, epilogue))
    }

    fn rope_kv_write(
        &self,
        qkv: &mut DeviceBuffer,
        kv: &mut CudaKvCache,
        transform: QkTransform<'_, DeviceBuffer>,
        batch: &CudaBatch,
        heads: HeadShape,
        layer: usize,
    ) -> Result<()> {
        attention::rope_kv_write(self, qkv, kv.layer(layer), transform, (batch, heads))
    }

    fn paged_attention(
        &self,
        out: &mut DeviceBuffer,
        qkv: &DeviceBuffer,
        kv: &CudaKvCache,
        batch: &CudaBatch,
        heads: HeadShape,
        scoring: Scoring<'_, DeviceBuffer>,
        layer: usize,
    ) -> Result<()> {
        attention::paged_attention(self, out, qkv, kv.layer(layer), (batch, heads, scoring))
    }

    fn latent_kv_write(
        &self,
        q_rope: &mut DeviceBuffer,
        latent: &mut DeviceBuffer,
        kv: &mut CudaKvCache,
        norm: Norm<'_, DeviceBuffer>,
        rotary: Rotary<'_, DeviceBuffer>,
        batch: &CudaBatch,
        shape: LatentShape,
        layer: usize,
    ) -> Result<()> {
        attention::latent_kv_write(self, (q_rope, latent), kv.layer(layer), (norm, rotary), (batch, shape))
    }

    fn latent_attention(
        &self,
        out: &mut DeviceBuffer,
        q_latent: &DeviceBuffer,
        q_rope: &DeviceBuffer,
        kv: &CudaKvCache,
        batch: &CudaBatch,
        shape: LatentShape,
        scale: f32,
        layer: usize,
    ) -> Result<()> {
        attention::latent_attention(self, out, (q_latent, q_rope), kv.layer(layer), (batch, shape, scale))
    }

    fn linear_heads(
        &self,
        out: &mut DeviceBuffer,
        x: &DeviceBuffer,
        heads: &CudaExperts,
        rows: usize,
    ) -> Result<()> {
        products::linear_heads(self, out, x, heads, rows)
    }

    fn linear_gated(
        &self,
        out: &mut DeviceBuffer,
        _scratch: &mut DeviceBuffer,
        x: &DeviceBuffer,
        weight: &CudaWeight,
        rows: usize,
        activation: Activation,
    ) -> Result<()> {
        products::linear_gated(self, out, x, weight, (rows, activation))
    }

    fn has_adapters(&self, batch: &CudaBatch) -> bool {
        batch.lora.is_some()
    }

    fn lora_add(
        &self,
        out: &mut DeviceBuffer,
        x: &DeviceBuffer,
        lora: &CudaLora,
        batch: &CudaBatch,
    ) -> Result<()> {
        lora::lora_add(self, out, x, lora, batch)
    }

    fn lora_gated(
        &self,
        out: &mut DeviceBuffer,
        scratch: &mut DeviceBuffer,
        x: &DeviceBuffer,
        weight: &CudaWeight,
        lora: &CudaLora,
        batch: &CudaBatch,
        activation: Activation,
    ) -> Result<()> {
        lora::lora_gated(self, lora::Gated { out, scratch, x, weight, activation }, lora, batch)
    }

    fn add_gated(
        &self,
        out: &mut DeviceBuffer,
        x: &DeviceBuffer,
        gate: &DeviceBuffer,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        add_gated(&self.device, AddGated { out, x, gate, rows, width })
    }

    fn add(&self, out: &mut DeviceBuffer, x: &DeviceBuffer, elems: usize) -> Result<()> {
        add(&self.device, out, x, elems)
    }

    fn moe_route(
        &self,
        routes: &mut CudaRoutes,
        logits: &DeviceBuffer,
        bias: Option<&DeviceBuffer>,
        routing: &Routing,
        rows: usize,
    ) -> Result<()> {
        experts::moe_route(self, routes, logits, bias, (routing, rows))
    }

    fn moe_gated(
        &self,
        out: &mut DeviceBuffer,
        _scratch: &mut DeviceBuffer,
        x: &DeviceBuffer,
        experts: &CudaExperts,
        routes: &CudaRoutes,
        rows: usize,
        activation: Activation,
    ) -> Result<()> {
        experts::moe_gated(self, out, x, experts, (routes, rows, activation))
    }

    fn moe_combine(
        &self,
        out: &mut DeviceBuffer,
        scratch: &mut DeviceBuffer,
        x: &DeviceBuffer,
        experts: &CudaExperts,
        routes: &CudaRoutes,
        rows: usize,
    ) -> Result<()> {
        experts::moe_combine(self, (out, scratch), x, experts, (routes, rows))
    }

    fn gather_rows(
        &self,
        out: &mut DeviceBuffer,
        x: &DeviceBuffer,
        batch: &CudaBatch,
        rows: Range<usize>,
        width: usize,
    ) -> Result<()> {
        rows::gather_rows(self, out, x, batch, (rows, width))
    }

    fn sample(
        &self,
        logits: &mut DeviceBuffer,
        _vocab: usize,
        batch: &CudaBatch,
        rows: Range<usize>,
    ) -> Result<()> {
        step::sample(self, logits, batch, rows)
    }

    fn states(&self, x: &DeviceBuffer, batch: &CudaBatch, width: usize) -> Result<()> {
        step::states(self, x, batch, width)
    }

    fn results(&self, batch: CudaBatch) -> Result<CudaPending> {
        step::results(self, batch)
    }

    fn is_done(&self, pending: &CudaPending) -> bool {
        // An error is reported by the wait, which then returns at once.
        pending.slot.is_there().unwrap_or(true)
    }

    fn wait(&self, pending: CudaPending) -> Result<StepResults> {
        step::wait(pending)
    }

    fn download(&self, buffer: &DeviceBuffer, elems: usize) -> Result<Vec<f32>> {
        self.device.download(buffer, elems)
    }
}
