//! `latent_attention.cu` and `latent_kv_write.cu` against f64, and attention against itself: whatever split or company a token has, its
//! bits are the same.

use std::sync::Arc;

use tidemill_kernels::{
    KernelError,
    cuda::{
        memory::DeviceBuffer,
        ops::{
            AttentionKernels, AttentionWorkspace, KvLayer, LatentAttention, LatentKvWrite, PADDING_SLOT,
            PlanKind, PlanLimits, PlanShape, attend_latents, attention_plan, kv_cache_elems, write_latents,
        },
        words::DeviceWords,
    },
    ops::{HeadShape, KvShape, LatentShape, Rotary},
};
use tidemill_kernels_emu::{EmuDriver, Schedule};

use crate::{
    common::assert_same,
    harness::{self, assert_near, bf16s, f32s, poisoned, values},
    paged::{Bed, LAYER, Row, Step, row, vector},
};

const BLOCK_SIZE: usize = 16;

fn shape(num_heads: usize, latent_dim: usize, rope_dim: usize) -> LatentShape {
    LatentShape { num_heads, latent_dim, rope_dim }
}

fn width(shape: LatentShape) -> usize {
    shape.latent_dim + shape.rope_dim
}

fn scale(shape: LatentShape) -> f32 {
    2.0 / (width(shape) as f32).sqrt()
}

/// A key of a sequence: both parts.
fn key(shape: LatentShape, id: u64, position: usize) -> Vec<f32> {
    vector(id + 1000, position, 0, width(shape))
}

/// A query: both parts.
fn query(shape: LatentShape, id: u64, position: usize, head: usize) -> Vec<f32> {
    vector(id + 100, position, head + 1, width(shape))
}

/// A step over the blocks of [`Step`], with a cache of latents: NaN where no token of it sees anything.
struct Latents {
    step: Step,
    kv: KvShape,
    cache: Vec<f32>,
    q_latent: Vec<f32>,
    q_rope: Vec<f32>,
}

impl Latents {
    fn new(shape: LatentShape, rows: &[Row]) -> Latents {
        let heads = HeadShape { num_heads: shape.num_heads, num_kv_heads: 1, head_dim: 8 };
        let step = Step::new(heads, rows, None, BLOCK_SIZE);
        let kv = KvShape { num_kv_heads: 1, head_dim: width(shape), value_dim: 0, ..step.shape };
        let mut cache = vec![f32::NAN; kv_cache_elems(&kv)];
        let (mut q_latent, mut q_rope) = (Vec::new(), Vec::new());
        for (r, row) in rows.iter().enumerate() {
            let table = &step.meta.block_tables[r * step.meta.max_blocks..];
            for position in 0..row.context {
                let slot = table[position / BLOCK_SIZE] as usize * BLOCK_SIZE + position % BLOCK_SIZE;
                let at = place(&kv, slot);
                cache[at..at + width(shape)].copy_from_slice(&key(shape, row.id, position));
            }
            for i in 0..row.new {
                let position = (row.context + i).saturating_sub(row.new);
                for head in 0..shape.num_heads {
                    let q = query(shape, row.id, position, head);
                    q_latent.extend(&q[..shape.latent_dim]);
                    q_rope.extend(&q[shape.latent_dim..]);
                }
            }
        }
        Latents { step, kv, cache, q_latent, q_rope }
    }

