//! A KV cache in F8E4M3: attention over it, writes to it, copies of its blocks.

use std::sync::Arc;

use tidemill_kernels::{
    DType, KernelError, Ops,
    cuda::{CudaAttention, CudaConfig, CudaOps, Device, driver::Driver, ops::attention_plan},
    ops::{BlockCopy, HeadShape, KvShape},
    tensor::f8_to_f32,
};
use tidemill_kernels_emu::{EmuDriver, Schedule};

use crate::{
    attention::{heads, launch, plain},
    common::assert_same,
    harness::{copy_out, driver, nearest_f8, schedules},
    paged::{Bed, Row, Step, row},
    rope_kv_write::{options, run, unwritten},
};

/// A step's attention over a cache of values that F8E4M3 has, in bf16 and in F8E4M3.
fn both(bed: &Bed, heads: HeadShape, rows: &[Row], split: (usize, usize)) -> [Vec<f32>; 2] {
    let options = crate::attention::Options { split, ..plain(heads) };
    let mut step = Step::new(heads, rows, None, 16);
    step.cache.iter_mut().for_each(|x| *x = f8_to_f32(nearest_f8(*x)));
    let mut plan = Vec::new();
    let kernels = attention_plan(&mut plan, &step.meta, &options.plan(), &options.limits(&step)).unwrap();
    [DType::Bf16, DType::F8E4M3].map(|dtype| {
        step.shape.dtype = dtype;
        launch(bed, &options, &step, &plan, kernels)
    })
}

#[test]
fn attention_has_the_bits_of_a_bf16_cache_of_the_same_values() {
    for schedule in schedules() {
        let bed = Bed::new(schedule);
        for head_dim in [16, 32, 64, 80, 96, 128, 192, 256] {
            // Decode rows, split and not, and a prompt; whatever is not to be read is NaN.
            let rows = [row(1, 1, 150), row(2, 40, 70), row(3, 1, 5)];
            let [wide, narrow] = both(&bed, heads(4, 2, head_dim), &rows, (256, 64));
            assert!(wide.iter().all(|x| x.is_finite()));
            assert_same(&narrow, &wide, &format!("D = {head_dim}"));
        }
    }
}

#[test]
fn a_row_over_f8_has_the_same_bits_split_and_in_any_company() {
    let bed = Bed::new(Schedule::default());
    let (heads, width) = (heads(4, 1, 64), 4 * 64);
    let [_, all] = both(&bed, heads, &[row(1, 33, 300), row(2, 1, 9)], (0, 64));
    let [_, alone] = both(&bed, heads, &[row(1, 1, 300)], (256, 64));
    assert_same(&alone, &all[32 * width..33 * width], "the last token of the prompt");
}

#[test]
fn attention_over_f8_meets_no_bank_conflict() {
    // Only the emulator counts them. Head sizes whose rows are padded are written with a few, as a bf16 cache's are by cp.async.
    for head_dim in [64, 128, 256] {
        let emulator = Arc::new(EmuDriver::new(Schedule::default()));
        let bed = Bed::over(emulator.clone());
        for rows in [[row(1, 1, 100)], [row(1, 40, 100)]] {
            both(&bed, heads(2, 1, head_dim), &rows, (0, 64));
            let stats = emulator.last_stats();
            assert!(stats.shared_phases > 0 && stats.ldmatrix_phases > 0);
            assert_eq!((stats.shared_conflicts, stats.ldmatrix_conflicts), (0, 0), "D = {head_dim}");
        }
    }
}

