//! The online softmax of a few queries, tile by tile of keys.

use super::{
    super::{
        activation::soft_cap,
        simd::{Simd, exp, prefetch},
    },
    Task, View,
    products::{Keys, KvElement, Seen, scores, values, values_between, values_of_keys},
    stage,
};

/// Which of the loops is compiled.
pub(super) trait Form {
    /// Whether there may be a window, a cap, slopes or sinks, and whether later positions may be seen.
    const SCORED: bool;
    /// Whether values are the first elements of keys.
    const OF_KEYS: bool;
    /// Whether tiles are widened to f32 first.
    const STAGED: bool = true;
}

pub(super) struct Plain;
pub(super) struct Scored;
pub(super) struct OfKeys;

impl Form for Plain {
    const SCORED: bool = false;
    const OF_KEYS: bool = false;
    const STAGED: bool = false;
}

impl Form for Scored {
    const SCORED: bool = true;
    const OF_KEYS: bool = false;
}

impl Form for OfKeys {
    const SCORED: bool = false;
    const OF_KEYS: bool = true;
}

/// The queries of a task, tile by tile.
#[inline(always)]
pub(super) fn attend_task<S: Simd, E: KvElement, M: Form>(s: S, view: &View, task: &Task) {
    let group = view.num_heads / view.num_kv_heads;
    let staged = if M::STAGED { 2 * S::LANES * view.key_dim } else { 0 };
    let mut scratch = vec![0.0; S::QUERIES * (view.key_dim + view.value_dim + 2 * S::LANES) + staged];
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
            count: n,
            first,
        };
        match n {
            1 => attend::<S, E, M, 1>(s, &tile, &mut scratch),
            2 => attend::<S, E, M, 2>(s, &tile, &mut scratch),
            // Where a loop for each number is not worth its code, the last query fills up the largest.
            3 if const { !M::STAGED && S::QUERIES >= 3 } => attend::<S, E, M, 3>(s, &tile, &mut scratch),
            4 if const { !M::STAGED && S::QUERIES >= 4 } => attend::<S, E, M, 4>(s, &tile, &mut scratch),
            5 if const { !M::STAGED && S::QUERIES >= 5 } => attend::<S, E, M, 5>(s, &tile, &mut scratch),
            3..=6 if const { S::QUERIES >= 6 } => attend::<S, E, M, 6>(s, &tile, &mut scratch),
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
    /// How many they are.
    count: usize,
    /// Whether it is the first of its task, whose keys may still be in memory.
    first: bool,
}

impl Tile<'_> {
    /// Token and query head of query `i`.
    #[inline(always)]
    fn query(&self, i: usize) -> (usize, usize) {
        let i = self.at + i.min(self.count - 1);
        (self.first_token + i / self.group, self.head * self.group + i % self.group)
    }
}

/// Vector of keys number `i` of the row; empty, when it starts beyond position `last`.
#[inline(always)]
fn keys_at<S: Simd, E: KvElement, M: Form>(tile: &Tile, i: usize, last: usize) -> Keys {
    let view = tile.view;
    let (bs, d) = (view.block_size, view.key_dim);
    let per_block = bs.div_ceil(S::LANES);
    let (block, offset) = (i / per_block, i % per_block * S::LANES);
    let start = block * bs + offset;
    if start > last {
        return Keys { keys: view.keys, values: view.values, start, len: 0 };
    }
    let id = view.meta.block_tables[tile.row * view.meta.max_blocks + block] as usize;
    assert!(id < view.blocks, "block {id} of {}", view.blocks);
    let head = (id * view.num_kv_heads + tile.head) * bs;
    // Values that are read from keys lie nowhere else.
    let size = if M::STAGED { view.dtype.size() } else { E::SIZE };
    let values = if M::OF_KEYS { 0 } else { (head + offset) * d * size };
    // SAFETY: block `id` exists, and `offset` is a slot of it.
    unsafe {
        Keys {
            keys: view.keys.add((head * d + offset) * size),
            values: view.values.add(values),
            start,
            len: (bs - offset).min(S::LANES).min(last + 1 - start),
        }
    }
}

/// Asks for keys and values to come into the second-level cache: blocks lie anywhere, so no hardware foresees the next one.
#[inline(always)]
fn ask_for<M: Form>(keys: Keys, [d, block_size, size]: [usize; 3]) {
    if keys.len == 0 {
        return;
    }
    let stride = block_size * size;
    for i in (0..d).step_by((64 / stride).max(1)) {
        prefetch(keys.keys.wrapping_add(i * stride));
    }
    if !M::OF_KEYS {
        for at in (0..keys.len * d * size).step_by(64) {
            prefetch(keys.values.wrapping_add(at));
        }
    }
}

/// Which keys of a vector a query sees that sees positions `first..=last`.
#[inline(always)]
fn seen(keys: Keys, [first, last]: [usize; 2]) -> [usize; 2] {
    let end = (last + 1).saturating_sub(keys.start).min(keys.len);
    [first.saturating_sub(keys.start).min(end), end]
}

/// Copies the queries of a tile, multiplied with the scale.
#[inline(always)]
fn gather<M: Form, const QT: usize>(tile: &Tile, q: &mut [f32]) {
    let (view, d) = (tile.view, tile.view.key_dim);
    let (scale, dim, tail) = (view.scoring.scale, view.queries.dim, d - view.queries.dim);
    for i in 0..QT {
        let (token, head) = tile.query(i);
        let from = &view.queries.heads[token * view.queries.stride + head * dim..][..dim];
        let (heads, tails) = q[i * d..(i + 1) * d].split_at_mut(dim);
        for (q, x) in heads.iter_mut().zip(from) {
            *q = x * scale;
        }
        if M::OF_KEYS {
            let from = &view.queries.tails[(token * view.num_heads + head) * tail..][..tail];
            for (q, x) in tails.iter_mut().zip(from) {
                *q = x * scale;
            }
        }
    }
}