    /// With room for `split.0` partial results, and rows split for `split.1` multiprocessors.
    fn run(&self, bed: &Bed, shape: LatentShape, split: (usize, usize)) -> Vec<f32> {
        let limits = PlanLimits {
            max_tokens: self.step.tokens(),
            max_rows: self.step.rows.len(),
            split_tiles: split.0,
            num_sms: split.1,
        };
        let heads = HeadShape { num_heads: shape.num_heads, num_kv_heads: 1, head_dim: width(shape) };
        let plan_shape = PlanShape { heads, block_size: BLOCK_SIZE, window: None, kind: PlanKind::Latent };
        let mut plan = Vec::new();
        let kernels = attention_plan(&mut plan, &self.step.meta, &plan_shape, &limits).unwrap();
        assert!(!kernels.block);
        let plan = bed.words(&plan);
        let mut out = poisoned(&bed.device, self.q_latent.len());
        let mut workspace = AttentionWorkspace::new(&bed.device, split.0, shape.latent_dim).unwrap();
        let call = LatentAttention {
            out: &mut out,
            q_latent: &bf16s(&bed.device, &self.q_latent),
            q_rope: &bf16s(&bed.device, &self.q_rope),
            kv: KvLayer { cache: &bf16s(&bed.device, &self.cache), shape: self.kv, layer: LAYER },
            shape,
            scale: scale(shape),
            plan: DeviceWords::new(&plan),
            kernels,
            workspace: &mut workspace,
            tokens: self.step.tokens(),
        };
        attend_latents(&bed.device, call).unwrap();
        values(&bed.device, &out)
    }
}

/// First element of a slot's key in the layer in use.
fn place(kv: &KvShape, slot: usize) -> usize {
    (LAYER * kv.num_blocks * BLOCK_SIZE + slot) * kv.head_dim
}

const SPLIT: (usize, usize) = (256, 64);

fn run(bed: &Bed, shape: LatentShape, rows: &[Row], split: (usize, usize)) -> Vec<f32> {
    Latents::new(shape, rows).run(bed, shape, split)
}

/// One token and head in f64.
fn expected(shape: LatentShape, id: u64, position: usize, head: usize) -> Vec<f64> {
    let q = query(shape, id, position, head);
    let keys: Vec<_> = (0..=position).map(|j| key(shape, id, j)).collect();
    let scores: Vec<f64> = keys
        .iter()
        .map(|key| q.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>())
        .map(|product| product * f64::from(scale(shape)))
        .collect();
    let greatest = scores.iter().fold(f64::MIN, |a, &b| a.max(b));
    let weights: Vec<f64> = scores.iter().map(|s| (s - greatest).exp()).collect();
    let total: f64 = weights.iter().sum();
    (0..shape.latent_dim)
        .map(|i| keys.iter().zip(&weights).map(|(key, w)| w / total * f64::from(key[i])).sum())
        .collect()
}

#[track_caller]
fn agrees(bed: &Bed, shape: LatentShape, rows: &[Row]) {
    let want: Vec<f64> = rows
        .iter()
        .flat_map(|r| (0..r.new).map(|i| (r.id, r.context - r.new + i)))
        .flat_map(|(id, p)| (0..shape.num_heads).flat_map(move |head| expected(shape, id, p, head)))
        .collect();
    // Weights are rounded to bf16, and so is the result.
    assert_near(&run(bed, shape, rows, SPLIT), &want, 0.004, 0.003, &format!("{shape:?}, {rows:?}"));
}

/// A run of both kernels for the tests of planted faults: blocks get a second item, tiles are merged, and the stages come round.
pub fn sample(bed: &Bed) -> Vec<f32> {
    let shape = shape(40, 48, 8);
    let rows: Vec<Row> = (1..8).map(|id| row(id, 1, 20 + id as usize)).collect();
    let mut out = run(bed, shape, &rows, (0, 1));
    out.extend(run(bed, shape, &[row(9, 1, 150)], SPLIT));
    out
}

#[test]
fn latent_attention_agrees_with_f64_for_all_extents() {
    let rows = [row(1, 1, 1), row(2, 1, 33), row(3, 3, 130), row(4, 9, 9)];
    let shapes = [shape(1, 16, 8), shape(4, 32, 16), shape(5, 80, 24), shape(3, 144, 64), shape(20, 48, 40)];
    for schedule in harness::schedules() {
        let bed = Bed::new(schedule);
        shapes.iter().for_each(|&shape| agrees(&bed, shape, &rows));
    }
    agrees(&Bed::new(Schedule::all()[1]), shape(16, 512, 64), &[row(1, 1, 140), row(2, 2, 5)]);
}

