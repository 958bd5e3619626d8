//! Low-rank adapters on CUDA.

use half::bf16;
use tidemill_kernels::{
    KernelError, Ops,
    cuda::{CudaAttention, CudaConfig, CudaOps, Device},
    ops::{HeadShape, LoraShape},
};

use crate::{
    adapters::{self, Bed, MAX_TOKENS},
    harness::{bf16s, driver, schedules},
};

/// Sums of bf16 are rounded once more where an adapter is added.
const EPSILON: f64 = 1.0 / 256.0;

fn ops(device: &Device) -> CudaOps {
    let config = CudaConfig {
        max_tokens: MAX_TOKENS,
        max_rows: 16,
        max_model_len: MAX_TOKENS,
        block_size: 64,
        attention: CudaAttention::causal(HeadShape { num_heads: 2, num_kv_heads: 1, head_dim: 64 }),
        vocab: 24,
        graphs: false,
    };
    CudaOps::new(device.clone(), config).unwrap()
}

fn on_every_schedule(test: impl Fn(&Bed<'_, CudaOps>)) {
    for schedule in schedules() {
        let device = Device::new(driver(schedule));
        let fill = |values: &[f32]| bf16s(&device, values);
        test(&Bed {
            ops: &ops(&device),
            fill: &fill,
            round: |x| bf16::from_f32(x).to_f32(),
            epsilon: EPSILON,
        });
    }
}

#[test]
fn rows_of_many_adapters_get_what_each_gets_alone() {
    on_every_schedule(adapters::rows_of_many_adapters_get_what_each_gets_alone);
}

#[test]
fn gates_of_neighbours_keep_their_bits() {
    on_every_schedule(adapters::gates_of_neighbours_keep_their_bits);
}

#[test]
fn what_does_not_fit_a_slot_is_refused() {
    on_every_schedule(adapters::what_does_not_fit_a_slot_is_refused);
}

#[test]
fn a_width_without_whole_vectors_is_refused() {
    let ops = ops(&Device::new(driver(Default::default())));
    let shape = LoraShape { slots: 1, max_rank: 8, k: 20, parts: vec![8] };
    assert!(matches!(ops.lora(&shape), Err(KernelError::Unsupported { op: "lora", .. })));
}
