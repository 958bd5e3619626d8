//! The CPU backend: every op over a pool of threads and the widest vectors that the CPU has.
//!
//! - [`isa`](Isa): which instructions there are; `simd`: vectors over them; `pool`: threads.
//! - `buffer`, `weight`, `kv_cache`: memory; `decode`: what quantised weights are worth.
//! - One file per kind of op: `embedding`, `norm`, `linear`, `activation`, `kv_write` with `rope`, `attention`, `experts` with `routes`, `add`, `gather`, `sample`.
//! - [`probe`]: what the machine could do at best.
//!
//! For one [`Isa`] and one [`Compute`], results do not depend on the number of threads or on what shares a batch.

// In the inner loops an index names a lane or a register, in several arrays at once.
#![allow(clippy::needless_range_loop)]

mod activation;
mod add;
mod attention;
mod batch;
mod buffer;
mod decode;
mod embedding;
mod experts;
mod gather;
mod isa;
mod kv_cache;
mod kv_write;
mod linear;
mod lora;
mod norm;
mod pool;
pub mod probe;
mod rope;
mod routes;
mod sample;
mod simd;
mod weight;

use std::{
    ops::Range,
    sync::{Arc, Mutex},
};

pub use self::{
    batch::CpuBatch,
    buffer::{CpuBuffer, resident, resident_with},
    isa::Isa,
    kv_cache::{CpuHostKv, CpuKvCache},
    linear::Compute,
    lora::CpuLora,
    routes::CpuRoutes,
    weight::CpuWeight,
};
use self::{batch::Feedback, experts::Experts, isa::Host, linear::Linear, norm::Fate, pool::Pool};
use crate::{
    error::KernelError,
    ops::{
        Activation, BatchMeta, BlockCopy, Epilogue, Extent, HeadShape, KvShape, LatentShape, Lookup,
        LoraPart, LoraShape, Norm, Ops, QkTransform, Result, Rotary, Routing, Scoring, Slices, StepResults,
    },
    sampling::RowTask,
    tensor::{ExpertParts, HostMatrix, HostTensor},
};

/// How a CPU device is to work. The default is the fastest way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuConfig {
    /// Precision of activations in products with bf16 weights.
    pub compute: Compute,
    /// Instruction set; the best one by default.
    pub isa: Option<Isa>,
    /// Threads; as many as this process may run at once by default.
    pub threads: Option<usize>,
}

/// The CPU as a device.
pub struct CpuOps {
    host: Host,
    pool: Pool,
    linear: Linear,
    feedback: Feedback,
    /// Rows on their way to and from experts.
    gathered: Mutex<Vec<f32>>,
}

impl CpuOps {
    /// Starts the threads.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] when this CPU lacks the instruction set asked for, or the system refuses the threads.
    pub fn new(config: CpuConfig) -> Result<CpuOps> {
        let isa = config.isa.unwrap_or_else(Isa::detect);
        let unsupported = |detail| KernelError::Unsupported { op: "cpu", detail };
        let host = Host::new(isa)
            .ok_or_else(|| unsupported(format!("this CPU has no {isa}; leave the choice open")))?;
        let pool = Pool::new(config.threads).map_err(|e| unsupported(format!("no threads: {e}")))?;
        let linear = Linear::new(host, config.compute)?;
        Ok(CpuOps { host, pool, linear, feedback: Feedback::default(), gathered: Mutex::default() })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.host.isa()
    }

    /// The number of threads.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// What products of experts and of heads need.
    fn grouped(&self) -> Experts<'_> {
        Experts { host: self.host, pool: &self.pool, linear: &self.linear, gathered: &self.gathered }
    }

    /// Runs `f` on one of the device's threads, where its ops start fastest. Every op also works outside.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.pool.enter(f)
    }
}

/// More rows than this share a weight just as well.
const MAX_LOGITS_ROWS: usize = 64;