#[test]
fn latent_attention_agrees_with_f64_at_every_context_length_that_is_an_edge() {
    let lengths = [1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 257, 300];
    let rows: Vec<Row> = lengths.into_iter().enumerate().map(|(i, n)| row(i as u64, 1, n)).collect();
    agrees(&Bed::new(Schedule::all()[2]), shape(3, 32, 8), &rows);
}

#[test]
fn a_token_has_the_same_bits_in_a_prompt_in_chunks_and_as_a_decode_row_split_or_not() {
    for (i, shape) in [shape(3, 80, 16), shape(17, 32, 8)].into_iter().enumerate() {
        let bed = Bed::new(Schedule::all()[i]);
        let token = shape.num_heads * shape.latent_dim;
        const LENGTH: usize = 270;
        let whole = run(&bed, shape, &[row(1, LENGTH, LENGTH)], SPLIT);
        let mut at = 0;
        for chunk in [1, 63, 7, 130, 2, 67] {
            let out = run(&bed, shape, &[row(1, chunk, at + chunk)], SPLIT);
            assert_same(&out, &whole[at * token..][..chunk * token], &format!("chunk of {chunk} at {at}"));
            at += chunk;
        }
        assert_eq!(at, LENGTH);
        for split in [SPLIT, (256, 1), (0, 64)] {
            let rows: Vec<Row> =
                [0, 14, 16, 127, 128, 200, 256, 269].into_iter().map(|p| row(1, 1, p + 1)).collect();
            let out = run(&bed, shape, &rows, split);
            for (n, r) in rows.iter().enumerate() {
                let want = &whole[(r.context - 1) * token..][..token];
                assert_same(&out[n * token..][..token], want, &format!("decode at {}, {split:?}", r.context));
            }
        }
    }
}

#[test]
fn padding_rows_are_not_written_and_rows_stand_alone() {
    for schedule in harness::schedules() {
        let (bed, shape) = (Bed::new(schedule), shape(6, 48, 16));
        let token = shape.num_heads * shape.latent_dim;
        let rows = [row(1, 1, 200), row(7, 2, 0), row(2, 12, 60), row(3, 1, 1)];
        let out = run(&bed, shape, &rows, SPLIT);
        let mut first = 0;
        for r in rows {
            let got = &out[first * token..][..r.new * token];
            if r.context == 0 {
                assert!(got.iter().all(|x| x.is_nan()), "padding was written");
            } else {
                assert_same(got, &run(&bed, shape, &[r], SPLIT), &format!("{r:?} alone"));
            }
            first += r.new;
        }
    }
}

#[test]
fn latent_attention_reads_shared_memory_without_bank_conflicts() {
    for shape in [shape(2, 512, 64), shape(2, 48, 8), shape(2, 64, 32)] {
        // Only the emulator counts them.
        let emulator = Arc::new(EmuDriver::new(Schedule::default()));
        run(&Bed::over(emulator.clone()), shape, &[row(1, 1, 40)], (0, 64));
        let stats = emulator.last_stats();
        assert!(stats.ldmatrix_phases > 0);
        assert_eq!(stats.ldmatrix_conflicts, 0, "{shape:?}");
    }
}

/// `[512, R]`: cosines and sines of made-up angles.
fn table(rope_dim: usize) -> Vec<f32> {
    let angles =
        |p: usize| (0..rope_dim / 2).map(move |i| p as f32 * 0.8_f32.powi(i as i32)).collect::<Vec<_>>();
    (0..512)
        .flat_map(|p| {
            let cosines = angles(p).into_iter().map(f32::cos);
            cosines.chain(angles(p).into_iter().map(f32::sin)).collect::<Vec<_>>()
        })
        .collect()
}

