//! The decoder: one wiring of ops for every family, which is data over it.
//!
//! It sees batch metadata and its own tensors; it knows no sequence and no scheduler.
//!
//! - `load`, `rows`: from a checkpoint to weights on a device. `scratch`: activations.
//! - `forward`: a step. `layer`, `attention`, `mlp`: a layer of it.
//! - `lora`: adapters of it.
//! - `batches`: steps that nobody asked for.

mod attention;
mod batches;
mod forward;
mod layer;
mod load;
mod lora;
mod mlp;
mod rows;
mod scratch;

use std::sync::Arc;

use tidemill_kernels::{
    KernelError, Ops,
    ops::{BatchMeta, BlockCopy, KvShape, StepResults},
    sampling::RowTask,
};

pub(crate) use self::rows::{take_rows, transposed};
use self::{
    batches::{decode_batch, greedy, largest_batch, prefill_batch},
    load::{Loader, OnDevice},
    lora::LoraLayer,
    scratch::Scratch,
};
use super::{
    checkpoint::Tensors,
    parts::{self, Maker},
    rope::rope_table,
    spec::ModelSpec,
};
use crate::error::LoadError;

const KV_FIRST: &str = "whoever loads a decoder allocates its KV cache before any step";

/// Sizes that a decoder is built for.
#[derive(Debug, Clone, Copy)]
pub struct DecoderLimits {
    /// T of the largest step.
    pub max_num_batched_tokens: usize,
    /// Positions of the RoPE table.
    pub max_model_len: usize,
}

/// A loaded model on a device.
pub struct Decoder<O: Ops> {
    ops: O,
    spec: ModelSpec,
    limits: DecoderLimits,
    model: parts::Model<OnDevice<O>>,
    layers: Vec<parts::Layer<OnDevice<O>>>,
    /// `[max_model_len, R]` each.
    ropes: Vec<O::Vector>,
    /// With its shape; absent until [`Decoder::allocate_kv`].
    kv: Option<(O::KvCache, KvShape)>,
    /// Absent until [`Decoder::allocate_host_kv`].
    host_kv: Option<O::HostKv>,
    /// One for each layer; absent until [`Decoder::allocate_lora`].
    lora: Option<Vec<LoraLayer<O>>>,
    scratch: Scratch<O>,
}

impl<O: Ops> Decoder<O> {
    /// Takes the weights over from the checkpoint and allocates everything a step needs but the KV cache. Calls `progress` after each layer
    /// with the number of layers done.
    ///
    /// # Errors
    /// Missing or misshapen tensors, named with both shapes; the device's refusals.
    pub fn load(
        ops: O,
        spec: &ModelSpec,
        checkpoint: &dyn Tensors,
        limits: DecoderLimits,
        mut progress: impl FnMut(usize),
    ) -> Result<Self, LoadError> {
        let mut loader = Loader { ops: &ops, tensors: checkpoint };
        let mut layers = Vec::with_capacity(spec.layers.len());
        for index in 0..spec.layers.len() {
            layers.push(parts::Layer::make(&mut loader, spec, index)?);
            progress(index + 1);
        }
        let model = parts::Model::make(&mut loader, spec)?;
        let table = |rope| loader.values(&rope_table(rope, limits.max_model_len));
        let ropes = spec.ropes.iter().map(table).collect::<Result<_, _>>()?;
        let scratch = Scratch::new(&ops, spec, limits.max_num_batched_tokens)?;
        Ok(Self {
            model,
            layers,
            ropes,
            kv: None,
            host_kv: None,
            lora: None,
            scratch,
            limits,
            spec: spec.clone(),
            ops,
        })
    }

    /// Allocates the KV cache, in place of the one there was.
    ///
    /// # Errors
    /// What the device returned.
    pub fn allocate_kv(&mut self, shape: KvShape) -> Result<(), KernelError> {
        // The old one first: both may not fit.
        self.kv = None;
        self.kv = Some((self.ops.kv_cache(shape)?, shape));
        Ok(())
    }

    /// Allocates room on the host for `num_blocks` blocks of the KV cache, which is allocated already.
    ///
    /// # Errors
    /// What the device returned.
    pub fn allocate_host_kv(&mut self, num_blocks: usize) -> Result<(), KernelError> {
        let (_, kv) = self.kv.as_ref().expect(KV_FIRST);
        self.host_kv = Some(self.ops.host_kv(KvShape { num_blocks, ..*kv })?);
        Ok(())
    }

