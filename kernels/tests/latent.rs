//! Latent attention: `latent_kv_write`, `latent_attention`, `linear_heads`, against f64 and bit by bit.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/sequences.rs"]
mod sequences;

use std::sync::Arc;

use common::{Rng, assert_close, assert_same, buffer, devices, poisoned, tensor};
use sequences::{cache, rotations, scatter, step, stored, turn};
use tidemill_kernels::{
    DType, KernelError, Ops,
    cpu::{Compute, CpuOps},
    ops::{KvShape, LatentShape, Norm, Rotary},
    tensor::ExpertParts,
};

const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F8E4M3];
const SCALE: f32 = 0.2;
const EPS: f32 = 1e-6;

struct Sequence {
    q_latent: Vec<f32>,
    q_rope: Vec<f32>,
    latent: Vec<f32>,
    blocks: Vec<u32>,
    len: usize,
}

struct Setup {
    shape: LatentShape,
    kv: KvShape,
    norm: Vec<f32>,
    rope: Vec<f32>,
    interleaved: bool,
    sequences: Vec<Sequence>,
}

fn latent(num_heads: usize, latent_dim: usize, rope_dim: usize) -> LatentShape {
    LatentShape { num_heads, latent_dim, rope_dim }
}

fn setup(shape: LatentShape, block_size: usize, dtype: DType, lens: &[usize]) -> Setup {
    let mut rng = Rng::new(shape.latent_dim as u64 * 7 + block_size as u64);
    let LatentShape { num_heads, latent_dim, rope_dim } = shape;
    let longest = *lens.iter().max().unwrap();
    let num_blocks = longest.div_ceil(block_size) * lens.len() + 3;
    let head_dim = latent_dim + rope_dim;
    let kv =
        KvShape { num_layers: 2, num_blocks, block_size, num_kv_heads: 1, head_dim, value_dim: 0, dtype };
    let blocks = scatter(&mut rng, lens, block_size, num_blocks);
    let sequences = lens
        .iter()
        .zip(blocks)
        .map(|(&len, blocks)| Sequence {
            q_latent: rng.units(len * num_heads * latent_dim),
            q_rope: rng.units(len * num_heads * rope_dim),
            latent: rng.units(len * head_dim),
            blocks,
            len,
        })
        .collect();
    let (norm, rope) = (rng.units(latent_dim), rotations(longest, rope_dim));
    Setup { shape, kv, norm, rope, interleaved: block_size.is_multiple_of(2), sequences }
}

type Part = (usize, usize, usize);

fn run(ops: &CpuOps, s: &Setup, steps: &[Vec<Part>]) -> Vec<Vec<f32>> {
    let mut kv = cache(ops, s.kv);
    let LatentShape { num_heads, latent_dim, rope_dim } = s.shape;
    let [lw, rw, kw] = [num_heads * latent_dim, num_heads * rope_dim, latent_dim + rope_dim];
    let blocks: Vec<&[u32]> = s.sequences.iter().map(|q| q.blocks.as_slice()).collect();
    let mut all = vec![vec![]; s.sequences.len()];
    for parts in steps {
        let rows = |of: &dyn Fn(&Sequence) -> &[f32], width: usize| {
            let rows = parts.iter().flat_map(|&(i, a, b)| &of(&s.sequences[i])[a * width..b * width]);
            buffer(ops, &rows.copied().collect::<Vec<f32>>())
        };
        let q_latent = rows(&|q| &q.q_latent, lw);
        let (mut q_rope, mut latent) = (rows(&|q| &q.q_rope, rw), rows(&|q| &q.latent, kw));
        let meta = step(&blocks, s.kv.block_size, parts);
        let mut out = poisoned(ops, meta.num_tokens() * lw);
        let batch = ops.upload(meta, Arc::default()).unwrap();
        let norm = Norm::Rms { weight: &s.norm, eps: EPS };
        let rotary = Rotary { table: &s.rope, dim: rope_dim, interleaved: s.interleaved };
        ops.latent_kv_write(&mut q_rope, &mut latent, &mut kv, norm, rotary, &batch, s.shape, 1).unwrap();
        ops.latent_attention(&mut out, &q_latent, &q_rope, &kv, &batch, s.shape, SCALE, 1).unwrap();
        let mut at = 0;
        for &(i, from, to) in parts {
            all[i].extend(&out.as_slice()[at * lw..(at + to - from) * lw]);
            at += to - from;
        }
    }
    all
}

fn whole(s: &Setup) -> Vec<Vec<Part>> {
    vec![s.sequences.iter().enumerate().map(|(i, q)| (i, 0, q.len)).collect()]
}

