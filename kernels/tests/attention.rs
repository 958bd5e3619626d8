//! `Ops::rope_kv_write` and `Ops::paged_attention`: against f64, and bit by bit across ways to cut a prompt.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{Rng, assert_close, assert_same, buffer, causal, devices, poisoned, rotation};
use tidemill_kernels::{
    DType, Ops,
    cpu::{Compute, CpuKvCache, CpuOps},
    ops::{BatchMeta, HeadShape, KvShape},
};

/// One sequence to be computed: its tokens' fused activations, and its blocks.
struct Sequence {
    qkv: Vec<f32>,
    blocks: Vec<u32>,
    len: usize,
}

struct Setup {
    heads: HeadShape,
    shape: KvShape,
    rope: Vec<f32>,
    sequences: Vec<Sequence>,
}

const SCALE: f32 = 0.3;

fn setup(heads: HeadShape, block_size: usize, dtype: DType, lens: &[usize]) -> Setup {
    let mut rng = Rng::new(heads.head_dim as u64 * 31 + block_size as u64);
    let longest = *lens.iter().max().unwrap();
    let per_row = longest.div_ceil(block_size);
    let num_blocks = per_row * lens.len() + 3;
    let shape = KvShape {
        num_layers: 2,
        num_blocks,
        block_size,
        num_kv_heads: heads.num_kv_heads,
        head_dim: heads.head_dim,
        value_dim: heads.head_dim,
        dtype,
    };
    let mut free: Vec<u32> = (0..num_blocks as u32).collect();
    for i in (1..free.len()).rev() {
        free.swap(i, rng.below(i + 1));
    }
    let sequences = lens
        .iter()
        .map(|&len| Sequence {
            qkv: rng.units(len * heads.qkv_width()),
            blocks: free.split_off(free.len() - per_row),
            len,
        })
        .collect();
    let half = heads.head_dim / 2;
    let mut rope = vec![];
    for p in 0..longest {
        let angle = |i: usize| p as f32 * 100_f32.powf(-(i as f32) / half as f32);
        rope.extend((0..half).map(|i| angle(i).cos()));
        rope.extend((0..half).map(|i| angle(i).sin()));
    }
    Setup { heads, shape, rope, sequences }
}

/// A step that computes tokens `from..to` of the given sequences.
fn step(s: &Setup, parts: &[(usize, usize, usize)]) -> (Arc<BatchMeta>, Vec<f32>) {
    let bs = s.shape.block_size;
    let max_blocks = s.sequences.iter().map(|q| q.blocks.len()).max().unwrap();
    let mut meta = BatchMeta { cu_seqlens_q: vec![0], max_blocks, ..BatchMeta::default() };
    let mut qkv = vec![];
    for &(i, from, to) in parts {
        let seq = &s.sequences[i];
        for p in from..to {
            meta.token_ids.push(0);
            meta.positions.push(p as u32);
            meta.slot_mapping.push(seq.blocks[p / bs] * bs as u32 + (p % bs) as u32);
        }
        meta.cu_seqlens_q.push(meta.positions.len() as u32);
        meta.context_lens.push(to as u32);
        let used = to.div_ceil(bs);
        meta.block_tables.extend(&seq.blocks[..used]);
        meta.block_tables.extend(vec![0; max_blocks - used]);
        qkv.extend(&seq.qkv[from * s.heads.qkv_width()..to * s.heads.qkv_width()]);
    }
    (Arc::new(meta), qkv)
}

fn cache(ops: &CpuOps, s: &Setup) -> CpuKvCache {
    let mut kv = ops.kv_cache(s.shape).unwrap();
    // Every bit set is a NaN in both storage types.
    for storage in kv.storage_mut() {
        storage.fill(0xff);
    }
    kv
}

/// Runs the steps one after the other and gives each sequence's outputs, all its tokens in order.
fn run(ops: &CpuOps, s: &Setup, steps: &[Vec<(usize, usize, usize)>]) -> Vec<Vec<f32>> {
    let mut kv = cache(ops, s);
    let width = s.heads.num_heads * s.heads.head_dim;
    let mut all = vec![vec![]; s.sequences.len()];
    for parts in steps {
        let (meta, qkv) = step(s, parts);
        let mut qkv = buffer(ops, &qkv);
        let rope = ops.vector(&s.rope).unwrap();
        let mut out = poisoned(ops, meta.num_tokens() * width);
        let batch = ops.upload(meta, Arc::default()).unwrap();
        ops.rope_kv_write(&mut qkv, &mut kv, rotation(&rope, s.heads.head_dim), &batch, s.heads, 1).unwrap();
        ops.paged_attention(&mut out, &qkv, &kv, &batch, s.heads, causal(SCALE), 1).unwrap();
        let mut at = 0;
        for &(i, from, to) in parts {
            all[i].extend(&out.as_slice()[at * width..(at + to - from) * width]);
            at += to - from;
        }
    }
    all
}

/// All of every sequence in one step.
fn whole(s: &Setup) -> Vec<Vec<(usize, usize, usize)>> {
    vec![s.sequences.iter().enumerate().map(|(i, q)| (i, 0, q.len)).collect()]
}

