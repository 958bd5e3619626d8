//! The ops of the decoder, each with its contract, written once and implemented per device.
//!
//! Shape letters, the same everywhere below:
//! **T** tokens of the step, **S** sequences (rows) of the step, **H** hidden size, **Q** query heads, **K** key/value heads,
//! **D** head dimension, **I** intermediate size, **V** vocabulary, **R** rows of logits, **E** hidden states wanted on the host.
//!
//! Every op is *batch-invariant*: the bits of one token's or row's result depend on that token's own inputs alone,
//! never on how many others share the call or on how a prompt was cut into chunks. Reduction orders are therefore
//! fixed by the shape of the row. Matrices are row-major. Storage is the device's choice (f32 on the CPU);
//! accumulation is always f32.

use std::{ops::Range, sync::Arc};

use crate::{
    error::KernelError,
    sampling::{RowTask, Sampled},
    tensor::{DType, HostTensor},
};

/// Result of an op.
pub type Result<T> = std::result::Result<T, KernelError>;

/// Marks an entry of [`BatchMeta::token_ids`] that is not a token id: see there.
pub const FEEDBACK: u32 = 1 << 31;

/// What a step computes: flat metadata for T tokens in S rows. No sequence, no request: indices only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BatchMeta {
    /// `[T]` input token ids. `FEEDBACK | r` stands for the id that the previous step sampled for row `r` of its logits
    /// (an index into its `logits_indices`, over all groups in which its logits were computed): the step can be queued before
    /// that id is known to the host. Vocabularies are below 2^31. Where
    /// the row had no finite logits it is any id below V, and nobody reads what comes of it.
    pub token_ids: Vec<u32>,
    /// `[T]` position of each token in its own sequence.
    pub positions: Vec<u32>,
    /// `[T]` slot (`block * block_size + offset`) that receives the token's key and value.
    pub slot_mapping: Vec<u32>,
    /// `[S + 1]` prefix sums of new tokens per row: row `s` owns tokens `cu_seqlens_q[s]..cu_seqlens_q[s + 1]`.
    pub cu_seqlens_q: Vec<u32>,
    /// `[S]` tokens of each row that are in the KV cache once this step has written its own.
    pub context_lens: Vec<u32>,
    /// `[S, max_blocks]` block ids of each row in sequence order; unused entries are 0.
    pub block_tables: Vec<u32>,
    /// Row stride of `block_tables`.
    pub max_blocks: usize,
    /// `[R]` indices into the T tokens whose logits are wanted.
    pub logits_indices: Vec<u32>,
    /// `[E]` indices into the T tokens whose hidden states are wanted on the host, rising; see [`Ops::states`].
    pub state_indices: Vec<u32>,
}

impl BatchMeta {
    /// T, the number of tokens of the step.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// S, the number of rows (sequences) of the step.
    pub fn num_rows(&self) -> usize {
        self.context_lens.len()
    }
}

/// Extents of a KV cache: for each layer, keys and values of `num_blocks * block_size` slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Decoder layers.
    pub num_layers: usize,
    /// Blocks, shared by all layers: a block id names the same place in each.
    pub num_blocks: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// K.
    pub num_kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Storage type, [`DType::F32`] or [`DType::Bf16`].
    pub dtype: DType,
}

impl KvShape {
    /// Bytes of one block over all layers, keys and values together.
    pub fn block_bytes(&self) -> usize {
        2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.size()
    }
}

/// One block of a KV cache to be copied, over all layers, keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockCopy {
    /// From the cache to the host.
    Save {
        /// The block of the cache that is read.
        block: u32,
        /// The host block that is overwritten.
        host: u32,
    },
    /// From the host to the cache.
    Load {
        /// The host block that is read.
        host: u32,
        /// The block of the cache that is overwritten.
        block: u32,
    },
}

