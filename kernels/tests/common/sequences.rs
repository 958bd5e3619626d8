//! Sequences in a paged cache: what attention is to give for them, by its definition in f64, and what a device gives.
#![allow(dead_code)]

use std::sync::Arc;

use tidemill_kernels::{
    DType, Ops,
    cpu::{CpuKvCache, CpuOps},
    ops::{BatchMeta, HeadNorm, HeadShape, KvShape, QkTransform, Rotary, Scoring},
    tensor::{f8_to_f32, f32_to_f8},
};

use crate::common::{Rng, buffer, poisoned};

/// One sequence to be computed: its tokens' fused activations, and its blocks.
pub struct Sequence {
    pub qkv: Vec<f32>,
    pub blocks: Vec<u32>,
    pub len: usize,
}

/// What is done to queries and keys, and how scores are made.
#[derive(Debug, Clone, Copy)]
pub struct Form {
    /// Elements that are rotated.
    pub rotated: usize,
    pub interleaved: bool,
    pub head_norm: bool,
    pub window: Option<usize>,
    pub soft_cap: Option<f32>,
    pub slopes: bool,
    pub sinks: bool,
    pub causal: bool,
}

impl Form {
    /// Whole heads are rotated, and attention is causal.
    pub fn plain(heads: HeadShape) -> Form {
        Form {
            rotated: heads.head_dim,
            interleaved: false,
            head_norm: false,
            window: None,
            soft_cap: None,
            slopes: false,
            sinks: false,
            causal: true,
        }
    }
}

pub struct Setup {
    pub heads: HeadShape,
    pub shape: KvShape,
    pub form: Form,
    /// `[positions, rotated]`.
    rope: Vec<f32>,
    /// `[2, D]`: for queries and for keys.
    norms: [Vec<f32>; 2],
    slopes: Vec<f32>,
    sinks: Vec<f32>,
    pub sequences: Vec<Sequence>,
}

const SCALE: f32 = 0.3;
const EPS: f32 = 1e-5;

pub fn heads(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> HeadShape {
    HeadShape { num_heads, num_kv_heads, head_dim }
}

/// A table of rotations for `positions`: cosines, then sines of `dim / 2` angles each.
pub fn rotations(positions: usize, dim: usize) -> Vec<f32> {
    let half = dim / 2;
    let mut table = vec![];
    for p in 0..positions {
        let angle = |i: usize| p as f32 * 100_f32.powf(-(i as f32) / half as f32);
        table.extend((0..half).map(|i| angle(i).cos()));
        table.extend((0..half).map(|i| angle(i).sin()));
    }
    table
}

/// Blocks for sequences of these lengths, in no order, out of `num_blocks`.
pub fn scatter(rng: &mut Rng, lens: &[usize], block_size: usize, num_blocks: usize) -> Vec<Vec<u32>> {
    let mut free: Vec<u32> = (0..num_blocks as u32).collect();
    for i in (1..free.len()).rev() {
        free.swap(i, rng.below(i + 1));
    }
    lens.iter().map(|len| free.split_off(free.len() - len.div_ceil(block_size))).collect()
}

pub fn setup(heads: HeadShape, block_size: usize, dtype: DType, lens: &[usize], form: Form) -> Setup {
    let mut rng = Rng::new(heads.head_dim as u64 * 31 + block_size as u64);
    let longest = *lens.iter().max().unwrap();
    let num_blocks = longest.div_ceil(block_size) * lens.len() + 3;
    let shape = KvShape {
        num_layers: 2,
        num_blocks,
        block_size,
        num_kv_heads: heads.num_kv_heads,
        head_dim: heads.head_dim,
        value_dim: heads.head_dim,
        dtype,
    };
    let blocks = scatter(&mut rng, lens, block_size, num_blocks);
    let sequences = lens
        .iter()
        .zip(blocks)
        .map(|(&len, blocks)| Sequence { qkv: rng.units(len * heads.qkv_width()), blocks, len })
        .collect();
    Setup {
        heads,
        shape,
        form,
        rope: rotations(longest, form.rotated),
        norms: [rng.units(heads.head_dim), rng.units(heads.head_dim)],
        slopes: (1..=heads.num_heads).map(|i| 0.5_f32.powf(i as f32 / 2.0)).collect(),
        sinks: rng.units(heads.num_heads).iter().map(|v| v * 3.0).collect(),
        sequences,
    }
}

impl Setup {
    pub fn transform(&self) -> QkTransform<'_, Vec<f32>> {
        let Form { rotated: dim, interleaved, head_norm, .. } = self.form;
        let [q_weight, k_weight] = &self.norms;
        QkTransform {
            norm: head_norm.then_some(HeadNorm { q_weight, k_weight, eps: EPS }),
            rotary: (dim > 0).then_some(Rotary { table: &self.rope, dim, interleaved }),
        }
    }

    pub fn scoring(&self) -> Scoring<'_, Vec<f32>> {
        let Form { window, soft_cap, causal, .. } = self.form;
        Scoring {
            scale: SCALE,
            window,
            soft_cap,
            slopes: self.form.slopes.then_some(&self.slopes),
            sinks: self.form.sinks.then_some(&self.sinks),
            causal,
        }
    }
}

