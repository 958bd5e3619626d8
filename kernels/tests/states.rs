//! `Ops::states` on the CPU.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/states.rs"]
mod states;

use tidemill_kernels::cpu::Compute;

#[test]
fn hidden_states_come_with_the_step_that_wants_them() {
    for ops in common::devices(Compute::Bf16, 2) {
        states::states_come_with_their_step(&ops);
    }
}