fn reference(s: &Setup, seq: &Sequence) -> Vec<f64> {
    let LatentShape { num_heads, latent_dim, rope_dim } = s.shape;
    let wide = |x: &[f32]| x.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
    let table = |p: usize| &s.rope[p * rope_dim..][..rope_dim];
    let key = |p: usize| {
        let mut key = wide(&seq.latent[p * (latent_dim + rope_dim)..][..latent_dim + rope_dim]);
        let (value, rope) = key.split_at_mut(latent_dim);
        let square = value.iter().map(|v| v * v).sum::<f64>() / latent_dim as f64;
        value
            .iter_mut()
            .zip(&s.norm)
            .for_each(|(v, w)| *v *= f64::from(*w) / (square + f64::from(EPS)).sqrt());
        turn(rope, table(p), s.interleaved);
        key.into_iter().map(|v| stored(v, s.kv.dtype)).collect::<Vec<f64>>()
    };
    let keys: Vec<Vec<f64>> = (0..seq.len).map(key).collect();
    let mut out = vec![];
    for p in 0..seq.len {
        for q in 0..num_heads {
            let mut query = wide(&seq.q_latent[(p * num_heads + q) * latent_dim..][..latent_dim]);
            let mut rope = wide(&seq.q_rope[(p * num_heads + q) * rope_dim..][..rope_dim]);
            turn(&mut rope, table(p), s.interleaved);
            query.extend(rope);
            let score = |key: &Vec<f64>| {
                (query.iter().zip(key).map(|(a, b)| a * b).sum::<f64>() * f64::from(SCALE)).exp()
            };
            let weights: Vec<f64> = keys[..=p].iter().map(score).collect();
            let total: f64 = weights.iter().sum();
            out.extend(
                (0..latent_dim)
                    .map(|i| weights.iter().zip(&keys).map(|(w, key)| w / total * key[i]).sum::<f64>()),
            );
        }
    }
    out
}

#[test]
fn agrees_with_f64() {
    let shapes = [
        (latent(4, 32, 8), 16, vec![37, 1]),
        (latent(7, 30, 6), 5, vec![23, 40]),
        (latent(1, 2, 2), 1, vec![9]),
        (latent(16, 64, 64), 24, vec![50]),
        (latent(3, 960, 64), 16, vec![19]),
    ];
    for dtype in DTYPES {
        for (shape, block_size, lens) in &shapes {
            let s = setup(*shape, *block_size, dtype, lens);
            let want: Vec<Vec<f64>> = s.sequences.iter().map(|q| reference(&s, q)).collect();
            let tolerance = match dtype {
                DType::F32 => 1e-5,
                DType::Bf16 => 6e-3,
                _ => 0.15,
            };
            for ops in devices(Compute::F32, 2) {
                for (got, want) in run(&ops, &s, &whole(&s)).iter().zip(&want) {
                    assert_close(got, want, tolerance, &format!("{} {dtype:?} {shape:?}", ops.isa()));
                }
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_however_its_prompt_is_cut() {
    for (shape, bs) in [(latent(6, 64, 16), 16), (latent(5, 22, 6), 5)] {
        for dtype in DTYPES {
            let s = setup(shape, bs, dtype, &[97, 41]);
            for threads in [1, 2] {
                for ops in devices(Compute::F32, threads) {
                    let want = run(&ops, &s, &whole(&s));
                    let single: Vec<_> = (0..2)
                        .flat_map(|i| (0..s.sequences[i].len).map(move |p| vec![(i, p, p + 1)]))
                        .collect();
                    let chunks = vec![
                        vec![(0, 0, 31), (1, 0, 7)],
                        vec![(1, 7, 8), (0, 31, 48)],
                        vec![(0, 48, 97), (1, 8, 41)],
                    ];
                    for (name, steps) in [("single tokens", single), ("chunks", chunks)] {
                        for (got, want) in run(&ops, &s, &steps).iter().zip(&want) {
                            assert_same(got, want, &format!("{} {shape:?} {dtype:?} {name}", ops.isa()));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn heads_have_products_of_their_own() {
    for threads in [1, 2] {
        for ops in devices(Compute::F32, threads) {
            for dtype in [DType::F32, DType::Bf16] {
                for (count, n, k) in [(1, 3, 5), (5, 16, 33), (16, 70, 64), (3, 7, 1)] {
                    let mut rng = Rng::new(count as u64);
                    let tensors: Vec<_> =
                        (0..count).map(|i| tensor(dtype, &[n, k], &rng.units(n * k), i)).collect();
                    let parts = |t: &tidemill_kernels::HostTensor| ExpertParts {
                        parts: vec![t.clone().into()],
                        bias: vec![],
                    };
                    let heads = ops.experts(&tensors.iter().map(parts).collect::<Vec<_>>()).unwrap();
                    let x = rng.units(37 * count * k);
                    let run = |x: &[f32]| {
                        let rows = x.len() / (count * k);
                        let mut out = poisoned(&ops, rows * count * n);
                        ops.linear_heads(&mut out, &buffer(&ops, x), &heads, rows).unwrap();
                        ops.download(&out, rows * count * n).unwrap()
                    };
                    let all = run(&x);
                    for (r, x) in x.chunks(count * k).enumerate() {
                        let want: Vec<f64> = (0..count * n)
                            .map(|i| {
                                let (w, x) = (tensors[i / n].to_f32(), &x[i / n * k..][..k]);
                                let row = &w[i % n * k..][..k];
                                row.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                            })
                            .collect();
                        let got = &all[r * count * n..(r + 1) * count * n];
                        assert_close(got, &want, 2e-6 * (k as f64 + 10.0), ops.isa().name());
                        assert_same(&run(x), got, ops.isa().name());
                    }
                }
            }
        }
    }
}

#[test]
fn heads_of_different_shapes_are_refused() {
    let ops = &devices(Compute::F32, 1)[0];
    let parts = |n: usize| ExpertParts {
        parts: vec![tensor(DType::F32, &[n, 2], &vec![0.0; 2 * n], 0).into()],
        bias: vec![],
    };
    assert!(matches!(ops.experts(&[parts(3), parts(4)]), Err(KernelError::Shape { .. })));
}
