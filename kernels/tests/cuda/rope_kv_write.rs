//! `rope_kv_write.cu` against f64.

use tidemill_kernels::{
    KernelError,
    cuda::{
        ops::{HeadNorm, KvLayer, PADDING_SLOT, RopeKvWrite, Rotary, rope_kv_write},
        words::DeviceWords,
    },
    ops::HeadShape,
};
use tidemill_kernels_emu::Schedule;

use crate::{
    common::{Rng, assert_same},
    harness::{self, assert_near, bf16s, f32s, rounded, values},
    paged::{Bed, LAYER, Row, Step, row},
};

const EPS: f32 = 1e-6;

/// What a test varies.
#[derive(Clone, Copy)]
pub struct Options {
    pub heads: HeadShape,
    /// R; 0: no rotation.
    pub rotary: usize,
    pub interleaved: bool,
    pub norm: bool,
    pub block_size: usize,
}

/// `[512, R]`: cosines and sines of made-up angles.
fn table(rotary: usize) -> Vec<f32> {
    let angle = |position: usize, i: usize| position as f32 * 0.9_f32.powi(i as i32);
    (0..512)
        .flat_map(|p| {
            let (cosines, sines) =
                (0..rotary / 2).map(move |i| angle(p, i)).map(|a| (a.cos(), a.sin())).unzip();
            let (mut cosines, sines): (Vec<f32>, Vec<f32>) = (cosines, sines);
            cosines.extend(sines);
            cosines
        })
        .collect()
}

fn weights(head_dim: usize) -> [Vec<f32>; 2] {
    [1, 2].map(|seed| Rng::new(seed).units(head_dim))
}

/// Runs a step whose tokens' slots in the cache are NaN before. Returns `qkv` and the cache.
pub fn run(bed: &Bed, options: &Options, step: &Step) -> (Vec<f32>, Vec<f32>) {
    let mut qkv = bf16s(&bed.device, &step.qkv);
    let cache = step.upload_cache(bed);
    let (positions, slots) = (bed.words(&step.meta.positions), bed.words(&step.meta.slot_mapping));
    let [q_weight, k_weight] = weights(options.heads.head_dim).map(|w| f32s(&bed.device, &w));
    let table = f32s(&bed.device, &table(options.rotary));
    let rotary = Rotary { table: &table, rotary_dim: options.rotary, interleaved: options.interleaved };
    let call = RopeKvWrite {
        qkv: &mut qkv,
        kv: KvLayer { cache: &cache, shape: step.shape, layer: LAYER },
        heads: options.heads,
        positions: DeviceWords::new(&positions),
        slot_mapping: DeviceWords::new(&slots),
        norm: options.norm.then_some(HeadNorm { q_weight: &q_weight, k_weight: &k_weight, eps: EPS }),
        rotary: (options.rotary > 0).then_some(rotary),
        tokens: step.tokens(),
    };
    rope_kv_write(&bed.device, call).unwrap();
    (values(&bed.device, &qkv), values(&bed.device, &cache))
}

/// One head of a token in f64.
fn expected(options: &Options, x: &[f32], position: usize, weight: &[f32]) -> Vec<f64> {
    let mut y: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
    if options.norm {
        let mean = y.iter().map(|v| v * v).sum::<f64>() / y.len() as f64;
        let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
        y.iter_mut().zip(weight).for_each(|(v, &w)| *v *= scale * f64::from(w));
    }
    let (half, table) = (options.rotary / 2, table(options.rotary));
    for i in 0..half {
        let (a, b) = if options.interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
        let at = position * options.rotary + i;
        let (c, s) = (f64::from(table[at]), f64::from(table[at + half]));
        (y[a], y[b]) = (y[a] * c - y[b] * s, y[a] * s + y[b] * c);
    }
    y
}

/// The step with NaN at the slots that are to be written.
pub fn unwritten(options: &Options, rows: &[Row]) -> Step {
    let mut step = Step::new(options.heads, rows, None, options.block_size);
    let HeadShape { num_kv_heads, head_dim, .. } = options.heads;
    for slot in step.meta.slot_mapping.clone().into_iter().filter(|&slot| slot != PADDING_SLOT) {
        for (which, head) in (0..2).flat_map(|which| (0..num_kv_heads).map(move |head| (which, head))) {
            let at = step.place(slot as usize, which, head);
            step.cache[at..at + head_dim].fill(f32::NAN);
        }
    }
    step
}

fn check(bed: &Bed, options: &Options, rows: &[Row]) {
    let step = unwritten(options, rows);
    let (qkv, cache) = run(bed, options, &step);
    let HeadShape { num_heads, num_kv_heads, head_dim } = options.heads;
    let mut want_cache = step.cache.clone();
    let [q_weight, k_weight] = weights(head_dim);
    for t in 0..step.tokens() {
        let (slot, position) = (step.meta.slot_mapping[t], step.meta.positions[t] as usize);
        for head in 0..num_heads + 2 * num_kv_heads {
            let at = (t * (num_heads + 2 * num_kv_heads) + head) * head_dim;
            let (before, after) = (&step.qkv[at..at + head_dim], &qkv[at..at + head_dim]);
            let what = format!("token {t}, head {head}");
            let is_value = head >= num_heads + num_kv_heads;
            if is_value || slot == PADDING_SLOT {
                assert_same(after, before, &what);
            } else {
                let weight = if head < num_heads { &q_weight } else { &k_weight };
                assert_near(after, &expected(options, before, position, weight), 0.005, 1e-5, &what);
            }
            if head >= num_heads && slot != PADDING_SLOT {
                let place =
                    step.place(slot as usize, usize::from(is_value), (head - num_heads) % num_kv_heads);
                want_cache[place..place + head_dim].copy_from_slice(after);
            }
        }
    }
    // The tokens' slots hold what stands in qkv, and nothing else was touched.
    assert_eq!(cache.len(), want_cache.len());
    let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    assert!(cache.iter().zip(&want_cache).all(same), "cache");
}

