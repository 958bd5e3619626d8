//! Attention over paged keys and values.
//!
//! A query meets the keys of its sequence in tiles of two vectors of keys; a vector never crosses a block. Each tile makes one step of the online
//! softmax: `m' = max(m, scores)`, `l' = l e^(m - m') + Σ e^(score - m')`, and the same for the weighted values. Tiles are cut at fixed positions and
//! keys that a query must not see only ever add a zero, so a query's bits depend on nothing but its own sequence.
//! Queries that share keys (a head's group, neighbouring tokens) go through the tiles side by side.
//!
//! The plain causal form, the one with windows, caps and biases, and the latent one are three [`Mode`]s of the same loop. The plain one reads its
//! keys and values where they lie; the others, and all over F8E4M3, widen a tile of them first, so that they need no loop for each storage.

mod latent;
mod products;
mod stage;
mod tile;

use std::ops::Range;

pub(in crate::cpu) use self::latent::{Latent, run as run_latent};
use self::{
    products::{Bf16Kv, F32Kv},
    tile::{OfKeys, Plain, Scored, attend_task},
};
use super::{
    CpuBuffer, CpuKvCache,
    isa::{Host, Job},
    pool::{Pool, Shared},
    simd::Simd,
};
use crate::{
    ops::{BatchMeta, HeadShape, Scoring},
    tensor::DType,
};

/// Queries of one task, when there are that many in a prompt chunk.
const TASK_QUERIES: usize = 48;

/// The arguments of one call.
pub(in crate::cpu) struct Call<'a> {
    pub(in crate::cpu) out: &'a mut CpuBuffer,
    pub(in crate::cpu) qkv: &'a CpuBuffer,
    pub(in crate::cpu) kv: &'a CpuKvCache,
    pub(in crate::cpu) meta: &'a BatchMeta,
    pub(in crate::cpu) heads: HeadShape,
    pub(in crate::cpu) scoring: Scoring<'a, Vec<f32>>,
    pub(in crate::cpu) layer: usize,
}

/// Neighbouring new tokens of one row.
#[derive(Clone, Copy)]
struct Span {
    row: usize,
    first: usize,
    last: usize,
}

/// Work that one thread takes: the queries of a span that read one key/value head, or one of several shares of them.
struct Task {
    span: Span,
    head: usize,
    /// Which of the queries, token by token, then head by head of the group.
    queries: Range<usize>,
}

/// `Ops::paged_attention`.
pub(in crate::cpu) fn run(host: Host, pool: &Pool, call: Call) {
    let Call { out, qkv, kv, meta, heads, scoring, layer } = call;
    let HeadShape { num_heads, num_kv_heads, head_dim } = heads;
    let shape = kv.shape;
    assert_eq!(
        (shape.num_kv_heads, shape.head_dim, shape.value_dim),
        (num_kv_heads, head_dim, head_dim),
        "cache of another model"
    );
    let per_head = [scoring.slopes, scoring.sinks];
    assert!(per_head.iter().flatten().all(|v| v.len() == num_heads), "a number for each query head");
    assert!(scoring.window != Some(0), "a window without a position");
    let (tokens, width) = (meta.num_tokens(), num_heads * head_dim);
    let [keys, values] = kv.layer(layer);
    let view = View {
        keys,
        values,
        meta,
        queries: Queries {
            heads: &qkv.as_slice()[..tokens * heads.qkv_width()],
            stride: heads.qkv_width(),
            dim: head_dim,
            tails: &[],
        },
        out: Shared::new(&mut out.as_mut_slice()[..tokens * width]),
        num_heads,
        num_kv_heads,
        key_dim: head_dim,
        value_dim: head_dim,
        scoring,
        block_size: shape.block_size,
        blocks: shape.num_blocks,
        dtype: shape.dtype,
    };
    let plain = matches!(
        scoring,
        Scoring { window: None, soft_cap: None, slopes: None, sinks: None, causal: true, .. }
    );
    let mode = if plain && shape.dtype != DType::F8E4M3 { Mode::Plain } else { Mode::Scored };
    view.attend(host, pool, mode);
}