impl Ops for CpuOps {
    type Buffer = CpuBuffer;
    type Weight = CpuWeight;
    type Vector = Vec<f32>;
    type Experts = Vec<CpuWeight>;
    type Lora = CpuLora;
    type Routes = CpuRoutes;
    type KvCache = CpuKvCache;
    type HostKv = CpuHostKv;
    type Batch = CpuBatch;
    type Pending = StepResults;

    fn buffer(&self, elems: usize) -> Result<CpuBuffer> {
        CpuBuffer::new(elems)
    }

    fn logits_buffer(&self, elems: usize) -> Result<CpuBuffer> {
        CpuBuffer::new(elems)
    }

    fn scratch_buffer(&self, elems: usize) -> Result<CpuBuffer> {
        CpuBuffer::new(elems)
    }

    fn max_logits_rows(&self) -> usize {
        MAX_LOGITS_ROWS
    }

    fn decode_sizes(&self) -> Vec<usize> {
        vec![1]
    }

    fn weight(&self, parts: &[HostMatrix], bias: &[HostTensor]) -> Result<CpuWeight> {
        CpuWeight::new(parts, bias)
    }

    fn table(&self, matrix: &HostMatrix) -> Result<CpuWeight> {
        CpuWeight::new(std::slice::from_ref(matrix), &[])
    }

    fn experts(&self, experts: &[ExpertParts]) -> Result<Vec<CpuWeight>> {
        experts::new(experts)
    }

    fn lora(&self, shape: &LoraShape) -> Result<CpuLora> {
        Ok(CpuLora::new(shape))
    }

    fn set_lora(&self, lora: &mut CpuLora, slot: usize, parts: &[Option<LoraPart>]) -> Result<()> {
        lora.set(slot, parts)
    }

    fn routes(&self, tokens: usize, routing: &Routing) -> Result<CpuRoutes> {
        CpuRoutes::new(tokens, routing)
    }

    fn vector(&self, values: &[f32]) -> Result<Vec<f32>> {
        Ok(values.to_vec())
    }

    fn kv_cache(&self, shape: KvShape) -> Result<CpuKvCache> {
        CpuKvCache::new(shape)
    }

    fn host_kv(&self, shape: KvShape) -> Result<CpuHostKv> {
        CpuHostKv::new(shape)
    }

    fn copy_blocks(&self, kv: &mut CpuKvCache, host: &mut CpuHostKv, copies: &[BlockCopy]) -> Result<()> {
        kv_cache::copy_blocks(kv, host, copies);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        // Every op has run when its call returns.
        Ok(())
    }

    fn upload(&self, meta: Arc<BatchMeta>, tasks: Arc<[RowTask]>) -> Result<CpuBatch> {
        Ok(CpuBatch::new(self.feedback.resolve(meta), tasks))
    }

    fn extent(&self, batch: &CpuBatch) -> Extent {
        let meta = &batch.meta;
        Extent {
            tokens: meta.num_tokens(),
            logits_rows: meta.logits_indices.len(),
            state_rows: meta.state_indices.len(),
        }
    }

    fn run(&self, _batch: &CpuBatch, ops: impl FnMut() -> Result<()> + Send) -> Result<()> {
        self.enter(ops)
    }

    fn embedding(
        &self,
        out: &mut CpuBuffer,
        table: &CpuWeight,
        batch: &CpuBatch,
        lookup: Lookup,
    ) -> Result<()> {
        embedding::run(self.host, &self.pool, out, table, &batch.meta, lookup);
        Ok(())
    }

    fn norm(&self, out: &mut CpuBuffer, x: &CpuBuffer, norm: Norm<'_, Vec<f32>>, rows: usize) -> Result<()> {
        norm::run(self.host, &self.pool, out, x, norm, (rows, Fate::Store));
        Ok(())
    }

    fn norm_add(
        &self,
        out: &mut CpuBuffer,
        x: &CpuBuffer,
        norm: Norm<'_, Vec<f32>>,
        rows: usize,
    ) -> Result<()> {
        norm::run(self.host, &self.pool, out, x, norm, (rows, Fate::Add));
        Ok(())
    }

