//! `Ops::copy_blocks` on CUDA.

use std::sync::Arc;

use tidemill_kernels::{
    Ops,
    cuda::{
        CudaAttention, CudaConfig, CudaOps, Device,
        driver::{Driver, Pinned},
    },
    ops::KvShape,
};
use tidemill_kernels_emu::{EmuDriver, Live, Schedule};

use crate::{
    copies::{HEADS, HOST_BLOCKS, SHAPE, VOCAB, bytes_come_back, copies_are_ordered_with_steps, load, save},
    harness::{copy_out, driver},
};

fn ops(driver: &Arc<dyn Driver>) -> CudaOps {
    let config = CudaConfig {
        max_tokens: 32,
        max_rows: 2,
        max_model_len: 64,
        block_size: SHAPE.block_size,
        attention: CudaAttention::causal(HEADS),
        vocab: VOCAB,
        graphs: false,
    };
    CudaOps::new(Device::new(driver.clone()), config).unwrap()
}

#[test]
fn every_byte_of_a_block_is_copied() {
    let driver = driver(Schedule::default());
    bytes_come_back(
        &ops(&driver),
        SHAPE.num_layers,
        |kv, bytes| {
            // SAFETY: the storage has as many bytes; pageable memory is read before the call returns.
            unsafe { driver.copy_to_device(kv.storage().ptr(), bytes.as_ptr(), bytes.len()) }.unwrap();
        },
        |kv| {
            let mut bytes = vec![0_u8; SHAPE.num_blocks * SHAPE.block_bytes()];
            copy_out(driver.as_ref(), kv.storage().ptr(), &mut bytes);
            bytes
        },
    );
}

#[test]
fn a_copy_runs_between_the_steps_around_it() {
    copies_are_ordered_with_steps(&ops(&driver(Schedule::default())));
}

#[test]
fn host_blocks_are_page_locked_and_outlive_the_copies_that_are_queued() {
    let emulated = Arc::new(EmuDriver::new(Schedule::default()));
    let driver: Arc<dyn Driver> = emulated.clone();
    let ops = ops(&driver);
    let mut kv = ops.kv_cache(SHAPE).unwrap();
    let before = emulated.live().pinned_bytes;
    let mut host = ops.host_kv(KvShape { num_blocks: HOST_BLOCKS, ..SHAPE }).unwrap();
    assert_eq!(emulated.live().pinned_bytes - before, HOST_BLOCKS * SHAPE.block_bytes());
    ops.copy_blocks(&mut kv, &mut host, &[save(0, 4), load(4, 7)]).unwrap();
    drop(host);
    // Says so if memory was freed under a queued copy.
    driver.synchronize().unwrap();
    drop((kv, ops));
    assert_eq!(emulated.live(), Live::default());
}

#[test]
fn nothing_is_copied_before_the_stream_comes_to_it() {
    let driver: Arc<dyn Driver> = Arc::new(EmuDriver::new(Schedule::default()));
    let ops = ops(&driver);
    let mut kv = ops.kv_cache(SHAPE).unwrap();
    let mut host = ops.host_kv(KvShape { num_blocks: HOST_BLOCKS, ..SHAPE }).unwrap();
    let storage = kv.storage().ptr();
    let seen = driver.alloc_pinned(1, Pinned::Readback).unwrap();
    // SAFETY: both sides hold the byte; it is freed once, after the wait.
    unsafe {
        driver.fill(storage, 7, 1).unwrap();
        ops.copy_blocks(&mut kv, &mut host, &[save(0, 0)]).unwrap();
        driver.fill(storage, 9, 1).unwrap();
        ops.copy_blocks(&mut kv, &mut host, &[load(0, 0)]).unwrap();
        driver.copy_to_host(seen, storage, 1).unwrap();
        assert_eq!(seen.read_volatile(), 0xff, "nobody has waited");
        ops.synchronize().unwrap();
        assert_eq!(seen.read_volatile(), 7);
        driver.free_pinned(seen);
    }
}

#[test]
#[should_panic(expected = "there are 8 blocks, and 5 on the host")]
fn a_block_that_does_not_exist_is_the_callers_bug() {
    let ops = ops(&driver(Schedule::default()));
    let mut kv = ops.kv_cache(SHAPE).unwrap();
    let mut host = ops.host_kv(KvShape { num_blocks: HOST_BLOCKS, ..SHAPE }).unwrap();
    let _ = ops.copy_blocks(&mut kv, &mut host, &[load(4, 7), save(8, 0)]);
}
