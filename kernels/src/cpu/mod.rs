//! The CPU backend: every op over a pool of threads and the widest vectors that the CPU has.
//!
//! - [`isa`](Isa): which instructions there are; `simd`: vectors over them; `pool`: threads.
//! - `buffer`, `weight`, `kv_cache`: memory.
//! - One file per op: `embedding`, `rmsnorm`, `linear`, `activation`, `rope`, `attention`, `gather`, `sample`.
//! - [`probe`]: what the machine could do at best.
//!
//! For one [`Isa`] and one [`Compute`], results do not depend on the number of threads or on what shares a batch.

// In the inner loops an index names a lane or a register, in several arrays at once.
#![allow(clippy::needless_range_loop)]

mod activation;
mod attention;
mod batch;
mod buffer;
mod embedding;
mod gather;
mod isa;
mod kv_cache;
mod linear;
mod pool;
pub mod probe;
mod rmsnorm;
mod rope;
mod sample;
mod simd;
mod weight;

use std::{ops::Range, sync::Arc};

pub use self::{
    batch::CpuBatch,
    buffer::{CpuBuffer, resident},
    isa::Isa,
    kv_cache::{CpuHostKv, CpuKvCache},
    linear::Compute,
    weight::CpuWeight,
};
use self::{batch::Feedback, isa::Host, linear::Linear, pool::Pool};
use crate::{
    error::KernelError,
    ops::{
        Activation, BatchMeta, BlockCopy, Epilogue, Extent, HeadShape, KvShape, LatentShape, Lookup, Norm,
        Ops, QkTransform, Result, Rotary, Routing, Scoring, Slices, StepResults,
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
        Ok(CpuOps { host, pool, linear, feedback: Feedback::default() })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.host.isa()
    }

    /// The number of threads.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Runs `f` on one of the device's threads, where its ops start fastest. Every op also works outside.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.pool.enter(f)
    }
}

/// TEMPORARY: what is still to be written.
fn later<T>(op: &'static str) -> Result<T> {
    Err(KernelError::Unsupported { op, detail: "not written yet".to_owned() })
}

/// More rows than this share a weight just as well.
const MAX_LOGITS_ROWS: usize = 64;

impl Ops for CpuOps {
    type Buffer = CpuBuffer;
    type Weight = CpuWeight;
    type Vector = Vec<f32>;
    type Experts = Vec<CpuWeight>;
    type Routes = ();
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
        experts.iter().map(|expert| CpuWeight::new(&expert.parts, &expert.bias)).collect()
    }

    fn routes(&self, _tokens: usize, _routing: &Routing) -> Result<()> {
        later("routes")
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
        if lookup != (Lookup::Tokens { scale: 1.0 }) {
            return later("embedding");
        }
        embedding::run(&self.pool, out, table, &batch.meta.token_ids);
        Ok(())
    }

    fn norm(&self, out: &mut CpuBuffer, x: &CpuBuffer, norm: Norm<'_, Vec<f32>>, rows: usize) -> Result<()> {
        let Norm::Rms { weight, eps } = norm else { return later("norm") };
        rmsnorm::run(self.host, &self.pool, out, x, weight, eps, rows);
        Ok(())
    }

    fn norm_add(&self, _: &mut CpuBuffer, _: &CpuBuffer, _: Norm<'_, Vec<f32>>, _: usize) -> Result<()> {
        later("norm_add")
    }

    fn norm_slices(&self, _: &mut CpuBuffer, _: Norm<'_, Vec<f32>>, _: Slices) -> Result<()> {
        later("norm_slices")
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
        let QkTransform { norm: None, rotary: Some(Rotary { table: rope, interleaved: false, .. }) } =
            transform
        else {
            return later("rope_kv_write");
        };
        rope::run(self.host, &self.pool, rope::Call { qkv, kv, rope, meta: &batch.meta, heads, layer });
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
        let Scoring { scale, window: None, soft_cap: None, slopes: None, sinks: None, causal: true } =
            scoring
        else {
            return later("paged_attention");
        };
        attention::run(
            self.host,
            &self.pool,
            attention::Call { out, qkv, kv, meta: &batch.meta, heads, scale, layer },
        );
        Ok(())
    }

    fn latent_kv_write(
        &self,
        _: &mut CpuBuffer,
        _: &mut CpuBuffer,
        _: &mut CpuKvCache,
        _: Norm<'_, Vec<f32>>,
        _: Rotary<'_, Vec<f32>>,
        _: &CpuBatch,
        _: LatentShape,
        _: usize,
    ) -> Result<()> {
        later("latent_kv_write")
    }

    fn latent_attention(
        &self,
        _: &mut CpuBuffer,
        _: &CpuBuffer,
        _: &CpuBuffer,
        _: &CpuKvCache,
        _: &CpuBatch,
        _: LatentShape,
        _: f32,
        _: usize,
    ) -> Result<()> {
        later("latent_attention")
    }

    fn linear_heads(&self, _: &mut CpuBuffer, _: &CpuBuffer, _: &Vec<CpuWeight>, _: usize) -> Result<()> {
        later("linear_heads")
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

    fn add_gated(&self, _: &mut CpuBuffer, _: &CpuBuffer, _: &CpuBuffer, _: usize, _: usize) -> Result<()> {
        later("add_gated")
    }

    fn add(&self, _: &mut CpuBuffer, _: &CpuBuffer, _: usize) -> Result<()> {
        later("add")
    }

    fn moe_route(
        &self,
        _: &mut (),
        _: &CpuBuffer,
        _: Option<&Vec<f32>>,
        _: &Routing,
        _: usize,
    ) -> Result<()> {
        later("moe_route")
    }

    fn moe_gated(
        &self,
        _: &mut CpuBuffer,
        _: &mut CpuBuffer,
        _: &CpuBuffer,
        _: &Vec<CpuWeight>,
        _routes: &(),
        _: usize,
        _: Activation,
    ) -> Result<()> {
        later("moe_gated")
    }

    fn moe_combine(
        &self,
        _: &mut CpuBuffer,
        _: &mut CpuBuffer,
        _: &CpuBuffer,
        _: &Vec<CpuWeight>,
        _routes: &(),
        _: usize,
    ) -> Result<()> {
        later("moe_combine")
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