    fn norm_slices(&self, x: &mut CpuBuffer, norm: Norm<'_, Vec<f32>>, slices: Slices) -> Result<()> {
        norm::slices(self.host, &self.pool, x, norm, slices);
        Ok(())
    }

    fn linear(
        &self,
        out: &mut CpuBuffer,
        x: &CpuBuffer,
        weight: &CpuWeight,
        rows: usize,
        epilogue: Epilogue,
    ) -> Result<()> {
        self.linear.run(
            &self.pool,
            linear::Call { out: out.as_mut_slice(), x: x.as_slice(), weight, rows, epilogue },
        )
    }

    fn rope_kv_write(
        &self,
        qkv: &mut CpuBuffer,
        kv: &mut CpuKvCache,
        transform: QkTransform<'_, Vec<f32>>,
        batch: &CpuBatch,
        heads: HeadShape,
        layer: usize,
    ) -> Result<()> {
        let meta = &*batch.meta;
        kv_write::run(self.host, &self.pool, kv_write::Call { qkv, kv, transform, meta, heads, layer });
        Ok(())
    }

    fn paged_attention(
        &self,
        out: &mut CpuBuffer,
        qkv: &CpuBuffer,
        kv: &CpuKvCache,
        batch: &CpuBatch,
        heads: HeadShape,
        scoring: Scoring<'_, Vec<f32>>,
        layer: usize,
    ) -> Result<()> {
        let meta = &*batch.meta;
        let call = attention::Call { out, qkv, kv, meta, heads, scoring, layer };
        attention::run(self.host, &self.pool, call);
        Ok(())
    }

    fn latent_kv_write(
        &self,
        q_rope: &mut CpuBuffer,
        latent: &mut CpuBuffer,
        kv: &mut CpuKvCache,
        norm: Norm<'_, Vec<f32>>,
        rotary: Rotary<'_, Vec<f32>>,
        batch: &CpuBatch,
        shape: LatentShape,
        layer: usize,
    ) -> Result<()> {
        let meta = &*batch.meta;
        let call = kv_write::Latent { q_rope, latent, kv, norm, rotary, meta, shape, layer };
        kv_write::latent(self.host, &self.pool, call);
        Ok(())
    }

    fn latent_attention(
        &self,
        out: &mut CpuBuffer,
        q_latent: &CpuBuffer,
        q_rope: &CpuBuffer,
        kv: &CpuKvCache,
        batch: &CpuBatch,
        shape: LatentShape,
        scale: f32,
        layer: usize,
    ) -> Result<()> {
        let meta = &*batch.meta;
        let call = attention::Latent { out, q_latent, q_rope, kv, meta, shape, scale, layer };
        attention::run_latent(self.host, &self.pool, call);
        Ok(())
    }

    fn linear_heads(
        &self,
        out: &mut CpuBuffer,
        x: &CpuBuffer,
        heads: &Vec<CpuWeight>,
        rows: usize,
    ) -> Result<()> {
        self.grouped().heads(out, x, heads, rows)
    }

    fn linear_gated(
        &self,
        out: &mut CpuBuffer,
        scratch: &mut CpuBuffer,
        x: &CpuBuffer,
        weight: &CpuWeight,
        rows: usize,
        activation: Activation,
    ) -> Result<()> {
        self.linear(scratch, x, weight, rows, Epilogue::Store)?;
        let shape = [rows, weight.n / 2];
        activation::gate(self.host, &self.pool, out, scratch, shape, activation, |row| row);
        Ok(())
    }

    fn has_adapters(&self, batch: &CpuBatch) -> bool {
        !batch.meta.adapters.is_empty()
    }

    fn lora_add(&self, out: &mut CpuBuffer, x: &CpuBuffer, lora: &CpuLora, batch: &CpuBatch) -> Result<()> {
        lora::add(self.host, &self.pool, out, x, lora, &batch.meta);
        Ok(())
    }