fn rotated(x: &[f32], position: usize, interleaved: bool) -> Vec<f64> {
    let (dim, half) = (x.len(), x.len() / 2);
    let table = &table(dim)[position * dim..][..dim];
    let mut y: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
    for i in 0..half {
        let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
        let (c, s) = (f64::from(table[i]), f64::from(table[i + half]));
        (y[a], y[b]) = (y[a] * c - y[b] * s, y[a] * s + y[b] * c);
    }
    y
}

/// Runs the write of a step whose slots are NaN before; returns `q_rope`, `latent` before and after, and the cache before and after.
fn write(bed: &Bed, shape: LatentShape, step: &Latents, interleaved: bool) -> [Vec<f32>; 5] {
    let mut before = step.cache.clone();
    for &slot in step.step.meta.slot_mapping.iter().filter(|&&slot| slot != PADDING_SLOT) {
        let at = place(&step.kv, slot as usize);
        before[at..at + width(shape)].fill(f32::NAN);
    }
    let tokens = step.step.tokens();
    let latent: Vec<f32> = (0..tokens).flat_map(|t| vector(77, t, 0, width(shape))).collect();
    let mut q_rope = bf16s(&bed.device, &step.q_rope);
    let mut buffer = bf16s(&bed.device, &latent);
    let cache = bf16s(&bed.device, &before);
    let table = f32s(&bed.device, &table(shape.rope_dim));
    let (positions, slots) = (bed.words(&step.step.meta.positions), bed.words(&step.step.meta.slot_mapping));
    let call = LatentKvWrite {
        q_rope: &mut q_rope,
        latent: &mut buffer,
        kv: KvLayer { cache: &cache, shape: step.kv, layer: LAYER },
        shape,
        rotary: Rotary { table: &table, dim: shape.rope_dim, interleaved },
        positions: DeviceWords::new(&positions),
        slot_mapping: DeviceWords::new(&slots),
        tokens,
    };
    write_latents(&bed.device, call).unwrap();
    let [q_rope, after, cache] = [&q_rope, &buffer, &cache].map(|buffer| values(&bed.device, buffer));
    [q_rope, latent, after, before, cache]
}

#[test]
fn rotation_and_cache_write_agree_with_f64_and_touch_nothing_else() {
    // A row without context has no block: its tokens are padding.
    let rows = [row(1, 1, 1), row(2, 3, 33), row(3, 2, 0), row(4, 1, 17)];
    for schedule in harness::schedules() {
        let bed = Bed::new(schedule);
        for (shape, interleaved) in
            [(shape(3, 16, 8), false), (shape(40, 80, 64), true), (shape(1, 512, 24), false)]
        {
            let step = Latents::new(shape, &rows);
            let [q_rope, before, latent, mut want_cache, cache] = write(&bed, shape, &step, interleaved);
            let (l, r, width) = (shape.latent_dim, shape.rope_dim, width(shape));
            for t in 0..step.step.tokens() {
                let (slot, position) = (step.step.meta.slot_mapping[t], step.step.meta.positions[t] as usize);
                let (before, after) = (&before[t * width..][..width], &latent[t * width..][..width]);
                assert_same(&after[..l], &before[..l], "latent");
                if slot == PADDING_SLOT {
                    assert_same(after, before, "a padding token's key");
                } else {
                    let want = rotated(&before[l..], position, interleaved);
                    assert_near(&after[l..], &want, 0.005, 1e-5, "key");
                    let at = place(&step.kv, slot as usize);
                    want_cache[at..at + width].copy_from_slice(after);
                }
                for head in 0..shape.num_heads {
                    let at = (t * shape.num_heads + head) * r;
                    let (before, after) = (&step.q_rope[at..at + r], &q_rope[at..at + r]);
                    if slot == PADDING_SLOT {
                        assert_same(after, before, "a padding token's query");
                    } else {
                        assert_near(after, &rotated(before, position, interleaved), 0.005, 1e-5, "query");
                    }
                }
            }
            let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
            assert!(cache.len() == want_cache.len() && cache.iter().zip(&want_cache).all(same), "cache");
        }
    }
}

