//! The decoder: one wiring of ops for every family that is data over it.
//!
//! Pre-norm transformer with grouped-query attention, rotary positions and a gated MLP (Touvron et al. 2023, LLaMA). It sees
//! batch metadata and its own tensors; it knows no sequence and no scheduler.

use std::{ops::Range, sync::Arc};

use tidemill_kernels::{
    KernelError, Ops,
    ops::{
        Activation, BatchMeta, BlockCopy, Epilogue, HeadShape, KvShape, Lookup, Norm, QkTransform, Rotary,
        Scoring, StepResults,
    },
    sampling::{RowTask, SampleSpec},
};

use super::{
    checkpoint::Tensors,
    lora::{LoraWeights, SITES, Site, SiteSpec, Sites},
    rope::rope_table,
    spec::ModelSpec,
};
use crate::error::LoadError;

const KV_FIRST: &str = "whoever loads a decoder allocates its KV cache before any step";

struct Layer<O: Ops> {
    input_layernorm: O::Vector,
    qkv_proj: O::Weight,
    o_proj: O::Weight,
    post_attention_layernorm: O::Vector,
    gate_up_proj: O::Weight,
    down_proj: O::Weight,
}

/// Activations, allocated once for the largest step. T is `max_num_batched_tokens`.
struct Scratch<O: Ops> {
    /// `[T, H]` the residual stream.
    hidden: O::Buffer,
    /// `[T, H]` normalised input of a block.
    normed: O::Buffer,
    /// `[T, (Q + 2 K) * D]`.
    qkv: O::Buffer,
    /// `[T, Q * D]`.
    attention: O::Buffer,
    /// `[T, 2 I]`, where the device needs it.
    gate_up: O::Buffer,
    /// `[T, I]`.
    mlp: O::Buffer,
    /// `[T, H]` the rows whose logits or hidden states are wanted.
    gathered: O::Buffer,
    /// `[max_logits_rows, V]` in f32.
    logits: O::Buffer,
}

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
    embed_tokens: O::Weight,
    layers: Vec<Layer<O>>,
    norm: O::Vector,
    /// `None`: tied to `embed_tokens`, or there is none, and nobody wants logits.
    lm_head: Option<O::Weight>,
    rope: O::Vector,
    /// With its shape; absent until [`Decoder::allocate_kv`].
    kv: Option<(O::KvCache, KvShape)>,
    /// Absent until [`Decoder::allocate_host_kv`].
    host_kv: Option<O::HostKv>,
    /// Absent until [`Decoder::allocate_lora`].
    lora: Option<LoraRoom<O>>,
    scratch: Scratch<O>,
}

/// Adapters of one matrix, and how many parts it has.
struct Lora<O: Ops> {
    lora: O::Lora,
    parts: usize,
}