    fn lora_gated(
        &self,
        out: &mut CpuBuffer,
        scratch: &mut CpuBuffer,
        x: &CpuBuffer,
        weight: &CpuWeight,
        lora: &CpuLora,
        batch: &CpuBatch,
        activation: Activation,
    ) -> Result<()> {
        let rows = batch.meta.num_tokens();
        self.linear(scratch, x, weight, rows, Epilogue::Store)?;
        self.lora_add(scratch, x, lora, batch)?;
        let shape = [rows, weight.n / 2];
        activation::gate(self.host, &self.pool, out, scratch, shape, activation, |row| row);
        Ok(())
    }

    fn add_gated(
        &self,
        out: &mut CpuBuffer,
        x: &CpuBuffer,
        gate: &CpuBuffer,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        add::gated(self.host, &self.pool, out, x, gate, [rows, width]);
        Ok(())
    }

    fn add(&self, out: &mut CpuBuffer, x: &CpuBuffer, elems: usize) -> Result<()> {
        add::run(self.host, &self.pool, out, x, elems);
        Ok(())
    }

    fn moe_route(
        &self,
        routes: &mut CpuRoutes,
        logits: &CpuBuffer,
        bias: Option<&Vec<f32>>,
        routing: &Routing,
        rows: usize,
    ) -> Result<()> {
        routes.choose(self.host, &self.pool, logits, bias, (routing, rows));
        Ok(())
    }

    fn moe_gated(
        &self,
        out: &mut CpuBuffer,
        scratch: &mut CpuBuffer,
        x: &CpuBuffer,
        experts: &Vec<CpuWeight>,
        routes: &CpuRoutes,
        rows: usize,
        activation: Activation,
    ) -> Result<()> {
        self.grouped().gated(out, scratch, x, (experts, routes), (rows, activation))
    }

    fn moe_combine(
        &self,
        out: &mut CpuBuffer,
        scratch: &mut CpuBuffer,
        x: &CpuBuffer,
        experts: &Vec<CpuWeight>,
        routes: &CpuRoutes,
        rows: usize,
    ) -> Result<()> {
        self.grouped().combine(out, scratch, x, (experts, routes), rows)
    }

    fn gather_rows(
        &self,
        out: &mut CpuBuffer,
        x: &CpuBuffer,
        batch: &CpuBatch,
        rows: Range<usize>,
        width: usize,
    ) -> Result<()> {
        let BatchMeta { logits_indices, state_indices, .. } = &*batch.meta;
        let indices = logits_indices.iter().chain(state_indices).skip(rows.start).take(rows.len());
        gather::run(out, x, indices.copied(), width);
        Ok(())
    }

    fn sample(
        &self,
        logits: &mut CpuBuffer,
        vocab: usize,
        batch: &CpuBatch,
        rows: Range<usize>,
    ) -> Result<()> {
        let tasks = &batch.tasks[rows];
        sample::check_masks(tasks, vocab)?;
        let logits = &mut logits.as_mut_slice()[..tasks.len() * vocab];
        batch.results.lock().sampled.extend(sample::run(self.host, &self.pool, logits, vocab, tasks));
        Ok(())
    }

    fn states(&self, x: &CpuBuffer, batch: &CpuBatch, width: usize) -> Result<()> {
        let elems = batch.meta.state_indices.len() * width;
        batch.results.lock().states = x.as_slice()[..elems].to_vec();
        Ok(())
    }

    fn results(&self, batch: CpuBatch) -> Result<StepResults> {
        let results = batch.results.into_inner();
        self.feedback.keep(&results.sampled);
        Ok(results)
    }

    fn is_done(&self, _pending: &StepResults) -> bool {
        true
    }

    fn wait(&self, pending: StepResults) -> Result<StepResults> {
        Ok(pending)
    }

    fn download(&self, buffer: &CpuBuffer, elems: usize) -> Result<Vec<f32>> {
        Ok(buffer.as_slice()[..elems].to_vec())
    }
}
