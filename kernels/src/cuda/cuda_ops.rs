//! The ops of the decoder on a GPU.

use std::{ops::Range, sync::Arc};

use parking_lot::Mutex;

use super::{
    Device,
    batch::{CudaBatch, Group, Plan, States},
    driver::{Pinned, Result},
    graphs::{GraphKey, GraphLists},
    layout::Layout,
    memory::{DeviceBuffer, Graph, PinnedMemory},
    ops::{
        ActivationKind, Attention, AttentionKernels, BlockShape, CopyBlocks, Embedding, GatherRows, HeadNorm,
        KvLayer, Linear, LinearEpilogue, PADDING_INDEX, PADDING_SLOT, RESULT_WORDS, RmsNorm, RopeKvWrite,
        Rotary, Sample, Scoring, attention, check_model, copy_blocks, decode_results, embedding, encode,
        gather_rows, is_masked, kv_cache_elems, linear, list_words, rmsnorm, rope_kv_write, sample,
    },
    steps::{Slot, Steps},
    weights::{CudaWeight, Uploader},
    words::DeviceWords,
};
use crate::{
    error::KernelError,
    ops::{
        Activation, BatchMeta, BlockCopy, Epilogue, Extent, HeadShape, KvShape, LatentShape, Lookup, Norm,
        Ops, QkTransform, Routing, Scoring as Scores, Slices, StepResults,
    },
    sampling::RowTask,
    tensor::{DType, ExpertParts, HostMatrix, HostTensor},
};

/// Rows of logits in a group at most: a decode step of the largest batch that is usual.
const MAX_LOGITS_ROWS: usize = 256;

/// The largest step, and what steps have in common.
#[derive(Debug, Clone, Copy)]
pub struct CudaConfig {
    /// T of the largest step.
    pub max_tokens: usize,
    /// S of the largest step.
    pub max_rows: usize,
    /// Longest context in tokens.
    pub max_model_len: usize,
    /// Tokens per KV block: a power of two from 16 to 256.
    pub block_size: usize,
    /// Q, K and D.
    pub heads: HeadShape,
    /// V.
    pub vocab: usize,
    /// Whether decode steps run from CUDA graphs.
    pub graphs: bool,
}

/// A GPU as a device of the decoder. Everything is queued on one stream.
pub struct CudaOps {
    // Dropped in this order: what is queued ends first.
    steps: Mutex<Steps>,
    uploader: Mutex<Uploader>,
    device: Device,
    config: CudaConfig,
}

/// Keys and values of all layers.
pub struct CudaKvCache {
    cache: DeviceBuffer,
    shape: KvShape,
}

impl CudaKvCache {
    /// The storage, in the layout of [`super::ops::KvLayer`]: to fill or to compare it.
    pub fn storage(&self) -> &DeviceBuffer {
        &self.cache
    }
}

/// Blocks of a KV cache in page-locked host memory, which copies on the stream alone touch.
pub struct CudaHostKv {
    memory: PinnedMemory,
    shape: KvShape,
    device: Device,
}

impl Drop for CudaHostKv {
    fn drop(&mut self) {
        // Copies that are queued end first. A lost device runs nothing any more.
        let _ = self.device.driver().synchronize();
    }
}

/// A step's results on their way.
pub struct CudaPending {
    slot: Arc<Slot>,
    states: Option<States>,
    tasks: Arc<[RowTask]>,
}