impl BlockCopy {
    /// The block of the cache, and the one of the host.
    pub(crate) fn ids(self) -> (usize, usize) {
        let (Self::Save { block, host } | Self::Load { host, block }) = self;
        (block as usize, host as usize)
    }

    /// The caller's side of [`Ops::copy_blocks`].
    pub(crate) fn check(copies: &[Self], kv: KvShape, host: KvShape) {
        let of_one_block = |shape: KvShape| KvShape { num_blocks: 1, ..shape };
        assert_eq!(of_one_block(kv), of_one_block(host), "host blocks of another cache");
        for copy in copies {
            let ids = copy.ids();
            assert!(
                ids.0 < kv.num_blocks && ids.1 < host.num_blocks,
                "{copy:?}: there are {} blocks, and {} on the host",
                kv.num_blocks,
                host.num_blocks
            );
        }
    }
}

/// Head layout of the fused `qkv` activation: `[T, (Q + 2 K) * D]`, queries first, then keys, then values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// Q, a multiple of K.
    pub num_heads: usize,
    /// K.
    pub num_kv_heads: usize,
    /// D.
    pub head_dim: usize,
}

impl HeadShape {
    /// `(Q + 2 K) * D`.
    pub fn qkv_width(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }
}

/// What [`Ops::linear`] does with its product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epilogue {
    /// `out = x · Wᵀ + bias`.
    Store,
    /// `out += x · Wᵀ + bias`: the residual connection.
    Add,
}

/// Extents to compute a step with: the batch's own, or larger where a device pads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// T.
    pub tokens: usize,
    /// R.
    pub logits_rows: usize,
    /// E, never padded.
    pub state_rows: usize,
}

/// What a step gives.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepResults {
    /// One per task, in order.
    pub sampled: Vec<Sampled>,
    /// `[E, H]` what [`Ops::states`] took; empty for a step that wants none.
    pub states: Vec<f32>,
}

/// A device: its memory and its ops.
///
/// Buffers are allocated once for the largest step; every op takes the extents that are in use from the batch or as an
/// argument. An op panics only on a bug of its caller inside this workspace (a buffer smaller than the contract says),
/// never on data.
///
/// Ops are queued in order and may run later than their call returns; [`Ops::wait`], [`Ops::download`] and [`Ops::synchronize`] wait. A step is
/// [`Ops::upload`], [`Ops::run`] around its ops, [`Ops::results`], and later [`Ops::wait`]; the next step may be queued before that.
pub trait Ops: Send + Sync {
    /// Activation memory of a fixed number of elements.
    type Buffer: Send;
    /// A resident matrix `[N, K]` with an optional bias `[N]`.
    type Weight: Send + Sync;
    /// A resident small vector kept in f32: norm weights, RoPE tables.
    type Vector: Send + Sync;
    /// Keys and values of all layers.
    type KvCache: Send;
    /// Blocks of keys and values in host memory.
    type HostKv: Send;
    /// A step's metadata and tasks, resident on the device.
    type Batch: Send + Sync;
    /// A step's results on their way to the host.
    type Pending: Send;

    /// Allocates an activation buffer of `elems` elements, contents unspecified.
    fn buffer(&self, elems: usize) -> Result<Self::Buffer>;

    /// Allocates an f32 buffer for logits of `elems` elements, contents unspecified.
    fn logits_buffer(&self, elems: usize) -> Result<Self::Buffer>;

    /// Allocates the `scratch` of [`Ops::linear_silu_mul`]; a device that fuses the two needs none.
    fn scratch_buffer(&self, elems: usize) -> Result<Self::Buffer>;

    /// Rows of logits that a step may ask for in one group: bounds the memory of prompt log-probabilities, where every position of
    /// a chunk wants the whole vocabulary.
    fn max_logits_rows(&self) -> usize;

    /// Rows of the decode steps that are worth computing once before the first request.
    fn decode_sizes(&self) -> Vec<usize>;

