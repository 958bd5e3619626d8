//! Causal attention over paged keys and values.
//!
//! A query meets the keys of its sequence in tiles of two vectors of keys; a vector never crosses a block. Each tile makes one step of the online
//! softmax: `m' = max(m, scores)`, `l' = l e^(m - m') + Σ e^(score - m')`, and the same for the weighted values. Tiles are cut at fixed positions and
//! keys that a query must not see only ever add a zero, so a query's bits depend on nothing but its own sequence.
//! Queries that share keys (a head's group, neighbouring tokens) go through the tiles side by side.

mod products;
mod tile;

use std::ops::Range;

use self::{
    products::{Bf16Kv, F32Kv},
    tile::attend_task,
};
use super::{
    CpuBuffer, CpuKvCache,
    isa::{Host, Job},
    pool::{Pool, Shared},
    simd::Simd,
};
use crate::{
    ops::{BatchMeta, HeadShape},
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
    pub(in crate::cpu) scale: f32,
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
    let Call { out, qkv, kv, meta, heads, scale, layer } = call;
    let shape = kv.shape;
    assert_eq!(
        (shape.num_kv_heads, shape.head_dim),
        (heads.num_kv_heads, heads.head_dim),
        "cache of another model"
    );
    let (tokens, width) = (meta.num_tokens(), heads.num_heads * heads.head_dim);
    let out = Shared::new(&mut out.as_mut_slice()[..tokens * width]);
    let qkv = &qkv.as_slice()[..tokens * heads.qkv_width()];
    let spans = spans(meta, heads);
    let [keys, values] = kv.layer(layer);
    let view = View {
        keys,
        values,
        meta,
        qkv,
        out,
        heads,
        scale,
        block_size: shape.block_size,
        blocks: shape.num_blocks,
    };

    let pairs: usize =
        spans.iter().map(|s| (s.last - s.first + 1) * (meta.positions[s.last] as usize + 1)).sum();
    let nanos = pairs * width / 16;
    let group = heads.num_heads / heads.num_kv_heads;
    // With less to do than threads, the queries of a group part, though each share reads all keys.
    let shares = (2 * pool.threads()).div_ceil(spans.len().max(1) * heads.num_kv_heads).min(group);
    // The last tokens of a prompt have the most to do: they go first, so that the threads end together.
    pool.for_each(spans.len() * heads.num_kv_heads * shares, nanos, |i| {
        let (i, share) = (i / shares, i % shares);
        let span = spans[spans.len() - 1 - i / heads.num_kv_heads];
        let all = (span.last - span.first + 1) * group;
        let queries = all * share / shares..all * (share + 1) / shares;
        let task = Task { span, head: i % heads.num_kv_heads, queries };
        host.run(TaskJob { view: &view, task, dtype: shape.dtype });
    });
}

/// Cuts the tokens of every row into spans of about [`TASK_QUERIES`] queries.
fn spans(meta: &BatchMeta, heads: HeadShape) -> Vec<Span> {
    let most = (TASK_QUERIES * heads.num_kv_heads / heads.num_heads).max(1);
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

/// What the tasks of a call share.
struct View<'a> {
    keys: *const u8,
    values: *const u8,
    meta: &'a BatchMeta,
    qkv: &'a [f32],
    out: Shared<f32>,
    heads: HeadShape,
    scale: f32,
    block_size: usize,
    blocks: usize,
}

// SAFETY: the two pointers are to a cache that is borrowed, and only read, during the call.
unsafe impl Sync for View<'_> {}

struct TaskJob<'a> {
    view: &'a View<'a>,
    task: Task,
    dtype: DType,
}

impl Job for TaskJob<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.dtype {
            DType::Bf16 => attend_task::<S, Bf16Kv>(s, self.view, &self.task),
            _ => attend_task::<S, F32Kv>(s, self.view, &self.task),
        }
    }
}