pub fn options(num_heads: usize, num_kv_heads: usize, head_dim: usize, rotary: usize) -> Options {
    Options {
        heads: HeadShape { num_heads, num_kv_heads, head_dim },
        rotary,
        interleaved: false,
        norm: false,
        block_size: 16,
    }
}

/// A run for the tests of planted faults.
pub fn sample(bed: &Bed) -> Vec<f32> {
    let options = Options { norm: true, ..options(5, 1, 128, 128) };
    run(bed, &options, &unwritten(&options, &[row(1, 2, 3)])).0
}

#[test]
fn rope_and_cache_write_agree_with_f64_for_every_head_size_and_rotation() {
    let rows = [row(1, 1, 1), row(2, 3, 33), row(3, 1, 17)];
    let cases = [
        options(1, 1, 64, 64),
        options(5, 1, 80, 32),
        options(4, 2, 80, 20),
        options(3, 3, 96, 24),
        options(6, 2, 128, 128),
        Options { norm: true, ..options(5, 1, 128, 128) },
        Options { interleaved: true, ..options(4, 2, 128, 64) },
        Options { norm: true, interleaved: true, ..options(2, 1, 192, 10) },
        Options { norm: true, ..options(3, 1, 256, 256) },
        Options { norm: true, ..options(2, 2, 64, 0) },
        options(9, 3, 64, 0),
        options(7, 1, 8, 8),
        Options { block_size: 32, ..options(2, 1, 64, 64) },
        Options { block_size: 256, ..options(2, 2, 96, 96) },
    ];
    for schedule in harness::schedules() {
        let bed = Bed::new(schedule);
        cases.iter().for_each(|options| check(&bed, options, &rows));
    }
}

#[test]
fn a_token_is_rotated_alike_alone_and_among_others_and_padding_touches_nothing() {
    let options = Options { norm: true, ..options(4, 2, 128, 128) };
    let bed = Bed::new(Schedule::all()[3]);
    // A row without context has no block: its tokens are padding.
    let rows = [row(1, 2, 40), row(2, 3, 0), row(3, 1, 9)];
    check(&bed, &options, &rows);
    let width = options.heads.qkv_width();
    let (all, _) = run(&bed, &options, &unwritten(&options, &rows));
    let (one, _) = run(&bed, &options, &unwritten(&options, &rows[2..]));
    assert_same(&all[5 * width..], &one, "alone");
    assert_eq!(one, rounded(&one));
}

#[test]
fn rope_and_cache_write_refuse_what_the_kernel_cannot_take() {
    let bed = Bed::new(Schedule::default());
    let refused = |options: &Options, tamper: &dyn Fn(&mut RopeKvWrite<'_>)| {
        let step = Step::new(options.heads, &[row(1, 1, 5)], None, 16);
        let mut qkv = bf16s(&bed.device, &step.qkv);
        let cache = bf16s(&bed.device, &step.cache);
        let words = bed.words(&[0]);
        let table = f32s(&bed.device, &[0.0; 1024]);
        let rotary = Rotary { table: &table, rotary_dim: options.rotary, interleaved: false };
        let mut call = RopeKvWrite {
            qkv: &mut qkv,
            kv: KvLayer { cache: &cache, shape: step.shape, layer: LAYER },
            heads: options.heads,
            positions: DeviceWords::new(&words),
            slot_mapping: DeviceWords::new(&words),
            norm: None,
            rotary: Some(rotary),
            tokens: 1,
        };
        tamper(&mut call);
        rope_kv_write(&bed.device, call).unwrap_err()
    };
    let unsupported =
        |e: KernelError| assert!(matches!(e, KernelError::Unsupported { op: "rope_kv_write", .. }), "{e}");
    let shape = |e: KernelError| assert!(matches!(e, KernelError::Shape { op: "rope_kv_write", .. }), "{e}");
    unsupported(refused(&options(2, 1, 20, 4), &|_| {}));
    unsupported(refused(&options(2, 1, 264, 4), &|_| {}));
    unsupported(refused(&options(2, 1, 64, 33), &|_| {}));
    unsupported(refused(&options(2, 1, 64, 128), &|_| {}));
    unsupported(refused(&options(2, 1, 64, 48), &|_| {}));
    unsupported(refused(&options(2, 1, 64, 64), &|c| c.kv.shape.block_size = 8));
    unsupported(refused(&options(2, 1, 64, 64), &|c| c.heads.num_heads = 0));
    shape(refused(&options(2, 1, 64, 64), &|c| c.kv.shape.num_blocks = 1000));
    shape(refused(&options(2, 1, 64, 64), &|c| c.kv.shape.num_kv_heads = 2));
    shape(refused(&options(2, 1, 64, 64), &|c| c.tokens = 2));
}
