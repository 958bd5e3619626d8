//! `Ops::states` on CUDA.

use std::sync::Arc;

use tidemill_kernels::{
    cuda::{CudaAttention, CudaConfig, CudaOps, Device, driver::Driver},
    ops::HeadShape,
};
use tidemill_kernels_emu::{EmuDriver, Live, Schedule};

use crate::{
    common_states::{MAX_TOKENS, VOCAB, states_come_with_their_step},
    harness::{driver, schedules},
};

fn ops(driver: &Arc<dyn Driver>) -> CudaOps {
    let config = CudaConfig {
        max_tokens: MAX_TOKENS,
        max_rows: 2,
        max_model_len: MAX_TOKENS,
        block_size: 16,
        attention: CudaAttention::causal(HeadShape { num_heads: 2, num_kv_heads: 1, head_dim: 64 }),
        vocab: VOCAB,
        graphs: false,
    };
    CudaOps::new(Device::new(driver.clone()), config).unwrap()
}

#[test]
fn hidden_states_come_with_the_step_that_wants_them() {
    for schedule in schedules() {
        states_come_with_their_step(&ops(&driver(schedule)));
    }
}

#[test]
fn memory_for_states_is_taken_when_they_are_wanted_kept_for_the_next_and_given_back() {
    let emulated = Arc::new(EmuDriver::new(Schedule::default()));
    let driver: Arc<dyn Driver> = emulated.clone();
    let ops = ops(&driver);
    states_come_with_their_step(&ops);
    let pinned = emulated.live().pinned_bytes;
    states_come_with_their_step(&ops);
    assert_eq!(emulated.live().pinned_bytes, pinned, "the steps before have left enough");
    drop(ops);
    assert_eq!(emulated.live(), Live::default());
}