    /// Makes the matrix that stacks `parts`, each `[N_i, K]`, along N. `bias` holds as many `[N_i]` vectors, or none.
    ///
    /// The CPU keeps views of the memory map and copies nothing.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when a part is not `[_, K]`, or a bias does not match its part.
    fn weight(&self, parts: &[HostTensor], bias: &[HostTensor]) -> Result<Self::Weight>;

    /// Makes a resident f32 vector.
    fn vector(&self, values: &[f32]) -> Result<Self::Vector>;

    /// Allocates a KV cache.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]; [`KernelError::Unsupported`] for a dtype or head size without an implementation.
    fn kv_cache(&self, shape: KvShape) -> Result<Self::KvCache>;

    /// Allocates room on the host for `shape.num_blocks` blocks of a KV cache that is otherwise of this shape, contents
    /// unspecified. On a GPU the memory is page-locked.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]; what [`Ops::kv_cache`] refuses.
    fn host_kv(&self, shape: KvShape) -> Result<Self::HostKv>;

    /// Copies blocks between a KV cache and the host, one after the other, bit by bit. Queued in order with the steps and ops
    /// before and after: a step queued before is saved as it leaves a block, one queued later reads what was loaded.
    ///
    /// Ids out of range, and a `host` whose shape differs from that of `kv` in more than the number of blocks, are a bug of the
    /// caller.
    ///
    /// # Errors
    /// What the device reports. Any of the blocks that were to be overwritten may then hold anything.
    fn copy_blocks(
        &self,
        kv: &mut Self::KvCache,
        host: &mut Self::HostKv,
        copies: &[BlockCopy],
    ) -> Result<()>;

    /// Waits until everything queued has run.
    ///
    /// # Errors
    /// What went wrong in it.
    fn synchronize(&self) -> Result<()>;

    /// Brings a step's metadata to the device, with one task per entry of `meta.logits_indices`.
    fn upload(&self, meta: Arc<BatchMeta>, tasks: Arc<[RowTask]>) -> Result<Self::Batch>;

    /// The extents to give to the ops of a step.
    fn extent(&self, batch: &Self::Batch) -> Extent;

    /// Runs `ops`, which queues the ops of a step, where they are cheapest to call (inside the CPU's thread pool). A device may
    /// record them and replay the record for a later batch of the same extent, so `ops` must depend on nothing else; it may be called again when a recording failed.
    fn run(&self, batch: &Self::Batch, ops: impl FnMut() -> Result<()> + Send) -> Result<()>;

    /// `out[t, :] = table[token_ids[t], :]`; `out` is `[T, H]`, `table` `[V, H]`. Ids were validated: all are below V.
    fn embedding(&self, out: &mut Self::Buffer, table: &Self::Weight, batch: &Self::Batch) -> Result<()>;

    /// Root-mean-square norm over the last axis (Zhang and Sennrich 2019, eq. 4):
    /// `out[r, h] = x[r, h] / sqrt(mean_h(x[r, :]²) + eps) * weight[h]`; `out` and `x` are `[rows, H]`, `weight` `[H]`.
    fn rmsnorm(
        &self,
        out: &mut Self::Buffer,
        x: &Self::Buffer,
        weight: &Self::Vector,
        eps: f32,
        rows: usize,
    ) -> Result<()>;

    /// Matrix product with a resident weight: `x` is `[rows, K]`, `weight` `[N, K]`, `out` `[rows, N]`; see [`Epilogue`].
    ///
    /// A step of few rows reads each weight once for all of them.
    fn linear(
        &self,
        out: &mut Self::Buffer,
        x: &Self::Buffer,
        weight: &Self::Weight,
        rows: usize,
        epilogue: Epilogue,
    ) -> Result<()>;

