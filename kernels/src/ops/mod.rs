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

mod batch;
mod forms;
mod lora;
mod routing;
mod shapes;

use std::{ops::Range, sync::Arc};

use crate::{
    error::KernelError,
    sampling::RowTask,
    tensor::{ExpertParts, HostMatrix, HostTensor},
};

pub(crate) use self::lora::LoraGroup;
pub use self::{
    batch::{BatchMeta, Extent, FEEDBACK, StepResults},
    forms::{Activation, Epilogue, HeadNorm, Lookup, Norm, QkTransform, Rotary, Scoring},
    lora::{LoraPart, LoraShape},
    routing::{ExpertGroups, ExpertScoring, Routing},
    shapes::{BlockCopy, HeadShape, KvShape, LatentShape, Slices},
};

/// Result of an op.
pub type Result<T> = std::result::Result<T, KernelError>;

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
    /// Resident matrices `[X, N, K]`, one for each expert (or head), with optional biases `[X, N]`.
    type Experts: Send + Sync;
    /// Low-rank adapters of one matrix, in slots.
    type Lora: Send + Sync;
    /// Which experts the tokens of a step go to, and with what weights.
    type Routes: Send;
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

    /// Allocates the `scratch` of [`Ops::linear_gated`] and [`Ops::moe_gated`]; a device that fuses product and gate needs none.
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
    /// [`KernelError::Shape`] when a part is not `[_, K]`, or a bias does not match its part; [`KernelError::Unsupported`] for parts of
    /// different formats where the device wants one, or one that it does not compute with.
    fn weight(&self, parts: &[HostMatrix], bias: &[HostTensor]) -> Result<Self::Weight>;

    /// Makes a matrix that [`Ops::embedding`] can look up in, and [`Ops::linear`] can multiply with: quantised ones are widened where the device
    /// looks up in none.
    ///
    /// # Errors
    /// As [`Ops::weight`].
    fn table(&self, matrix: &HostMatrix) -> Result<Self::Weight>;

    /// Makes the matrices of a layer's experts: for each the `parts` that are stacked along N, as in [`Ops::weight`], and as many biases, or none.
    ///
    /// # Errors
    /// As [`Ops::weight`], and [`KernelError::Shape`] where two experts differ in shape.
    fn experts(&self, experts: &[ExpertParts]) -> Result<Self::Experts>;

    /// Allocates room for low-rank adapters of one matrix, for steps of the device's largest size. All slots are empty.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]; [`KernelError::Unsupported`] for extents that the device does not compute with.
    fn lora(&self, shape: &LoraShape) -> Result<Self::Lora>;

    /// Puts an adapter into a slot, in place of what was there; an entry for each part of the matrix, `None` where the adapter leaves it as it is.
    /// Queued in order with the steps: those queued before compute with what was there.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when a matrix does not fit the part, or its rank is over the highest; what the device reports.
    fn set_lora(&self, lora: &mut Self::Lora, slot: usize, parts: &[Option<LoraPart>]) -> Result<()>;

    /// Allocates the routes of up to `tokens` tokens.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]; [`KernelError::Unsupported`] for more experts than the device routes to.
    fn routes(&self, tokens: usize, routing: &Routing) -> Result<Self::Routes>;

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

    /// Rows of a table, one for each token; see [`Lookup`]. `out` is `[T, H]`, `table` `[_, H]`. Ids, positions and segments were validated:
    /// each has its row.
    fn embedding(
        &self,
        out: &mut Self::Buffer,
        table: &Self::Weight,
        batch: &Self::Batch,
        lookup: Lookup,
    ) -> Result<()>;

    /// Norm over the last axis: `out[r, :] = norm(x[r, :])`; `out` and `x` are `[rows, H]`, the norm's weight `[H]`.
    fn norm(
        &self,
        out: &mut Self::Buffer,
        x: &Self::Buffer,
        norm: Norm<'_, Self::Vector>,
        rows: usize,
    ) -> Result<()>;

    /// Norm and residual connection: `out[r, :] += norm(x[r, :])`, shapes as in [`Ops::norm`].
    fn norm_add(
        &self,
        out: &mut Self::Buffer,
        x: &Self::Buffer,
        norm: Norm<'_, Self::Vector>,
        rows: usize,
    ) -> Result<()>;

    /// Norm in place over parts of rows: part `g` of each row becomes `norm(part)`, with the elements `g * width..(g + 1) * width` of weight and
    /// bias, which are `[groups * width]`. What lies between the parts stays.
    fn norm_slices(&self, x: &mut Self::Buffer, norm: Norm<'_, Self::Vector>, slices: Slices) -> Result<()>;

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

    /// Normalises and rotates queries and keys in place, as `transform` says, and writes keys and values into the cache.
    ///
    /// `qkv` is `[T, (Q + 2 K) * D]`. Key and value of token `t` go to slot `slot_mapping[t]` of `layer`.
    #[allow(clippy::too_many_arguments)]
    fn rope_kv_write(
        &self,
        qkv: &mut Self::Buffer,
        kv: &mut Self::KvCache,
        transform: QkTransform<'_, Self::Vector>,
        batch: &Self::Batch,
        heads: HeadShape,
        layer: usize,
    ) -> Result<()>;

    /// Attention of each new token over its row's cached keys and values, decode rows and prompt chunks alike.
    ///
    /// `out` is `[T, Q * D]`; queries come from `qkv` `[T, (Q + 2 K) * D]`. The token at position `p` of row `s` sees those of the positions
    /// `0..context_lens[s]` that [`Scoring`] lets it see, found through `block_tables[s]`; query head `q` reads key/value head `q / (Q / K)`.
    /// `softmax(score)·v` with the online softmax of Milakov and Gimelshein (2018), blocks in sequence order.
    /// Slots of positions that a token does not see never show in its output, whatever finite values they hold; those after the context are never read.
    #[allow(clippy::too_many_arguments)]
    fn paged_attention(
        &self,
        out: &mut Self::Buffer,
        qkv: &Self::Buffer,
        kv: &Self::KvCache,
        batch: &Self::Batch,
        heads: HeadShape,
        scoring: Scoring<'_, Self::Vector>,
        layer: usize,
    ) -> Result<()>;

    /// Latent attention's write: normalises the first L elements of `latent` `[T, L + R]` with `norm` and rotates its other R and the R of
    /// each head of `q_rope` `[T, Q * R]`, all in place, and writes `latent` into the cache, whose K is 1, D is L + R and `value_dim` 0.
    /// The rotation's `dim` is R.
    #[allow(clippy::too_many_arguments)]
    fn latent_kv_write(
        &self,
        q_rope: &mut Self::Buffer,
        latent: &mut Self::Buffer,
        kv: &mut Self::KvCache,
        norm: Norm<'_, Self::Vector>,
        rotary: Rotary<'_, Self::Vector>,
        batch: &Self::Batch,
        shape: LatentShape,
        layer: usize,
    ) -> Result<()>;

    /// Causal latent attention: `score = (q_latent·key[..L] + q_rope·key[L..]) * scale`, `out = softmax(score)·key[..L]`. `out` and `q_latent` are
    /// `[T, Q * L]`, `q_rope` is `[T, Q * R]`. Otherwise as [`Ops::paged_attention`].
    #[allow(clippy::too_many_arguments)]
    fn latent_attention(
        &self,
        out: &mut Self::Buffer,
        q_latent: &Self::Buffer,
        q_rope: &Self::Buffer,
        kv: &Self::KvCache,
        batch: &Self::Batch,
        shape: LatentShape,
        scale: f32,
        layer: usize,
    ) -> Result<()>;

    /// A product for each head: `out[r, x, :] = heads[x] · in[r, x, :]`; `x` is `[rows, X, K]`, `heads` `[X, N, K]`, `out` `[rows, X, N]`.
    fn linear_heads(
        &self,
        out: &mut Self::Buffer,
        x: &Self::Buffer,
        heads: &Self::Experts,
        rows: usize,
    ) -> Result<()>;

    /// The gated half of the feed-forward layer (Shazeer 2020): with `y = x · Wᵀ + bias`, `[rows, 2 I]`,
    /// `out[r, i] = f(y[r, i]) * y[r, I + i]`. `x` is `[rows, K]`, `weight` `[2 I, K]`: gate first, then up; `out` `[rows, I]`;
    /// `scratch` comes from [`Ops::scratch_buffer`] with `rows * 2 I` elements.
    #[allow(clippy::too_many_arguments)]
    fn linear_gated(
        &self,
        out: &mut Self::Buffer,
        scratch: &mut Self::Buffer,
        x: &Self::Buffer,
        weight: &Self::Weight,
        rows: usize,
        activation: Activation,
    ) -> Result<()>;

    /// `out[r, :] += x[r, :] / (1 + e^-gate[r])`; `out` and `x` are `[rows, width]`, `gate` `[rows]` comes from [`Ops::logits_buffer`].
    fn add_gated(
        &self,
        out: &mut Self::Buffer,
        x: &Self::Buffer,
        gate: &Self::Buffer,
        rows: usize,
        width: usize,
    ) -> Result<()>;

    /// Whether a row of the step has an adapter.
    fn has_adapters(&self, batch: &Self::Batch) -> bool;

    /// `out[t, i] += scale * B_i (A_i x[t])` for each token of a row that has an adapter, and each part i of the matrix that the adapter changes; the
    /// rest of `out` is not touched. `x` is `[T, K]`, `out` `[T, N]`.
    fn lora_add(
        &self,
        out: &mut Self::Buffer,
        x: &Self::Buffer,
        lora: &Self::Lora,
        batch: &Self::Batch,
    ) -> Result<()>;

    /// [`Ops::linear_gated`] of all T tokens with adapters: for tokens without one its bits, for others `f(gate) * up` of what
    /// [`Ops::lora_add`] makes of the product. `scratch` is an [`Ops::buffer`] of `T * 2 I` elements.
    #[allow(clippy::too_many_arguments)]
    fn lora_gated(
        &self,
        out: &mut Self::Buffer,
        scratch: &mut Self::Buffer,
        x: &Self::Buffer,
        weight: &Self::Weight,
        lora: &Self::Lora,
        batch: &Self::Batch,
        activation: Activation,
    ) -> Result<()>;

    /// `out[i] += x[i]` for the first `elems` elements.
    fn add(&self, out: &mut Self::Buffer, x: &Self::Buffer, elems: usize) -> Result<()>;

    /// Chooses k of X experts for each row of `logits` `[rows, X]`, which comes from [`Ops::logits_buffer`]: those with the largest score, each plus its
    /// entry of `bias` `[X]` where that is given; among equals the lowest first. An expert's weight is its score without the bias. See [`Routing`].
    fn moe_route(
        &self,
        routes: &mut Self::Routes,
        logits: &Self::Buffer,
        bias: Option<&Self::Vector>,
        routing: &Routing,
        rows: usize,
    ) -> Result<()>;

    /// The gated half of the experts: `out[r * k + j, :]` is [`Ops::linear_gated`] of row `r` of `x` `[rows, K]` with the matrix of its `j`-th expert,
    /// `[2 I, K]`; `out` is `[rows * k, I]`; `scratch` comes from [`Ops::scratch_buffer`] with `rows * k * 2 I` elements.
    #[allow(clippy::too_many_arguments)]
    fn moe_gated(
        &self,
        out: &mut Self::Buffer,
        scratch: &mut Self::Buffer,
        x: &Self::Buffer,
        experts: &Self::Experts,
        routes: &Self::Routes,
        rows: usize,
        activation: Activation,
    ) -> Result<()>;

    /// The other half: `out[r, :] += Σ_j weight[r, j] * (W_j · x[r * k + j, :] + bias_j)`, `j` in order; `x` is `[rows * k, I]`, the experts' matrices
    /// are `[H, I]`, `out` is `[rows, H]`, `scratch` an [`Ops::buffer`] of `rows * k * H` elements.
    #[allow(clippy::too_many_arguments)]
    fn moe_combine(
        &self,
        out: &mut Self::Buffer,
        scratch: &mut Self::Buffer,
        x: &Self::Buffer,
        experts: &Self::Experts,
        routes: &Self::Routes,
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
