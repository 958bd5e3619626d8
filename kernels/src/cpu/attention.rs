//! Causal attention over paged keys and values.
//!
//! A query meets the keys of its sequence in tiles of two vectors of keys; a vector never crosses a block. Each tile makes one step of the online
//! softmax: `m' = max(m, scores)`, `l' = l e^(m - m') + Σ e^(score - m')`, and the same for the weighted values. Tiles are cut at fixed positions and
//! keys that a query must not see only ever add a zero, so a query's bits depend on nothing but its own sequence.
//! Queries that share keys (a head's group, neighbouring tokens) go through the tiles side by side.

use std::ops::Range;

use super::{
    CpuBuffer, CpuKvCache,
    isa::{Host, Job},
    pool::{Pool, Shared},
    simd::{Simd, exp, prefetch},
};
use crate::{
    ops::{BatchMeta, HeadShape},
    tensor::DType,
};

/// Queries of one task, when there are that many in a prompt chunk.
const TASK_QUERIES: usize = 48;

/// The arguments of one call.
pub(super) struct Call<'a> {
    pub(super) out: &'a mut CpuBuffer,
    pub(super) qkv: &'a CpuBuffer,
    pub(super) kv: &'a CpuKvCache,
    pub(super) meta: &'a BatchMeta,
    pub(super) heads: HeadShape,
    pub(super) scale: f32,
    pub(super) layer: usize,
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
pub(super) fn run(host: Host, pool: &Pool, call: Call) {
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

/// Storage of a cache.
trait KvElement {
    const SIZE: usize;
    /// # Safety
    /// `p` is valid for the first `n` of `LANES` elements.
    unsafe fn load<S: Simd>(s: S, p: *const u8, n: usize) -> S::F;
}

struct F32Kv;
struct Bf16Kv;

impl KvElement for F32Kv {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8, n: usize) -> S::F {
        // SAFETY: by the caller's word.
        unsafe { if n == S::LANES { s.load(p.cast()) } else { s.load_first(p.cast(), n) } }
    }
}

impl KvElement for Bf16Kv {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8, n: usize) -> S::F {
        // SAFETY: by the caller's word.
        unsafe { if n == S::LANES { s.load_bf16(p) } else { s.load_bf16_first(p, n) } }
    }
}

/// The queries of a task, tile by tile.
#[inline(always)]
fn attend_task<S: Simd, E: KvElement>(s: S, view: &View, task: &Task) {
    let group = view.heads.num_heads / view.heads.num_kv_heads;
    let mut scratch = vec![0.0; S::QUERIES * (2 * view.heads.head_dim + 2 * S::LANES)];
    let mut at = task.queries.start;
    while at < task.queries.end {
        let n = (task.queries.end - at).min(S::QUERIES);
        let first = at == task.queries.start;
        let tile = Tile {
            view,
            row: task.span.row,
            head: task.head,
            group,
            first_token: task.span.first,
            at,
            first,
        };
        match n {
            1 => attend::<S, E, 1>(s, &tile, &mut scratch),
            2 => attend::<S, E, 2>(s, &tile, &mut scratch),
            3 if S::QUERIES >= 3 => attend::<S, E, 3>(s, &tile, &mut scratch),
            4 if S::QUERIES >= 4 => attend::<S, E, 4>(s, &tile, &mut scratch),
            5 if S::QUERIES >= 5 => attend::<S, E, 5>(s, &tile, &mut scratch),
            6 if S::QUERIES >= 6 => attend::<S, E, 6>(s, &tile, &mut scratch),
            _ => unreachable!("a tile of {n} queries"),
        }
        at += n;
    }
}

/// Neighbouring queries of a span: query `at + i` is head `i % group` of the group of token `i / group`.
struct Tile<'a> {
    view: &'a View<'a>,
    row: usize,
    head: usize,
    group: usize,
    first_token: usize,
    at: usize,
    /// Whether it is the first of its task, whose keys may still be in memory.
    first: bool,
}