/// Metadata of a step that computes tokens `from..to` of sequences with these blocks.
pub fn step(blocks: &[&[u32]], bs: usize, parts: &[(usize, usize, usize)]) -> Arc<BatchMeta> {
    let max_blocks = blocks.iter().map(|b| b.len()).max().unwrap();
    let mut meta = BatchMeta { cu_seqlens_q: vec![0], max_blocks, ..BatchMeta::default() };
    for &(i, from, to) in parts {
        for p in from..to {
            meta.token_ids.push(0);
            meta.positions.push(p as u32);
            meta.slot_mapping.push(blocks[i][p / bs] * bs as u32 + (p % bs) as u32);
        }
        meta.cu_seqlens_q.push(meta.positions.len() as u32);
        meta.context_lens.push(to as u32);
        let used = to.div_ceil(bs);
        meta.block_tables.extend(&blocks[i][..used]);
        meta.block_tables.extend(vec![0; max_blocks - used]);
    }
    Arc::new(meta)
}

/// A cache in which every bit is set: NaN in all storage types.
pub fn cache(ops: &CpuOps, shape: KvShape) -> CpuKvCache {
    let mut kv = ops.kv_cache(shape).unwrap();
    for storage in kv.storage_mut() {
        storage.fill(0xff);
    }
    kv
}

/// Runs the steps one after the other and gives each sequence's outputs, all its tokens in order.
pub fn run(ops: &CpuOps, s: &Setup, steps: &[Vec<(usize, usize, usize)>]) -> Vec<Vec<f32>> {
    let mut kv = cache(ops, s.shape);
    let (width, qkv_width) = (s.heads.num_heads * s.heads.head_dim, s.heads.qkv_width());
    let blocks: Vec<&[u32]> = s.sequences.iter().map(|q| q.blocks.as_slice()).collect();
    let mut all = vec![vec![]; s.sequences.len()];
    for parts in steps {
        let meta = step(&blocks, s.shape.block_size, parts);
        let rows =
            |&(i, from, to): &(usize, usize, usize)| &s.sequences[i].qkv[from * qkv_width..to * qkv_width];
        let qkv: Vec<f32> = parts.iter().flat_map(rows).copied().collect();
        let mut qkv = buffer(ops, &qkv);
        let mut out = poisoned(ops, meta.num_tokens() * width);
        let batch = ops.upload(meta, Arc::default()).unwrap();
        ops.rope_kv_write(&mut qkv, &mut kv, s.transform(), &batch, s.heads, 1).unwrap();
        ops.paged_attention(&mut out, &qkv, &kv, &batch, s.heads, s.scoring(), 1).unwrap();
        let mut at = 0;
        for &(i, from, to) in parts {
            all[i].extend(&out.as_slice()[at * width..(at + to - from) * width]);
            at += to - from;
        }
    }
    all
}

