//! The online softmax of a few queries, tile by tile of keys.

use super::{
    super::simd::{Simd, exp, prefetch},
    Task, View,
    products::{Keys, KvElement, scores, values},
};

/// The queries of a task, tile by tile.
#[inline(always)]
pub(super) fn attend_task<S: Simd, E: KvElement>(s: S, view: &View, task: &Task) {
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