impl Tile<'_> {
    /// Token and query head of query `i`.
    #[inline(always)]
    fn query(&self, i: usize) -> (usize, usize) {
        let i = self.at + i;
        (self.first_token + i / self.group, self.head * self.group + i % self.group)
    }
}

/// Up to `LANES` consecutive keys of one block.
#[derive(Clone, Copy)]
struct Keys {
    /// First key: element `d` of key `j` is at `d * block_size + j`.
    keys: *const u8,
    /// First value: element `d` of value `j` is at `j * D + d`.
    values: *const u8,
    /// Position of the first key.
    start: usize,
    /// Number of keys.
    len: usize,
}

/// Vector of keys number `i` of the row; empty, when it starts beyond position `last`.
#[inline(always)]
fn keys_at<S: Simd, E: KvElement>(tile: &Tile, i: usize, last: usize) -> Keys {
    let view = tile.view;
    let (bs, d) = (view.block_size, view.heads.head_dim);
    let per_block = bs.div_ceil(S::LANES);
    let (block, offset) = (i / per_block, i % per_block * S::LANES);
    let start = block * bs + offset;
    if start > last {
        return Keys { keys: view.keys, values: view.values, start, len: 0 };
    }
    let id = view.meta.block_tables[tile.row * view.meta.max_blocks + block] as usize;
    assert!(id < view.blocks, "block {id} of {}", view.blocks);
    let head = (id * view.heads.num_kv_heads + tile.head) * bs * d;
    // SAFETY: block `id` exists, and `offset` is a slot of it.
    unsafe {
        Keys {
            keys: view.keys.add((head + offset) * E::SIZE),
            values: view.values.add((head + offset * d) * E::SIZE),
            start,
            len: (bs - offset).min(S::LANES).min(last + 1 - start),
        }
    }
}

/// Asks for keys and values to come into the second-level cache: blocks lie anywhere, so no hardware foresees the next one.
#[inline(always)]
fn ask_for<E: KvElement>(keys: Keys, d: usize, block_size: usize) {
    if keys.len == 0 {
        return;
    }
    let stride = block_size * E::SIZE;
    for i in (0..d).step_by((64 / stride).max(1)) {
        prefetch(keys.keys.wrapping_add(i * stride));
    }
    for at in (0..keys.len * d * E::SIZE).step_by(64) {
        prefetch(keys.values.wrapping_add(at));
    }
}