/// Adapters, and what computing with them takes.
struct LoraRoom<O: Ops> {
    layers: Vec<[Option<Lora<O>>; SITES]>,
    /// `[T, 2 I]`.
    gate_up: O::Buffer,
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
        let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
        let vector = |name: &str| -> Result<O::Vector, LoadError> {
            Ok(ops.vector(&checkpoint.tensor(name, &[hidden])?.to_f32())?)
        };
        let matrix = |name: &str| -> Result<O::Weight, LoadError> {
            Ok(ops.weight(&[checkpoint.tensor(name, &[vocab, hidden])?.into()], &[])?)
        };
        let mut layers = Vec::with_capacity(spec.num_layers);
        for index in 0..spec.num_layers {
            layers.push(Layer::load(&ops, spec, checkpoint, index)?);
            progress(index + 1);
        }
        let heads = head_shape(spec);
        let tokens = limits.max_num_batched_tokens;
        let rope = rope_table(&spec.rope, spec.head_dim, limits.max_model_len);
        Ok(Self {
            embed_tokens: matrix(&spec.tensor_name("embed_tokens.weight"))?,
            norm: vector(&spec.tensor_name("norm.weight"))?,
            lm_head: if spec.has_lm_head() { Some(matrix("lm_head.weight")?) } else { None },
            rope: ops.vector(&rope)?,
            kv: None,
            host_kv: None,
            lora: None,
            scratch: Scratch {
                hidden: ops.buffer(tokens * hidden)?,
                normed: ops.buffer(tokens * hidden)?,
                qkv: ops.buffer(tokens * heads.qkv_width())?,
                attention: ops.buffer(tokens * heads.num_heads * heads.head_dim)?,
                gate_up: ops.scratch_buffer(tokens * 2 * spec.intermediate_size)?,
                mlp: ops.buffer(tokens * spec.intermediate_size)?,
                gathered: ops.buffer(tokens * hidden)?,
                logits: ops.logits_buffer(ops.max_logits_rows() * vocab)?,
            },
            layers,
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

    /// Allocates room for `slots` adapters of up to `max_rank`.
    ///
    /// # Errors
    /// What the device returned.
    pub fn allocate_lora(&mut self, slots: usize, max_rank: usize) -> Result<(), KernelError> {
        let layer = |sites: &[Option<SiteSpec>; SITES]| -> Result<_, KernelError> {
            let mut layer = [const { None }; SITES];
            for (lora, site) in layer.iter_mut().zip(sites) {
                let Some(site) = site else { continue };
                let room = self.ops.lora(&site.shape(slots, max_rank))?;
                *lora = Some(Lora { lora: room, parts: site.parts.len() });
            }
            Ok(layer)
        };
        let layers = Sites::of(&self.spec).layers.iter().map(layer).collect::<Result<_, _>>()?;
        let elems = self.limits.max_num_batched_tokens * 2 * self.spec.intermediate_size;
        self.lora = Some(LoraRoom { layers, gate_up: self.ops.buffer(elems)? });
        Ok(())
    }

    /// Puts an adapter of this model into a slot, behind the steps that are queued.
    ///
    /// # Errors
    /// What the device returned; the slot may then hold anything.
    pub fn set_adapter(&mut self, slot: usize, weights: &LoraWeights) -> Result<(), KernelError> {
        let Some(lora) = &mut self.lora else {
            let detail = "there is no room for adapters; start with --enable-lora".to_owned();
            return Err(KernelError::Unsupported { op: "set_adapter", detail });
        };
        for (layer, weights) in lora.layers.iter_mut().zip(&weights.layers) {
            for (lora, parts) in layer.iter_mut().zip(weights) {
                let Some(Lora { lora, parts: count }) = lora else { continue };
                // Where the adapter leaves a matrix as it is, what was in the slot before must go.
                let none = vec![None; *count];
                self.ops.set_lora(lora, slot, parts.as_deref().unwrap_or(&none))?;
            }
        }
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

    /// All layers, then the hidden states that are wanted as such, then the logits in groups of at most `max_logits_rows` rows, each handed
    /// to `each`.
    fn forward(
        &mut self,
        batch: &O::Batch,
        mut each: impl FnMut(&O, &mut O::Buffer, Range<usize>) -> Result<(), KernelError> + Send,
    ) -> Result<(), KernelError> {
        let Self { ops, spec, embed_tokens, layers, norm, lm_head, rope, kv, lora, scratch: s, .. } = self;
        let (kv, _) = kv.as_mut().expect(KV_FIRST);
        let heads = head_shape(spec);
        let scale = (heads.head_dim as f32).powf(-0.5);
        let scoring =
            Scoring { scale, window: None, soft_cap: None, slopes: None, sinks: None, causal: true };
        let (extent, eps) = (ops.extent(batch), spec.rms_norm_eps as f32);
        let tokens = extent.tokens;
        let mut lora = lora.as_mut().filter(|_| ops.has_adapters(batch));
        ops.run(batch, || {
            ops.embedding(&mut s.hidden, embed_tokens, batch, Lookup::Tokens { scale: 1.0 })?;
            for (index, layer) in layers.iter().enumerate() {
                ops.norm(
                    &mut s.normed,
                    &s.hidden,
                    Norm::Rms { weight: &layer.input_layernorm, eps },
                    tokens,
                )?;
                ops.linear(&mut s.qkv, &s.normed, &layer.qkv_proj, tokens, Epilogue::Store)?;
                if let Some(lora) = site(&lora, index, Site::Qkv) {
                    ops.lora_add(&mut s.qkv, &s.normed, lora, batch)?;
                }
                let rotary = Some(Rotary { table: rope, dim: heads.head_dim, interleaved: false });
                ops.rope_kv_write(&mut s.qkv, kv, QkTransform { norm: None, rotary }, batch, heads, index)?;
                ops.paged_attention(&mut s.attention, &s.qkv, kv, batch, heads, scoring, index)?;
                ops.linear(&mut s.hidden, &s.attention, &layer.o_proj, tokens, Epilogue::Add)?;
                if let Some(lora) = site(&lora, index, Site::Output) {
                    ops.lora_add(&mut s.hidden, &s.attention, lora, batch)?;
                }
                ops.norm(
                    &mut s.normed,
                    &s.hidden,
                    Norm::Rms { weight: &layer.post_attention_layernorm, eps },
                    tokens,
                )?;
                let (up, silu) = (&layer.gate_up_proj, Activation::Silu);
                if let Some(LoraRoom { layers, gate_up }) = lora.as_deref_mut()
                    && let Some(Lora { lora, .. }) = &layers[index][Site::Up as usize]
                {
                    ops.lora_gated(&mut s.mlp, gate_up, &s.normed, up, lora, batch, silu)?;
                } else {
                    ops.linear_gated(&mut s.mlp, &mut s.gate_up, &s.normed, up, tokens, silu)?;
                }
                ops.linear(&mut s.hidden, &s.mlp, &layer.down_proj, tokens, Epilogue::Add)?;
                if let Some(lora) = site(&lora, index, Site::Down) {
                    ops.lora_add(&mut s.hidden, &s.mlp, lora, batch)?;
                }
            }
            if extent.state_rows > 0 {
                let rows = extent.logits_rows..extent.logits_rows + extent.state_rows;
                ops.gather_rows(&mut s.gathered, &s.hidden, batch, rows, spec.hidden_size)?;
                ops.norm(&mut s.normed, &s.gathered, Norm::Rms { weight: norm, eps }, extent.state_rows)?;
                ops.states(&s.normed, batch, spec.hidden_size)?;
            }
            let head = lm_head.as_ref().unwrap_or(embed_tokens);
            for first in (0..extent.logits_rows).step_by(ops.max_logits_rows()) {
                let rows = first..extent.logits_rows.min(first + ops.max_logits_rows());
                ops.gather_rows(&mut s.gathered, &s.hidden, batch, rows.clone(), spec.hidden_size)?;
                ops.norm(&mut s.normed, &s.gathered, Norm::Rms { weight: norm, eps }, rows.len())?;
                ops.linear(&mut s.logits, &s.normed, head, rows.len(), Epilogue::Store)?;
                each(ops, &mut s.logits, rows)?;
            }
            Ok(())
        })
    }
}

impl<O: Ops> Layer<O> {
    fn load(ops: &O, spec: &ModelSpec, checkpoint: &dyn Tensors, index: usize) -> Result<Self, LoadError> {
        let (hidden, inter) = (spec.hidden_size, spec.intermediate_size);
        let (q, kv) = (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim);
        let prefix = spec.tensor_name(&format!("layers.{index}"));
        let vector = |name: &str| -> Result<O::Vector, LoadError> {
            Ok(ops.vector(&checkpoint.tensor(&format!("{prefix}.{name}.weight"), &[hidden])?.to_f32())?)
        };
        // Projections that read the same input are stacked into one matrix.
        let stacked = |parts: &[(&str, usize)], columns: usize, bias: bool| -> Result<O::Weight, LoadError> {
            let mut weights = Vec::new();
            let mut biases = Vec::new();
            for &(name, rows) in parts {
                weights.push(checkpoint.tensor(&format!("{prefix}.{name}.weight"), &[rows, columns])?.into());
                if bias {
                    biases.push(checkpoint.tensor(&format!("{prefix}.{name}.bias"), &[rows])?);
                }
            }
            Ok(ops.weight(&weights, &biases)?)
        };
        let (attention_bias, mlp_bias) = (spec.attention_bias, spec.mlp_bias);
        Ok(Self {
            input_layernorm: vector("input_layernorm")?,
            qkv_proj: stacked(
                &[("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
                hidden,
                attention_bias,
            )?,
            o_proj: stacked(&[("self_attn.o_proj", hidden)], q, attention_bias)?,
            post_attention_layernorm: vector("post_attention_layernorm")?,
            gate_up_proj: stacked(&[("mlp.gate_proj", inter), ("mlp.up_proj", inter)], hidden, mlp_bias)?,
            down_proj: stacked(&[("mlp.down_proj", hidden)], inter, mlp_bias)?,
        })
    }
}

/// The adapters of one matrix, in a step that has any.
fn site<'a, O: Ops>(lora: &'a Option<&mut LoraRoom<O>>, layer: usize, site: Site) -> Option<&'a O::Lora> {
    lora.as_ref()?.layers[layer][site as usize].as_ref().map(|lora| &lora.lora)
}

/// One new token in each of `rows` rows, each the first of its own block.
fn decode_batch(rows: u32, block_size: u32) -> BatchMeta {
    BatchMeta {
        token_ids: vec![0; rows as usize],
        positions: vec![0; rows as usize],
        slot_mapping: (0..rows).map(|row| row * block_size).collect(),
        cu_seqlens_q: (0..=rows).collect(),
        context_lens: vec![1; rows as usize],
        block_tables: (0..rows).collect(),
        max_blocks: 1,
        logits_indices: (0..rows).collect(),
        state_indices: Vec::new(),
        ..BatchMeta::default()
    }
}

/// As many tokens and rows as there can be, all of them in block 0: what they read and write means nothing.
fn largest_batch(tokens: usize, rows: usize, block_size: usize) -> BatchMeta {
    let starts: Vec<usize> = (0..=rows).map(|row| row * tokens / rows).collect();
    let lens = || starts.windows(2).map(|pair| pair[1] - pair[0]);
    let max_blocks = lens().max().unwrap_or(0).div_ceil(block_size);
    let positions: Vec<u32> = lens().flat_map(|len| 0..len as u32).collect();
    BatchMeta {
        token_ids: vec![0; tokens],
        slot_mapping: positions.iter().map(|&p| p % block_size as u32).collect(),
        positions,
        cu_seqlens_q: starts.iter().map(|&start| start as u32).collect(),
        context_lens: lens().map(|len| len as u32).collect(),
        block_tables: vec![0; rows * max_blocks],
        max_blocks,
        logits_indices: starts[1..].iter().map(|&end| end as u32 - 1).collect(),
        state_indices: Vec::new(),
        ..BatchMeta::default()
    }
}

/// At most `max_rows` prompts of full contexts, each in blocks of its own, until the step or the cache is full.
fn prefill_batch(limits: DecoderLimits, kv: &KvShape, max_rows: usize) -> BatchMeta {
    let per_row = limits.max_model_len.div_ceil(kv.block_size).min(kv.num_blocks);
    let longest = limits.max_model_len.min(per_row * kv.block_size);
    let rows = limits.max_num_batched_tokens.div_ceil(longest).min(kv.num_blocks / per_row).min(max_rows);
    let tokens = limits.max_num_batched_tokens.min(rows * longest);
    let mut meta = BatchMeta { cu_seqlens_q: vec![0], max_blocks: per_row, ..BatchMeta::default() };
    for row in 0..rows {
        let first_slot = (row * per_row * kv.block_size) as u32;
        let len = longest.min(tokens - row * longest) as u32;
        meta.token_ids.resize(meta.token_ids.len() + len as usize, 0);
        meta.positions.extend(0..len);
        meta.slot_mapping.extend(first_slot..first_slot + len);
        meta.context_lens.push(len);
        meta.cu_seqlens_q.push(meta.positions.len() as u32);
        meta.block_tables.extend((row * per_row) as u32..((row + 1) * per_row) as u32);
        meta.logits_indices.push(meta.positions.len() as u32 - 1);
    }
    meta
}

fn greedy() -> RowTask {
    RowTask::Sample(SampleSpec::greedy(), None)
}

fn head_shape(spec: &ModelSpec) -> HeadShape {
    HeadShape { num_heads: spec.num_heads, num_kv_heads: spec.num_kv_heads, head_dim: spec.head_dim }
}

#[cfg(test)]
mod tests {
    use tidemill_kernels::DType;

    use super::*;

    #[test]
    fn a_step_full_of_prompt_takes_what_step_cache_and_rows_hold() {
        let lens = |max_num_batched_tokens, max_model_len, num_blocks, max_rows| {
            let limits = DecoderLimits { max_num_batched_tokens, max_model_len };
            let kv = KvShape {
                num_layers: 1,
                num_blocks,
                block_size: 16,
                num_kv_heads: 1,
                head_dim: 2,
                value_dim: 2,
                dtype: DType::F32,
            };
            let batch = prefill_batch(limits, &kv, max_rows);
            let mut slots = batch.slot_mapping.clone();
            slots.dedup();
            assert!(slots.is_sorted() && slots.len() == batch.num_tokens(), "no token writes over another");
            assert!(slots.iter().all(|&slot| slot < 16 * num_blocks as u32));
            assert_eq!(batch.block_tables.len(), batch.num_rows() * batch.max_blocks);
            batch.context_lens
        };
        assert_eq!(lens(150, 60, 32, 4), [60, 60, 30]);
        assert_eq!(lens(150, 60, 32, 2), [60, 60], "rows");
        assert_eq!(lens(150, 60, 7, 4), [60], "blocks for one full context");
        assert_eq!(lens(150, 200, 32, 4), [150]);
        assert_eq!(lens(150, 200, 3, 4), [48], "a cache smaller than a context");
        assert_eq!(lens(8, 60, 32, 4), [8]);
    }
}