/// All of every sequence in one step.
pub fn whole(s: &Setup) -> Vec<Vec<(usize, usize, usize)>> {
    vec![s.sequences.iter().enumerate().map(|(i, q)| (i, 0, q.len)).collect()]
}

/// A number as a cache keeps it.
pub fn stored(x: f64, dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => f64::from(half::bf16::from_f32(x as f32).to_f32()),
        DType::F8E4M3 => f64::from(f8_to_f32(f32_to_f8(x as f32))),
        _ => x,
    }
}

/// Rotates the first `dim` elements by a row of a table.
pub fn turn(x: &mut [f64], table: &[f32], interleaved: bool) {
    let half = table.len() / 2;
    for i in 0..half {
        let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
        let (c, n) = (f64::from(table[i]), f64::from(table[i + half]));
        (x[a], x[b]) = (x[a] * c - x[b] * n, x[b] * c + x[a] * n);
    }
}

/// A query or key head of a token on its way to attention.
fn transformed(s: &Setup, seq: &Sequence, p: usize, head: usize) -> Vec<f64> {
    let d = s.heads.head_dim;
    let mut x: Vec<f64> =
        seq.qkv[p * s.heads.qkv_width() + head * d..][..d].iter().map(|&v| f64::from(v)).collect();
    if s.form.head_norm {
        let weight = &s.norms[usize::from(head >= s.heads.num_heads)];
        let square = x.iter().map(|v| v * v).sum::<f64>() / d as f64;
        x.iter_mut().zip(weight).for_each(|(v, w)| *v *= f64::from(*w) / (square + f64::from(EPS)).sqrt());
    }
    turn(&mut x, &s.rope[p * s.form.rotated..][..s.form.rotated], s.form.interleaved);
    x
}

/// What a sequence's tokens are to give.
pub fn reference(s: &Setup, seq: &Sequence) -> Vec<f64> {
    let HeadShape { num_heads, num_kv_heads, head_dim: d } = s.heads;
    let (width, dtype) = (s.heads.qkv_width(), s.shape.dtype);
    let of = |head: usize| -> Vec<Vec<f64>> { (0..seq.len).map(|p| transformed(s, seq, p, head)).collect() };
    let keys: Vec<Vec<Vec<f64>>> = (0..num_kv_heads).map(|kv| of(num_heads + kv)).collect();
    let queries: Vec<Vec<Vec<f64>>> = (0..num_heads).map(of).collect();
    let mut out = vec![];
    for p in 0..seq.len {
        for q in 0..num_heads {
            let kv = q / (num_heads / num_kv_heads);
            let visible = |j: usize| {
                (j <= p || !s.form.causal) && s.form.window.is_none_or(|window| p.abs_diff(j) < window)
            };
            let seen: Vec<usize> = (0..seq.len).filter(|&j| visible(j)).collect();
            let score = |&j: &usize| {
                let dot: f64 =
                    queries[q][p].iter().zip(&keys[kv][j]).map(|(a, b)| a * stored(*b, dtype)).sum();
                let mut score = dot * f64::from(SCALE);
                if let Some(cap) = s.form.soft_cap.map(f64::from) {
                    score = cap * (score / cap).tanh();
                }
                if s.form.slopes {
                    score += f64::from(s.slopes[q]) * (j as f64 - p as f64);
                }
                score
            };
            let scores: Vec<f64> = seen.iter().map(score).collect();
            let mut total: f64 = scores.iter().map(|x| x.exp()).sum();
            if s.form.sinks {
                total += f64::from(s.sinks[q]).exp();
            }
            for i in 0..d {
                let value = |j: usize| {
                    let at = j * width + (num_heads + num_kv_heads + kv) * d + i;
                    stored(f64::from(seq.qkv[at]), dtype)
                };
                out.push(seen.iter().zip(&scores).map(|(&j, x)| x.exp() / total * value(j)).sum());
            }
        }
    }
    out
}