    /// Rotates queries and keys in place and writes keys and values into the cache.
    ///
    /// `qkv` is `[T, (Q + 2 K) * D]`. `rope` is `[max_positions, D]`: for each position D/2 cosines, then D/2 sines
    /// (already multiplied by the scaling kind's attention factor). Pairs are `(i, i + D/2)`, the layout of
    /// Hugging Face checkpoints (RoFormer, Su et al. 2021, eq. 34, with permuted rows). Key and value of token `t` go to slot
    /// `slot_mapping[t]` of `layer`.
    fn rope_kv_write(
        &self,
        qkv: &mut Self::Buffer,
        kv: &mut Self::KvCache,
        rope: &Self::Vector,
        batch: &Self::Batch,
        heads: HeadShape,
        layer: usize,
    ) -> Result<()>;

    /// Causal attention of each new token over its row's cached keys and values, decode rows and prompt chunks alike.
    ///
    /// `out` is `[T, Q * D]`; queries come from `qkv` `[T, (Q + 2 K) * D]`. The token at position `p` of row `s` sees
    /// positions `0..=p`, found through `block_tables[s]`; query head `q` reads key/value head `q / (Q / K)`.
    /// `softmax(q·kᵀ * scale)·v` with the online softmax of Milakov and Gimelshein (2018), blocks in sequence order.
    /// Slots after position `p` are never read, whatever they hold.
    #[allow(clippy::too_many_arguments)]
    fn paged_attention(
        &self,
        out: &mut Self::Buffer,
        qkv: &Self::Buffer,
        kv: &Self::KvCache,
        batch: &Self::Batch,
        heads: HeadShape,
        scale: f32,
        layer: usize,
    ) -> Result<()>;

    /// The gated half of the feed-forward layer (Shazeer 2020, SwiGLU): with `y = x · Wᵀ + bias`, `[rows, 2 I]`,
    /// `out[r, i] = silu(y[r, i]) * y[r, I + i]`. `x` is `[rows, K]`, `weight` `[2 I, K]`: gate first, then up; `out` `[rows, I]`;
    /// `scratch` comes from [`Ops::scratch_buffer`] with `rows * 2 I` elements.
    fn linear_silu_mul(
        &self,
        out: &mut Self::Buffer,
        scratch: &mut Self::Buffer,
        x: &Self::Buffer,
        weight: &Self::Weight,
        rows: usize,
    ) -> Result<()>;

    /// `out[r, :] = x[indices[rows.start + r], :]`, where `indices` are the batch's `logits_indices` and behind them its `state_indices`;
    /// `x` is `[T, H]`, `out` `[rows.len(), H]`.
    fn gather_rows(
        &self,
        out: &mut Self::Buffer,
        x: &Self::Buffer,
        batch: &Self::Batch,
        rows: Range<usize>,
        width: usize,
    ) -> Result<()>;

    /// Does the batch's tasks `rows` on `logits` `[rows.len(), V]`: penalties, bias, sampling and log-probabilities as
    /// [`crate::sampling`] defines them. Reads and overwrites `logits`.
    fn sample(
        &self,
        logits: &mut Self::Buffer,
        vocab: usize,
        batch: &Self::Batch,
        rows: Range<usize>,
    ) -> Result<()>;

    /// Sends hidden states to the host with the step's results: `x` is `[E, H]` with H = `width`, in the order of `state_indices`. Once per
    /// step at most, and never in one that wants none. The values are those of the device's storage type, as f32.
    ///
    /// # Errors
    /// What the device reports.
    fn states(&self, x: &Self::Buffer, batch: &Self::Batch, width: usize) -> Result<()>;

    /// Ends a step: sends what [`Ops::sample`] found to the host. The tokens stay on the device too, for [`FEEDBACK`].
    fn results(&self, batch: Self::Batch) -> Result<Self::Pending>;

    /// Whether [`Ops::wait`] would return at once.
    fn is_done(&self, pending: &Self::Pending) -> bool;

    /// Waits for a step's results.
    fn wait(&self, pending: Self::Pending) -> Result<StepResults>;

    /// Copies the first `elems` elements of a buffer to the host as f32.
    fn download(&self, buffer: &Self::Buffer, elems: usize) -> Result<Vec<f32>>;
}