/// `QT` queries over all their keys.
#[inline(always)]
fn attend<S: Simd, E: KvElement, const QT: usize>(s: S, tile: &Tile, scratch: &mut [f32]) {
    let view = tile.view;
    let d = view.heads.head_dim;
    let (q, rest) = scratch.split_at_mut(QT * d);
    let (acc, rest) = rest.split_at_mut(QT * d);
    let weights = &mut rest[..QT * 2 * S::LANES];
    let mut position = [0; QT];
    for i in 0..QT {
        let (token, head) = tile.query(i);
        position[i] = view.meta.positions[token] as usize;
        let from = &view.qkv[token * view.heads.qkv_width() + head * d..][..d];
        for (q, x) in q[i * d..(i + 1) * d].iter_mut().zip(from) {
            *q = x * view.scale;
        }
    }
    acc.fill(0.0);
    let last = position[QT - 1];
    let mut max = [f32::NEG_INFINITY; QT];
    let mut sum = [s.splat(0.0); QT];

    let mut next = 0;
    loop {
        let pair = [keys_at::<S, E>(tile, next, last), keys_at::<S, E>(tile, next + 1, last)];
        if pair[0].len == 0 {
            break;
        }
        next += 2;
        if tile.first {
            ask_for::<E>(keys_at::<S, E>(tile, next, last), d, view.block_size);
            ask_for::<E>(keys_at::<S, E>(tile, next + 1, last), d, view.block_size);
        }
        // SAFETY: the keys of both vectors are in the cache, `q` holds QT * D elements.
        let scores = unsafe { scores::<S, E, QT>(s, q, pair, d, view.block_size) };
        let mut decay = [1.0; QT];
        let mut seen = [[0; 2]; QT];
        for i in 0..QT {
            seen[i] = pair.map(|keys| (position[i] + 1).saturating_sub(keys.start).min(keys.len));
            if seen[i][0] == 0 {
                continue;
            }
            let a = s.keep_first(scores[i][0], seen[i][0], f32::NEG_INFINITY);
            let b = s.keep_first(scores[i][1], seen[i][1], f32::NEG_INFINITY);
            let new = max[i].max(s.max_lane(s.max(a, b)));
            let shift = s.splat(new);
            let (a, b) = (exp(s, s.sub(a, shift)), exp(s, s.sub(b, shift)));
            let c = exp(s, s.splat(max[i] - new));
            sum[i] = s.fma(sum[i], c, s.add(a, b));
            max[i] = new;
            // SAFETY: `weights` holds 2 * LANES elements for each query; the array one vector.
            unsafe {
                s.store(weights.as_mut_ptr().add(i * 2 * S::LANES), a);
                s.store(weights.as_mut_ptr().add((2 * i + 1) * S::LANES), b);
                s.store_first(&mut decay[i], c, 1);
            }
        }
        // SAFETY: the values of both vectors are in the cache; `acc` holds QT * D elements, `weights` QT * 2 * LANES.
        unsafe { values::<S, E, QT>(s, acc, weights, pair, &seen, &decay, d) };
    }

    for i in 0..QT {
        let (token, head) = tile.query(i);
        // SAFETY: these D outputs belong to this token and head, hence to this task alone.
        let out = unsafe { view.out.slice((token * view.heads.num_heads + head) * d, d) };
        let total = s.sum(sum[i]);
        for (o, a) in out.iter_mut().zip(&acc[i * d..]) {
            *o = a / total;
        }
    }
}

/// Scores of `QT` queries with two vectors of keys: even and odd elements of the head in sums of their own.
#[inline(always)]
unsafe fn scores<S: Simd, E: KvElement, const QT: usize>(
    s: S,
    q: &[f32],
    pair: [Keys; 2],
    d: usize,
    block_size: usize,
) -> [[S::F; 2]; QT] {
    let mut acc = [[[s.splat(0.0); 2]; 2]; QT];
    let full = pair[0].len == S::LANES && pair[1].len == S::LANES;
    let len = if full { [S::LANES; 2] } else { [pair[0].len, pair[1].len] };
    let stride = block_size * E::SIZE;
    let q = q.as_ptr();
    let mut at = 0;
    while at < d {
        for odd in 0..2 {
            // SAFETY: element `at + odd` exists, as D is even; `len` keys of each vector do.
            unsafe {
                let (k0, k1) = if full {
                    (
                        E::load(s, pair[0].keys.add((at + odd) * stride), S::LANES),
                        E::load(s, pair[1].keys.add((at + odd) * stride), S::LANES),
                    )
                } else {
                    (
                        E::load(s, pair[0].keys.add((at + odd) * stride), len[0]),
                        if len[1] == 0 {
                            s.splat(0.0)
                        } else {
                            E::load(s, pair[1].keys.add((at + odd) * stride), len[1])
                        },
                    )
                };
                for i in 0..QT {
                    let x = s.splat(*q.add(i * d + at + odd));
                    acc[i][odd][0] = s.fma(x, k0, acc[i][odd][0]);
                    acc[i][odd][1] = s.fma(x, k1, acc[i][odd][1]);
                }
            }
        }
        at += 2;
    }
    let mut out = [[s.splat(0.0); 2]; QT];
    for i in 0..QT {
        out[i] = [s.add(acc[i][0][0], acc[i][1][0]), s.add(acc[i][0][1], acc[i][1][1])];
    }
    out
}