/// Cuts the tokens of every row into spans of about [`TASK_QUERIES`] queries.
fn spans(meta: &BatchMeta, group: usize) -> Vec<Span> {
    let most = (TASK_QUERIES / group).max(1);
    let mut spans = Vec::with_capacity(meta.num_rows() + meta.num_tokens() / most);
    for row in 0..meta.num_rows() {
        let end = meta.cu_seqlens_q[row + 1] as usize;
        let mut first = meta.cu_seqlens_q[row] as usize;
        while first < end {
            let last = (first + most).min(end) - 1;
            spans.push(Span { row, first, last });
            first = last + 1;
        }
    }
    spans
}

/// Where queries lie.
struct Queries<'a> {
    /// `[T, stride]`, of which the first `num_heads * dim` are the queries.
    heads: &'a [f32],
    stride: usize,
    dim: usize,
    /// `[T, num_heads, key_dim - dim]`: the rest of each query, where it lies elsewhere.
    tails: &'a [f32],
}

/// What the tasks of a call share.
struct View<'a> {
    keys: *const u8,
    values: *const u8,
    meta: &'a BatchMeta,
    queries: Queries<'a>,
    /// `[T, num_heads, value_dim]`, where `value_dim` may be that of a part of the key.
    out: Shared<f32>,
    num_heads: usize,
    num_kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    scoring: Scoring<'a, Vec<f32>>,
    block_size: usize,
    blocks: usize,
    dtype: DType,
}

// SAFETY: the two pointers are to a cache that is borrowed, and only read, during the call.
unsafe impl Sync for View<'_> {}

impl View<'_> {
    /// Does all tasks.
    fn attend(&self, host: Host, pool: &Pool, mode: Mode) {
        let (meta, heads) = (self.meta, self.num_kv_heads);
        let group = self.num_heads / heads;
        let spans = spans(meta, group);
        let pairs = |s: &Span| {
            let [first, last] = self.sight(s.row, meta.positions[s.last] as usize);
            (s.last - s.first + 1) * (last - first + 1)
        };
        let pairs: usize = spans.iter().map(pairs).sum();
        let nanos = pairs * self.num_heads * (self.key_dim + self.value_dim) / 32;
        // With less to do than threads, the queries of a group part, though each share reads all keys.
        let shares = (2 * pool.threads()).div_ceil(spans.len().max(1) * heads).min(group);
        // The last tokens of a prompt have the most to do: they go first, so that the threads end together.
        pool.for_each(spans.len() * heads * shares, nanos, |i| {
            let (i, share) = (i / shares, i % shares);
            let span = spans[spans.len() - 1 - i / heads];
            let all = (span.last - span.first + 1) * group;
            let queries = all * share / shares..all * (share + 1) / shares;
            let task = Task { span, head: i % heads, queries };
            host.run(TaskJob { view: self, task, mode });
        });
    }

    /// The first and the last position that a token of `row` at `position` sees.
    #[inline(always)]
    fn sight(&self, row: usize, position: usize) -> [usize; 2] {
        let Scoring { window, causal, .. } = self.scoring;
        let window = window.unwrap_or(usize::MAX);
        let after = if causal { 0 } else { window - 1 };
        let end = self.meta.context_lens[row] as usize;
        [(position + 1).saturating_sub(window), position.saturating_add(after).min(end.max(1) - 1)]
    }
}

/// What is computed: chosen once per task, so that each has a loop of its own.
#[derive(Clone, Copy)]
enum Mode {
    /// Causal, and nothing else.
    Plain,
    /// With all that [`Scoring`] has.
    Scored,
    /// Causal, and the first elements of a key are its value.
    OfKeys,
}

struct TaskJob<'a> {
    view: &'a View<'a>,
    task: Task,
    mode: Mode,
}

impl Job for TaskJob<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let TaskJob { view, task, mode } = self;
        match (mode, view.dtype) {
            (Mode::Plain, DType::Bf16) => attend_task::<S, Bf16Kv, Plain>(s, view, &task),
            (Mode::Plain, _) => attend_task::<S, F32Kv, Plain>(s, view, &task),
            (Mode::Scored, _) => attend_task::<S, F32Kv, Scored>(s, view, &task),
            (Mode::OfKeys, _) => attend_task::<S, F32Kv, OfKeys>(s, view, &task),
        }
    }
}