#[test]
fn latent_ops_refuse_what_the_kernels_cannot_take() {
    let bed = Bed::new(Schedule::default());
    let small = shape(2, 32, 8);
    let refused = |shape: LatentShape, tamper: &dyn Fn(&mut LatentAttention<'_>)| {
        let step = Latents::new(small, &[row(1, 1, 5)]);
        let plan = bed.words(&[0; 16]);
        let cache = bf16s(&bed.device, &step.cache);
        let (q_latent, q_rope) = (bf16s(&bed.device, &step.q_latent), bf16s(&bed.device, &step.q_rope));
        let mut workspace = AttentionWorkspace::new(&bed.device, 1, 32).unwrap();
        let mut call = LatentAttention {
            out: &mut poisoned(&bed.device, 64),
            q_latent: &q_latent,
            q_rope: &q_rope,
            kv: KvLayer { cache: &cache, shape: step.kv, layer: LAYER },
            shape,
            scale: 1.0,
            plan: DeviceWords::new(&plan),
            kernels: AttentionKernels::DECODE,
            workspace: &mut workspace,
            tokens: 1,
        };
        tamper(&mut call);
        attend_latents(&bed.device, call).unwrap_err()
    };
    let unsupported =
        |e: KernelError| assert!(matches!(e, KernelError::Unsupported { op: "latent_attention", .. }), "{e}");
    let misshapen =
        |e: KernelError| assert!(matches!(e, KernelError::Shape { op: "latent_attention", .. }), "{e}");
    for (heads, latent, rope) in [(0, 32, 8), (2, 24, 8), (2, 528, 8), (2, 32, 12), (2, 32, 72), (2, 32, 0)] {
        let error = refused(shape(heads, latent, rope), &|_| {});
        assert!(error.to_string().contains("--device cpu"), "{error}");
        unsupported(error);
    }
    unsupported(refused(small, &|c| c.scale = f32::NAN));
    unsupported(refused(small, &|c| c.plan = c.plan.part(1, 8).unwrap()));
    unsupported(refused(small, &|c| c.kv.shape.block_size = 24));
    unsupported(refused(shape(2, 16, 24), &|_| {}));
    misshapen(refused(small, &|c| c.kv.layer = 3));
    misshapen(refused(small, &|c| (c.kv.shape.value_dim, c.kv.shape.head_dim) = (20, 20)));
    misshapen(refused(small, &|c| c.tokens = 2));

    let step = Latents::new(small, &[row(1, 1, 5)]);
    let write = |dim: usize, table: usize, tokens: usize| {
        let (words, table) = (bed.words(&[0]), f32s(&bed.device, &vec![0.0; table]));
        let (mut q_rope, mut latent) = (poisoned(&bed.device, 16), poisoned(&bed.device, 40));
        let cache: DeviceBuffer = bf16s(&bed.device, &step.cache);
        let call = LatentKvWrite {
            q_rope: &mut q_rope,
            latent: &mut latent,
            kv: KvLayer { cache: &cache, shape: step.kv, layer: LAYER },
            shape: small,
            rotary: Rotary { table: &table, dim, interleaved: false },
            positions: DeviceWords::new(&words),
            slot_mapping: DeviceWords::new(&words),
            tokens,
        };
        write_latents(&bed.device, call)
    };
    assert!(write(8, 64, 1).is_ok());
    assert!(matches!(write(16, 64, 1), Err(KernelError::Unsupported { op: "latent_kv_write", .. })));
    assert!(matches!(write(8, 60, 1), Err(KernelError::Unsupported { op: "latent_kv_write", .. })));
    assert!(matches!(write(8, 64, 2), Err(KernelError::Shape { op: "latent_kv_write", .. })));
}