/// Caps a vector of scores and adds the slope's bias.
#[inline(always)]
fn adjust<S: Simd>(s: S, view: &View, score: S::F, start: usize, (head, position): (usize, usize)) -> S::F {
    const LANES: [f32; 16] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
    let mut score = score;
    if let Some(cap) = view.scoring.soft_cap {
        score = soft_cap(s, cap, score);
    }
    if let Some(slopes) = view.scoring.slopes {
        // SAFETY: no vector has more lanes than the array has elements.
        let lanes = unsafe { s.load(LANES.as_ptr()) };
        let distance = s.add(lanes, s.splat(start as f32 - position as f32));
        score = s.fma(s.splat(slopes[head]), distance, score);
    }
    score
}

/// `QT` queries over all their keys.
#[inline(always)]
fn attend<S: Simd, E: KvElement, M: Form, const QT: usize>(s: S, tile: &Tile, scratch: &mut [f32]) {
    let (view, block_size) = (tile.view, tile.view.block_size);
    let (d, dv) = (view.key_dim, view.value_dim);
    let (q, rest) = scratch.split_at_mut(QT * d);
    let (acc, rest) = rest.split_at_mut(QT * dv);
    let (weights, staged) = rest.split_at_mut(QT * 2 * S::LANES);
    let staged = staged.as_mut_ptr();
    gather::<M, QT>(tile, q);
    acc.fill(0.0);
    let mut position = [0; QT];
    let mut sight = [[0; 2]; QT];
    let mut max = [f32::NEG_INFINITY; QT];
    let mut sum = [s.splat(0.0); QT];
    for i in 0..QT {
        let (token, head) = tile.query(i);
        position[i] = view.meta.positions[token] as usize;
        sight[i] = if M::SCORED { view.sight(tile.row, position[i]) } else { [0, position[i]] };
        if let Some(sinks) = view.scoring.sinks.filter(|_| M::SCORED) {
            // A key without a value.
            (max[i], sum[i]) = (sinks[head], s.keep_first(s.splat(1.0), 1, 0.0));
        }
    }
    let last = sight[QT - 1][1];
    let keys = |i: usize| keys_at::<S, E, M>(tile, i, last);

    // Pairs are cut at the same places for every query. Those before its window leave no trace.
    let mut next = if M::SCORED {
        let per_block = block_size.div_ceil(S::LANES);
        (sight[0][0] / block_size * per_block + sight[0][0] % block_size / S::LANES) & !1
    } else {
        0
    };
    loop {
        let pair = [keys(next), keys(next + 1)];
        if pair[0].len == 0 {
            break;
        }
        next += 2;
        if tile.first {
            let extents = [d, block_size, if M::STAGED { view.dtype.size() } else { E::SIZE }];
            ask_for::<M>(keys(next), extents);
            ask_for::<M>(keys(next + 1), extents);
        }
        let (mut pair, mut stride) = (pair, block_size);
        if M::STAGED {
            // SAFETY: the keys of both vectors are in the cache; what is staged has room for a tile, and is used until the next one.
            (pair, stride) = unsafe { stage::keys(s, view.dtype, pair, [d, block_size], staged) };
        }
        // SAFETY: the keys of both vectors are there, `q` holds QT * D elements.
        let scores = unsafe { scores::<S, E, QT>(s, q, pair, d, stride) };
        let mut decay = [1.0; QT];
        let mut ranges: [Seen; QT] = [[[0; 2]; 2]; QT];
        for i in 0..QT {
            ranges[i] = pair.map(|keys| seen(keys, sight[i]));
            if ranges[i].iter().all(|range| range[0] == range[1]) {
                continue;
            }
            let mut ab = scores[i];
            for g in 0..2 {
                if M::SCORED {
                    ab[g] = adjust(s, view, ab[g], pair[g].start, (tile.query(i).1, position[i]));
                    ab[g] = s.drop_first(ab[g], ranges[i][g][0], f32::NEG_INFINITY);
                }
                ab[g] = s.keep_first(ab[g], ranges[i][g][1], f32::NEG_INFINITY);
            }
            let [a, b] = ab;
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
        // SAFETY: the values of both vectors are in the cache; `acc` holds QT values, `weights` QT * 2 * LANES.
        unsafe {
            if M::OF_KEYS {
                values_of_keys::<S, E, QT>(s, acc, weights, pair, &ranges, &decay, [dv, stride]);
            } else if M::SCORED {
                let pair = stage::values(s, view.dtype, pair, d, staged);
                values_between::<S, E, QT>(s, acc, weights, pair, &ranges, &decay, d);
            } else {
                values::<S, E, QT>(s, acc, weights, pair, &ranges, &decay, d);
            }
        }
    }

    for i in 0..tile.count.min(QT) {
        let (token, head) = tile.query(i);
        // SAFETY: these outputs belong to this token and head, hence to this task alone.
        let out = unsafe { view.out.slice((token * view.num_heads + head) * dv, dv) };
        let total = s.sum(sum[i]);
        for (o, a) in out.iter_mut().zip(&acc[i * dv..]) {
            *o = a / total;
        }
    }
}