    /// Queues copies of blocks between the KV cache and the host, in order with the steps before and after.
    ///
    /// # Errors
    /// What the device returned; any block that was to be overwritten may then hold anything.
    pub fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<(), KernelError> {
        let (kv, _) = self.kv.as_mut().expect(KV_FIRST);
        let Some(host) = &mut self.host_kv else {
            let detail = "there are no host blocks; give the engine swap space".to_owned();
            return Err(KernelError::Unsupported { op: "copy_blocks", detail });
        };
        self.ops.copy_blocks(kv, host, copies)
    }

    /// The device.
    pub fn ops(&self) -> &O {
        &self.ops
    }

    /// Computes the largest step there can be, so that whatever is allocated late is allocated.
    ///
    /// # Errors
    /// What an op returned.
    pub fn profile(&mut self, max_num_seqs: usize) -> Result<(), KernelError> {
        let Some((_, kv)) = &self.kv else { return Ok(()) };
        let rows = max_num_seqs.min(self.limits.max_num_batched_tokens);
        let tokens = self.limits.max_num_batched_tokens.min(rows * self.limits.max_model_len);
        let batch = largest_batch(tokens, rows, kv.block_size);
        self.step(Arc::new(batch), &vec![greedy(); rows]).map(drop)
    }

    /// Computes decode steps whose results nobody wants, of every size that the device prepares for, so that the first request
    /// finds weights, threads, buffers and graphs in place. What they write is overwritten before it is ever read.
    ///
    /// # Errors
    /// What an op returned.
    pub fn warm_up(&mut self) -> Result<(), KernelError> {
        let Some((_, kv)) = &self.kv else { return Ok(()) };
        let (num_blocks, block_size) = (kv.num_blocks, kv.block_size as u32);
        for rows in self.ops.decode_sizes() {
            // A pool with fewer blocks than rows never holds so many rows.
            let rows = rows.min(num_blocks) as u32;
            self.step(Arc::new(decode_batch(rows, block_size)), &vec![greedy(); rows as usize])?;
        }
        Ok(())
    }

    /// Computes a step of at most `max_num_seqs` prompts, of as many tokens as a step or the KV cache holds, and waits for it.
    /// Returns how many tokens that were. What it writes is overwritten before it is ever read.
    ///
    /// # Errors
    /// What an op returned.
    pub fn prefill(&mut self, max_num_seqs: usize) -> Result<usize, KernelError> {
        let (_, kv) = self.kv.as_ref().expect(KV_FIRST);
        let batch = prefill_batch(self.limits, kv, max_num_seqs);
        let (tokens, rows) = (batch.num_tokens(), batch.num_rows());
        self.step(Arc::new(batch), &vec![greedy(); rows])?;
        Ok(tokens)
    }

    /// Queues a step, with one task per entry of `meta.logits_indices`.
    ///
    /// # Errors
    /// What an op returned.
    pub fn launch(&mut self, meta: Arc<BatchMeta>, tasks: Arc<[RowTask]>) -> Result<O::Pending, KernelError> {
        debug_assert_eq!(meta.logits_indices.len(), tasks.len(), "one task per row of logits");
        let vocab = self.spec.vocab_size;
        let batch = self.ops.upload(meta, tasks)?;
        self.forward(&batch, |ops, logits, rows| ops.sample(logits, vocab, &batch, rows))?;
        self.ops.results(batch)
    }

    /// Whether [`Decoder::wait`] would return at once.
    pub fn is_done(&self, pending: &O::Pending) -> bool {
        self.ops.is_done(pending)
    }

    /// Waits for a step's results: one per task, in order, and the hidden states of `meta.state_indices`.
    ///
    /// # Errors
    /// What an op returned.
    pub fn wait(&self, pending: O::Pending) -> Result<StepResults, KernelError> {
        self.ops.wait(pending)
    }

    /// Computes one step and does one task per entry of `meta.logits_indices`, in order.
    ///
    /// # Errors
    /// What an op returned.
    pub fn step(&mut self, meta: Arc<BatchMeta>, tasks: &[RowTask]) -> Result<StepResults, KernelError> {
        let pending = self.launch(meta, tasks.into())?;
        self.wait(pending)
    }

    /// Computes one step and returns the logits `[R, V]` of `meta.logits_indices`: what a test compares with a reference.
    ///
    /// # Errors
    /// What an op returned.
    pub fn logits(&mut self, meta: Arc<BatchMeta>) -> Result<Vec<f32>, KernelError> {
        let vocab = self.spec.vocab_size;
        let mut all = Vec::with_capacity(meta.logits_indices.len() * vocab);
        // Whoever wants logits wants no token: the tasks are never done.
        let tasks = vec![RowTask::Score(0, 0); meta.logits_indices.len()];
        let batch = self.ops.upload(meta, tasks.into())?;
        self.forward(&batch, |ops, logits, rows| {
            all.extend(ops.download(logits, rows.len() * vocab)?);
            Ok(())
        })?;
        Ok(all)
    }
}