impl CudaOps {
    /// Allocates what all steps share.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]; [`KernelError::Unsupported`] for a model that the kernels cannot take.
    pub fn new(device: Device, config: CudaConfig) -> Result<Self> {
        check_model(config.heads)?;
        Ok(Self {
            steps: Mutex::new(Steps::new(&device, &config, max_logits_rows(&config))?),
            uploader: Mutex::new(Uploader::new(&device)?),
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

    /// Cuts a step's rows of logits into the groups in which the decoder computes them, each with its encoded tasks.
    fn groups(&self, extent: Extent, graph: Option<GraphLists>, tasks: &[RowTask]) -> Result<Vec<Group>> {
        let mut groups = Vec::new();
        for first in (0..extent.logits_rows).step_by(self.max_logits_rows()) {
            let rows = first..extent.logits_rows.min(first + self.max_logits_rows());
            let tasks = &tasks[first.min(tasks.len())..rows.end.min(tasks.len())];
            let list_words = match graph {
                Some(lists) => lists.words(rows.len(), self.config.vocab),
                None => list_words(tasks),
            };
            let shape = BlockShape { rows: rows.len(), vocab: self.config.vocab, list_words };
            let encoded = encode(shape, tasks)?;
            groups.push(Group { rows, shape, words: encoded.words, needs: encoded.needs, at: 0 });
        }
        Ok(groups)
    }

    /// Rows of the graph that a step may run from, and the room for lists that it has.
    fn graph_rows(&self, steps: &Steps, meta: &BatchMeta, tasks: &[RowTask]) -> Option<(usize, GraphLists)> {
        let rows = meta.num_rows();
        let decodes = meta.num_tokens() == rows && meta.logits_indices.len() == rows;
        let lists = GraphLists { masked: tasks.iter().any(is_masked) };
        let decodes = decodes && meta.state_indices.is_empty();
        let fits = list_words(tasks) <= lists.words(rows, self.config.vocab);
        if decodes && fits { steps.graphs.padded(rows).map(|rows| (rows, lists)) } else { None }
    }
}

/// TEMPORARY: what is still to be written.
fn later<T>(op: &'static str) -> Result<T> {
    Err(KernelError::Unsupported { op, detail: "not written yet".to_owned() })
}

fn require_bf16(shape: &KvShape) -> Result<()> {
    if shape.dtype == DType::Bf16 {
        return Ok(());
    }
    let detail = format!("the KV cache is kept in bf16, not {:?} (use --device cpu)", shape.dtype);
    Err(KernelError::Unsupported { op: "kv_cache", detail })
}

fn max_logits_rows(config: &CudaConfig) -> usize {
    MAX_LOGITS_ROWS.min(config.max_rows.max(config.max_tokens))
}

impl Ops for CudaOps {
    type Buffer = DeviceBuffer;
    type Weight = CudaWeight;
    type Vector = DeviceBuffer;
    type Experts = ();
    type Routes = ();
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
        max_logits_rows(&self.config)
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

    fn experts(&self, _experts: &[ExpertParts]) -> Result<()> {
        later("experts")
    }

    fn routes(&self, _tokens: usize, _routing: &Routing) -> Result<()> {
        later("routes")
    }

    fn vector(&self, values: &[f32]) -> Result<DeviceBuffer> {
        self.uploader.lock().vector(values)
    }

    fn kv_cache(&self, shape: KvShape) -> Result<CudaKvCache> {
        // Graphs were recorded with the one before.
        let mut steps = self.steps.lock();
        self.device.driver().synchronize()?;
        steps.graphs.clear();
        require_bf16(&shape)?;
        let cache = self.device.buffer(DType::Bf16, kv_cache_elems(&shape), "the KV cache")?;
        Ok(CudaKvCache { cache, shape })
    }

    fn host_kv(&self, shape: KvShape) -> Result<CudaHostKv> {
        require_bf16(&shape)?;
        let bytes = shape.num_blocks * shape.block_bytes();
        let memory = PinnedMemory::new(self.device.driver.clone(), bytes, Pinned::Readback)?;
        Ok(CudaHostKv { memory, shape, device: self.device.clone() })
    }

    fn copy_blocks(&self, kv: &mut CudaKvCache, host: &mut CudaHostKv, copies: &[BlockCopy]) -> Result<()> {
        let CudaKvCache { cache, shape } = kv;
        let call = CopyBlocks { cache, shape: *shape, host: &host.memory, host_shape: host.shape, copies };
        copy_blocks(&self.device, call)
    }

    fn synchronize(&self) -> Result<()> {
        self.device.driver().synchronize()
    }

    fn upload(&self, meta: Arc<BatchMeta>, tasks: Arc<[RowTask]>) -> Result<CudaBatch> {
        let mut steps = self.steps.lock();
        let padded = self.graph_rows(&steps, &meta, &tasks);
        let extent = match padded {
            Some((rows, _)) => Extent { tokens: rows, logits_rows: rows, state_rows: 0 },
            None => Extent {
                tokens: meta.num_tokens(),
                logits_rows: meta.logits_indices.len(),
                state_rows: meta.state_indices.len(),
            },
        };
        let mut groups = self.groups(extent, padded.map(|(_, lists)| lists), &tasks)?;
        let room = groups.iter().map(|group| group.shape.words()).sum();
        let layout = Layout::new(extent, room);
        let mut at = layout.tasks;
        for group in &mut groups {
            group.at = at;
            at += group.shape.words();
        }
        let plan = Plan::new(&meta, self.config.heads, self.config.block_size, &steps.limits)?;
        let blocks: Vec<_> = groups.iter_mut().map(|g| (g.at, std::mem::take(&mut g.words))).collect();
        let words = layout.write(&meta, &blocks, &plan.words, [PADDING_SLOT, PADDING_INDEX]);
        let lists = groups.iter().map(|group| group.shape.list_words).max().unwrap_or(0);
        steps.reserve(words.len(), lists)?;
        steps.send(&words)?;
        let graph = match (padded, groups.first()) {
            (Some((rows, lists)), Some(group)) => Some(GraphKey::new(rows, group.needs, lists)),
            _ => None,
        };
        // A graph holds every kernel that any decode step needs.
        let kernels = if graph.is_some() { AttentionKernels::DECODE } else { plan.kernels };
        let slot = steps.slot()?;
        let (plan_words, states) = (plan.words.len(), Mutex::default());
        Ok(CudaBatch { extent, layout, kernels, plan_words, groups, tasks, graph, slot, states })
    }

    fn extent(&self, batch: &CudaBatch) -> Extent {
        batch.extent
    }

    fn run(&self, batch: &CudaBatch, mut ops: impl FnMut() -> Result<()> + Send) -> Result<()> {
        let Some(key) = batch.graph else { return ops() };
        if self.steps.lock().graphs.get(key).is_none() {
            match Graph::capture(self.device.driver.clone(), &mut ops) {
                Ok(graph) => self.steps.lock().graphs.insert(key, graph),
                // No memory for one more graph is no reason to fail a step.
                Err(KernelError::Device { .. } | KernelError::OutOfMemory { .. }) => return ops(),
                Err(error) => return Err(error),
            }
        }
        let steps = self.steps.lock();
        match steps.graphs.get(key) {
            // SAFETY: graphs are cleared whenever memory they use moves; weights and buffers live as long as the decoder, whose
            // steps alone come here.
            Some(graph) => unsafe { graph.launch() },
            None => Ok(()),
        }
    }

    fn embedding(
        &self,
        out: &mut DeviceBuffer,
        table: &CudaWeight,
        batch: &CudaBatch,
        lookup: Lookup,
    ) -> Result<()> {
        let Lookup::Tokens { scale } = lookup else { return later("embedding") };
        let steps = self.steps.lock();
        let tokens = batch.extent.tokens;
        embedding(
            &self.device,
            Embedding {
                out,
                table: table.matrix.bf16("embedding")?,
                token_ids: steps.words(batch.layout.token_ids, tokens)?,
                feedback: Some(steps.feedback()),
                width: table.k,
                scale,
                tokens,
            },
        )
    }

    fn norm(
        &self,
        out: &mut DeviceBuffer,
        x: &DeviceBuffer,
        norm: Norm<'_, DeviceBuffer>,
        rows: usize,
    ) -> Result<()> {
        let Norm::Rms { weight, eps } = norm else { return later("norm") };
        let width = weight.elems();
        rmsnorm(&self.device, RmsNorm { out, x, residual: None, weight, width, eps, rows })
    }

    fn norm_add(
        &self,
        _: &mut DeviceBuffer,
        _: &DeviceBuffer,
        _: Norm<'_, DeviceBuffer>,
        _: usize,
    ) -> Result<()> {
        later("norm_add")
    }

    fn norm_slices(&self, _: &mut DeviceBuffer, _: Norm<'_, DeviceBuffer>, _: Slices) -> Result<()> {
        later("norm_slices")
    }

    fn linear(
        &self,
        out: &mut DeviceBuffer,
        x: &DeviceBuffer,
        weight: &CudaWeight,
        rows: usize,
        epilogue: Epilogue,
    ) -> Result<()> {
        let epilogue = match epilogue {
            Epilogue::Store => LinearEpilogue::Store,
            Epilogue::Add => LinearEpilogue::Add,
            Epilogue::SoftCap(cap) => LinearEpilogue::SoftCap(cap),
            Epilogue::Activate(_) => return later("linear"),
        };
        let CudaWeight { matrix, bias, n, k } = weight;
        let call = Linear { out, x, weight: matrix, bias: bias.as_ref(), rows, n: *n, k: *k, epilogue };
        linear(&self.device, call)
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
        let QkTransform { norm, rotary } = transform;
        let norm =
            norm.map(|norm| HeadNorm { q_weight: norm.q_weight, k_weight: norm.k_weight, eps: norm.eps });
        let rotary = rotary.map(|r| Rotary { table: r.table, rotary_dim: r.dim, interleaved: r.interleaved });
        let steps = self.steps.lock();
        let tokens = batch.extent.tokens;
        rope_kv_write(
            &self.device,
            RopeKvWrite {
                qkv,
                kv: KvLayer { cache: &kv.cache, shape: kv.shape, layer },
                heads,
                positions: steps.words(batch.layout.positions, tokens)?,
                slot_mapping: steps.words(batch.layout.slot_mapping, tokens)?,
                norm,
                rotary,
                tokens,
            },
        )
    }

    fn paged_attention(
        &self,
        out: &mut DeviceBuffer,
        qkv: &DeviceBuffer,
        kv: &CudaKvCache,
        batch: &CudaBatch,
        heads: HeadShape,
        scoring: Scores<'_, DeviceBuffer>,
        layer: usize,
    ) -> Result<()> {
        let Scores { scale, window, soft_cap, slopes, sinks, causal: true } = scoring else {
            return later("paged_attention");
        };
        let mut steps = self.steps.lock();
        let Steps { arena, workspace, .. } = &mut *steps;
        attention(
            &self.device,
            Attention {
                out,
                qkv,
                kv: KvLayer { cache: &kv.cache, shape: kv.shape, layer },
                heads,
                plan: DeviceWords::new(arena).part(batch.layout.plan, batch.plan_words)?,
                kernels: batch.kernels,
                workspace,
                scoring: Scoring { scale, window, soft_cap, slopes, sinks },
                tokens: batch.extent.tokens,
            },
        )
    }

    fn latent_kv_write(
        &self,
        _: &mut DeviceBuffer,
        _: &mut DeviceBuffer,
        _: &mut CudaKvCache,
        _: Norm<'_, DeviceBuffer>,
        _: crate::ops::Rotary<'_, DeviceBuffer>,
        _: &CudaBatch,
        _: LatentShape,
        _: usize,
    ) -> Result<()> {
        later("latent_kv_write")
    }

    fn latent_attention(
        &self,
        _: &mut DeviceBuffer,
        _: &DeviceBuffer,
        _: &DeviceBuffer,
        _: &CudaKvCache,
        _: &CudaBatch,
        _: LatentShape,
        _: f32,
        _: usize,
    ) -> Result<()> {
        later("latent_attention")
    }

    fn linear_heads(&self, _: &mut DeviceBuffer, _: &DeviceBuffer, _heads: &(), _: usize) -> Result<()> {
        later("linear_heads")
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
        let kind = match activation {
            Activation::Silu => ActivationKind::Silu,
            Activation::Gelu => ActivationKind::Gelu,
            Activation::GeluTanh => ActivationKind::GeluTanh,
            _ => return later("linear_gated"),
        };
        let CudaWeight { matrix, bias, n, k } = weight;
        let epilogue = LinearEpilogue::Gated(kind);
        let call = Linear { out, x, weight: matrix, bias: bias.as_ref(), rows, n: n / 2, k: *k, epilogue };
        linear(&self.device, call)
    }

    fn add_gated(
        &self,
        _: &mut DeviceBuffer,
        _: &DeviceBuffer,
        _: &DeviceBuffer,
        _: usize,
        _: usize,
    ) -> Result<()> {
        later("add_gated")
    }

    fn add(&self, _: &mut DeviceBuffer, _: &DeviceBuffer, _: usize) -> Result<()> {
        later("add")
    }

    fn moe_route(
        &self,
        _: &mut (),
        _: &DeviceBuffer,
        _: Option<&DeviceBuffer>,
        _: &Routing,
        _: usize,
    ) -> Result<()> {
        later("moe_route")
    }

    fn moe_gated(
        &self,
        _: &mut DeviceBuffer,
        _: &mut DeviceBuffer,
        _: &DeviceBuffer,
        _experts: &(),
        _routes: &(),
        _: usize,
        _: Activation,
    ) -> Result<()> {
        later("moe_gated")
    }

    fn moe_combine(
        &self,
        _: &mut DeviceBuffer,
        _: &mut DeviceBuffer,
        _: &DeviceBuffer,
        _experts: &(),
        _routes: &(),
        _: usize,
    ) -> Result<()> {
        later("moe_combine")
    }

    fn gather_rows(
        &self,
        out: &mut DeviceBuffer,
        x: &DeviceBuffer,
        batch: &CudaBatch,
        rows: Range<usize>,
        width: usize,
    ) -> Result<()> {
        let steps = self.steps.lock();
        let logits_indices = steps.words(batch.layout.logits_indices + rows.start, rows.len())?;
        gather_rows(&self.device, GatherRows { out, x, logits_indices, width, rows: rows.len() })
    }

    fn sample(
        &self,
        logits: &mut DeviceBuffer,
        _vocab: usize,
        batch: &CudaBatch,
        rows: Range<usize>,
    ) -> Result<()> {
        let mut steps = self.steps.lock();
        let group = batch.group(&rows)?;
        let Steps { arena, sampler, feedback, .. } = &mut *steps;
        let words = DeviceWords::new;
        sample(
            &self.device,
            Sample {
                sampler,
                logits,
                block: words(arena).part(group.at, group.shape.words())?,
                shape: group.shape,
                feedback: words(feedback).part(rows.start, rows.len())?,
                needs: group.needs,
            },
        )?;
        // The next group overwrites the results. A graph has one group, and a slot changes from step to step.
        if batch.graph.is_none() { steps.fetch(&batch.slot, rows.start, rows.len()) } else { Ok(()) }
    }

    fn states(&self, x: &DeviceBuffer, batch: &CudaBatch, width: usize) -> Result<()> {
        let elems = batch.extent.state_rows * width;
        let memory = self.steps.lock().fetch_states(x, elems)?;
        *batch.states.lock() = Some(States { memory, elems });
        Ok(())
    }

    fn results(&self, batch: CudaBatch) -> Result<CudaPending> {
        if batch.graph.is_some() {
            self.steps.lock().fetch(&batch.slot, 0, batch.tasks.len())?;
        }
        batch.slot.sent()?;
        Ok(CudaPending { slot: batch.slot, states: batch.states.into_inner(), tasks: batch.tasks })
    }

    fn is_done(&self, pending: &CudaPending) -> bool {
        // An error is reported by the wait, which then returns at once.
        pending.slot.is_there().unwrap_or(true)
    }

    fn wait(&self, pending: CudaPending) -> Result<StepResults> {
        pending.slot.wait()?;
        let words = pending.tasks.len() * RESULT_WORDS;
        // SAFETY: the slot holds the rows of the largest step; its copy was waited for; nobody else has the slot.
        let words = unsafe { std::slice::from_raw_parts(pending.slot.memory.ptr().cast::<u32>(), words) };
        let states = pending.states.map_or(Vec::new(), |States { memory, elems }| {
            // SAFETY: the copy of so many was queued before the event that was waited for above.
            unsafe { memory.read(elems) }
        });
        Ok(StepResults { sampled: decode_results(words, &pending.tasks), states })
    }

    fn download(&self, buffer: &DeviceBuffer, elems: usize) -> Result<Vec<f32>> {
        self.device.download(buffer, elems)
    }
}