fn reference(s: &Setup, seq: &Sequence) -> Vec<f64> {
    let HeadShape { num_heads, num_kv_heads, head_dim: d } = s.heads;
    let width = s.heads.qkv_width();
    let turned = |p: usize, head: usize| -> Vec<f64> {
        let x = &seq.qkv[p * width + head * d..][..d];
        let table = &s.rope[p * d..(p + 1) * d];
        let mut y = vec![0.0; d];
        for i in 0..d / 2 {
            let (a, b) = (f64::from(x[i]), f64::from(x[i + d / 2]));
            let (c, n) = (f64::from(table[i]), f64::from(table[i + d / 2]));
            y[i] = a * c - b * n;
            y[i + d / 2] = b * c + a * n;
        }
        y
    };
    let stored = |x: f64| match s.shape.dtype {
        DType::Bf16 => f64::from(half::bf16::from_f32(x as f32).to_f32()),
        _ => x,
    };
    let mut out = vec![];
    for p in 0..seq.len {
        for q in 0..num_heads {
            let kv = q / (num_heads / num_kv_heads);
            let query = turned(p, q);
            let scores: Vec<f64> = (0..=p)
                .map(|j| {
                    let key = turned(j, num_heads + kv);
                    query.iter().zip(&key).map(|(a, b)| a * stored(*b)).sum::<f64>() * f64::from(SCALE)
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|x| (x - max).exp()).sum();
            for i in 0..d {
                let value = |j: usize| {
                    stored(f64::from(seq.qkv[j * width + (num_heads + num_kv_heads + kv) * d + i]))
                };
                out.push((0..=p).map(|j| (scores[j] - max).exp() / total * value(j)).sum());
            }
        }
    }
    out
}

fn heads(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> HeadShape {
    HeadShape { num_heads, num_kv_heads, head_dim }
}

#[test]
fn agrees_with_f64() {
    let shapes = [
        (heads(4, 2, 16), 16, vec![37, 1]),
        (heads(6, 2, 64), 16, vec![50]),
        (heads(2, 2, 32), 8, vec![19, 3, 40]),
        (heads(4, 1, 80), 16, vec![33]),
        (heads(2, 1, 96), 5, vec![23]),
        (heads(8, 2, 128), 32, vec![70]),
        (heads(3, 1, 192), 24, vec![49]),
        (heads(1, 1, 256), 1, vec![9]),
        (heads(7, 1, 2), 3, vec![20]),
        (heads(2, 1, 10), 64, vec![130]),
    ];
    for dtype in [DType::F32, DType::Bf16] {
        for (heads, block_size, lens) in &shapes {
            let s = setup(*heads, *block_size, dtype, lens);
            let want: Vec<Vec<f64>> = s.sequences.iter().map(|q| reference(&s, q)).collect();
            // A key that rounds the other way moves a bf16 score by 2^-8 of one product.
            let tolerance = if dtype == DType::F32 { 3e-6 } else { 2e-3 };
            for ops in devices(Compute::F32, 2) {
                for (got, want) in run(&ops, &s, &whole(&s)).iter().zip(&want) {
                    assert_close(
                        got,
                        want,
                        tolerance,
                        &format!("{} {dtype:?} {heads:?} {block_size}", ops.isa()),
                    );
                }
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_however_its_prompt_is_cut() {
    for (heads, bs) in [(heads(6, 2, 64), 16), (heads(4, 1, 80), 5), (heads(2, 2, 16), 24)] {
        for dtype in [DType::F32, DType::Bf16] {
            let s = setup(heads, bs, dtype, &[97, 41, 64]);
            for threads in [1, 2] {
                for ops in devices(Compute::F32, threads) {
                    let want = run(&ops, &s, &whole(&s));
                    let single: Vec<_> = (0..3)
                        .flat_map(|i| (0..s.sequences[i].len).map(move |p| vec![(i, p, p + 1)]))
                        .collect();
                    let chunks = vec![
                        vec![(0, 0, 31), (1, 0, 7)],
                        vec![(2, 0, 64), (0, 31, 48), (1, 7, 8)],
                        vec![(0, 48, 49)],
                        vec![(1, 8, 41), (0, 49, 97)],
                    ];
                    for (name, steps) in [("single tokens", single), ("chunks", chunks)] {
                        for (got, want) in run(&ops, &s, &steps).iter().zip(&want) {
                            assert_same(got, want, &format!("{} {heads:?} {dtype:?} {name}", ops.isa()));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn other_layers_stay_untouched() {
    let s = setup(heads(2, 1, 8), 4, DType::F32, &[9]);
    for ops in devices(Compute::F32, 1) {
        let mut kv = cache(&ops, &s);
        let (meta, qkv) = step(&s, &[(0, 0, 9)]);
        let (rope, batch) = (ops.vector(&s.rope).unwrap(), ops.upload(meta, Arc::default()).unwrap());
        ops.rope_kv_write(&mut buffer(&ops, &qkv), &mut kv, rotation(&rope, 8), &batch, s.heads, 1).unwrap();
        for storage in kv.storage_mut() {
            let half = storage.len() / 2;
            assert!(storage[..half].iter().all(|&b| b == 0xff));
            assert!(storage[half..].iter().any(|&b| b != 0xff));
        }
    }
}
