//! Low-rank adapters on the CPU.

#![allow(clippy::unwrap_used)]

#[path = "common/adapters.rs"]
mod adapters;
mod common;

use adapters::Bed;
use tidemill_kernels::cpu::{Compute, CpuOps};

fn on_every_device(test: impl Fn(&Bed<'_, CpuOps>)) {
    for threads in [1, 2] {
        for ops in common::devices(Compute::Bf16, threads) {
            let fill = |values: &[f32]| common::buffer(&ops, values);
            test(&Bed { ops: &ops, fill: &fill, round: |x| x, epsilon: 0.0 });
        }
    }
}

#[test]
fn rows_of_many_adapters_get_what_each_gets_alone() {
    on_every_device(adapters::rows_of_many_adapters_get_what_each_gets_alone);
}

#[test]
fn gates_of_neighbours_keep_their_bits() {
    on_every_device(adapters::gates_of_neighbours_keep_their_bits);
}

#[test]
fn what_does_not_fit_a_slot_is_refused() {
    on_every_device(adapters::what_does_not_fit_a_slot_is_refused);
}