#[test]
fn keys_and_values_are_rounded_to_the_nearest() {
    for schedule in schedules() {
        let bed = Bed::new(schedule);
        for options in [options(3, 1, 64, 32), options(4, 2, 128, 128), options(2, 2, 80, 0)] {
            let mut step = unwritten(&options, &[row(1, 2, 40), row(2, 3, 0), row(3, 1, 9)]);
            step.shape.dtype = DType::F8E4M3;
            let HeadShape { num_heads, num_kv_heads, head_dim } = options.heads;
            // Ties, ends and what is beyond, in a value of the first token.
            let edges = [
                17.0,
                19.0,
                -21.0,
                448.0,
                464.0,
                480.0,
                -1e30,
                f32::INFINITY,
                f32::NEG_INFINITY,
                f32::NAN,
                0.0,
                -0.0,
                0.0009765625,
                0.0029296875,
                -0.0146484375,
                1.0 / 64.0 - 1.0 / 16384.0,
                1e-9,
            ];
            let first_value = (num_heads + num_kv_heads) * head_dim;
            step.qkv[first_value..first_value + edges.len()].copy_from_slice(&edges);
            let (qkv, cache) = run(&bed, &options, &step);
            let mut want = step.cache.iter().map(|&x| f8_to_f32(nearest_f8(x))).collect::<Vec<_>>();
            for (t, &slot) in step.meta.slot_mapping.iter().enumerate().filter(|(_, slot)| **slot != u32::MAX)
            {
                for head in num_heads..num_heads + 2 * num_kv_heads {
                    let from = (t * (num_heads + 2 * num_kv_heads) + head) * head_dim;
                    let (which, kv_head) =
                        ((head - num_heads) / num_kv_heads, (head - num_heads) % num_kv_heads);
                    let to = step.place(slot as usize, which, kv_head);
                    for i in 0..head_dim {
                        want[to + i] = f8_to_f32(nearest_f8(qkv[from + i]));
                    }
                }
            }
            let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
            let wrong = cache.iter().zip(&want).position(|pair| !same(pair));
            assert_eq!(wrong.map(|i| (cache[i], want[i])), None);
        }
    }
}

const SHAPE: KvShape = KvShape {
    num_layers: 2,
    num_blocks: 4,
    block_size: 16,
    num_kv_heads: 2,
    head_dim: 64,
    value_dim: 64,
    dtype: DType::F8E4M3,
};

fn ops(driver: &Arc<dyn Driver>) -> CudaOps {
    let heads = HeadShape { num_heads: 4, num_kv_heads: 2, head_dim: 64 };
    let config = CudaConfig {
        max_tokens: 32,
        max_rows: 2,
        max_model_len: 64,
        block_size: 16,
        attention: CudaAttention::causal(heads),
        vocab: 8,
        graphs: false,
    };
    CudaOps::new(Device::new(driver.clone()), config).unwrap()
}

#[test]
fn blocks_go_to_the_host_and_come_back() {
    let driver = driver(Schedule::default());
    let ops = ops(&driver);
    let mut kv = ops.kv_cache(SHAPE).unwrap();
    let mut host = ops.host_kv(KvShape { num_blocks: 2, ..SHAPE }).unwrap();
    let bytes: Vec<u8> = (0..SHAPE.num_blocks * SHAPE.block_bytes()).map(|i| (i % 251) as u8).collect();
    // SAFETY: the storage has as many bytes; pageable memory is read before the call returns.
    unsafe { driver.copy_to_device(kv.storage().ptr(), bytes.as_ptr(), bytes.len()) }.unwrap();
    let copies = [BlockCopy::Save { block: 3, host: 1 }, BlockCopy::Load { host: 1, block: 0 }];
    ops.copy_blocks(&mut kv, &mut host, &copies).unwrap();
    let mut got = vec![0_u8; bytes.len()];
    copy_out(driver.as_ref(), kv.storage().ptr(), &mut got);
    let (layer, block) = (bytes.len() / 2, bytes.len() / 8);
    let mut want = bytes;
    for first in [0, layer] {
        want.copy_within(first + 3 * block..first + 4 * block, first);
    }
    assert!(got == want);
}

#[test]
fn caches_without_kernels_are_refused() {
    let ops = ops(&driver(Schedule::default()));
    for shape in [KvShape { dtype: DType::F32, ..SHAPE }, KvShape { num_kv_heads: 1, value_dim: 0, ..SHAPE }]
    {
        let error = ops.kv_cache(shape).err().unwrap();
        assert!(matches!(error, KernelError::Unsupported { op: "kv_cache", .. }), "{error}");
    }
}
