//! `Ops::copy_blocks` on the CPU.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/copies.rs"]
mod copies;

use common::devices;
use copies::{HOST_BLOCKS, SHAPE, bytes_come_back, copies_are_ordered_with_steps, load, save};
use tidemill_kernels::{
    Ops,
    cpu::{Compute, CpuOps},
    ops::KvShape,
};

fn device() -> CpuOps {
    devices(Compute::Bf16, 2).remove(0)
}

#[test]
fn every_byte_of_a_block_is_copied() {
    bytes_come_back(
        &device(),
        // Keys apart from values.
        2 * SHAPE.num_layers,
        |kv, bytes| {
            let mut bytes = bytes.iter();
            for storage in kv.storage_mut() {
                storage.iter_mut().zip(&mut bytes).for_each(|(to, from)| *to = *from);
            }
        },
        |kv| kv.storage_mut().map(|storage| storage.to_vec()).concat(),
    );
}

#[test]
fn a_copy_runs_between_the_steps_around_it() {
    copies_are_ordered_with_steps(&device());
}

#[test]
#[should_panic(expected = "there are 8 blocks, and 5 on the host")]
fn a_host_block_that_does_not_exist_is_the_callers_bug() {
    let ops = device();
    let mut kv = ops.kv_cache(SHAPE).unwrap();
    let mut host = ops.host_kv(KvShape { num_blocks: HOST_BLOCKS, ..SHAPE }).unwrap();
    let _ = ops.copy_blocks(&mut kv, &mut host, &[save(7, 4), load(5, 0)]);
}

#[test]
#[should_panic(expected = "host blocks of another cache")]
fn host_blocks_of_another_shape_are_the_callers_bug() {
    let ops = device();
    let mut kv = ops.kv_cache(SHAPE).unwrap();
    let mut host = ops.host_kv(KvShape { block_size: 32, ..SHAPE }).unwrap();
    let _ = ops.copy_blocks(&mut kv, &mut host, &[save(0, 0)]);
}