/// `acc = acc * decay + Σ weight * value` over the keys that each query has seen.
#[inline(always)]
unsafe fn values<S: Simd, E: KvElement, const QT: usize>(
    s: S,
    acc: &mut [f32],
    weights: &[f32],
    pair: [Keys; 2],
    seen: &[[usize; 2]; QT],
    decay: &[f32; QT],
    d: usize,
) {
    // Keys that all queries see go side by side; those that only later queries see follow query by query.
    let mut common = seen[0];
    for i in 1..QT {
        common = [common[0].min(seen[i][0]), common[1].min(seen[i][1])];
    }
    let mut from = [[0, common[0]], [0, common[1]]];
    // SAFETY: by the caller's word; `from` never passes the number of keys of a vector.
    unsafe {
        weigh::<S, E, QT>(s, acc.as_mut_ptr(), weights.as_ptr(), pair, from, decay, d);
        for i in 0..QT {
            if seen[i] != common {
                from = [[common[0], seen[i][0]], [common[1], seen[i][1]]];
                let acc = acc.as_mut_ptr().add(i * d);
                let weights = weights.as_ptr().add(i * 2 * S::LANES);
                weigh::<S, E, 1>(s, acc, weights, pair, from, &[1.0], d);
            }
        }
    }
}

/// Walks the head in chunks of four vectors, then single ones.
#[inline(always)]
unsafe fn weigh<S: Simd, E: KvElement, const QT: usize>(
    s: S,
    acc: *mut f32,
    weights: *const f32,
    pair: [Keys; 2],
    range: [[usize; 2]; 2],
    decay: &[f32; QT],
    d: usize,
) {
    let mut at = 0;
    // SAFETY: elements `at..` of the head up to D, by the caller's word.
    unsafe {
        while at + 4 * S::LANES <= d {
            weigh_chunk::<S, E, QT, 4>(s, acc.add(at), weights, pair, range, decay, [d, at, S::LANES]);
            at += 4 * S::LANES;
        }
        while at < d {
            let n = (d - at).min(S::LANES);
            weigh_chunk::<S, E, QT, 1>(s, acc.add(at), weights, pair, range, decay, [d, at, n]);
            at += n;
        }
    }
}

/// `CH` vectors of the head, starting at element `at`, of which the last has `n` elements.
#[inline(always)]
unsafe fn weigh_chunk<S: Simd, E: KvElement, const QT: usize, const CH: usize>(
    s: S,
    acc: *mut f32,
    weights: *const f32,
    pair: [Keys; 2],
    range: [[usize; 2]; 2],
    decay: &[f32; QT],
    [d, at, n]: [usize; 3],
) {
    let mut sums = [[s.splat(0.0); CH]; QT];
    // SAFETY: by the caller's word.
    unsafe {
        for i in 0..QT {
            for c in 0..CH {
                let old = s.load_first(acc.add(i * d + c * S::LANES), n);
                sums[i][c] = s.mul(old, s.splat(decay[i]));
            }
        }
        for (g, keys) in pair.iter().enumerate() {
            for j in range[g][0]..range[g][1] {
                let row = keys.values.add((j * d + at) * E::SIZE);
                let mut v = [s.splat(0.0); CH];
                for c in 0..CH {
                    let len = if CH == 1 { n } else { S::LANES };
                    v[c] = E::load(s, row.add(c * S::LANES * E::SIZE), len);
                }
                for i in 0..QT {
                    let x = s.splat(*weights.add((2 * i + g) * S::LANES + j));
                    for c in 0..CH {
                        sums[i][c] = s.fma(x, v[c], sums[i][c]);
                    }
                }
            }
        }
        for i in 0..QT {
            for c in 0..CH {
                s.store_first(acc.add(i * d + c * S::LANES), sums[i][c], n);
            }
        }
    }
}
