//! TMA, mbarriers, wgmma and clusters.

use std::ffi::c_void;

use tidemill_kernels::cuda::driver::{DevPtr, Driver, LaunchConfig};
use tidemill_kernels_emu::{
    Asynchronous, EmuConfig, EmuDriver, Order, Schedule, Tensor, TensorMap, tensor_map,
};

use crate::harness::{call, download, kernel, upload};

const M: usize = 100;
const N: usize = 72;
const K: usize = 328;

/// A small integer of -4..=4, exact in bf16.
fn element(row: usize, k: usize) -> f32 {
    ((row * 5 + k * 3 + row * k) % 9) as f32 - 4.0
}

fn matrix(driver: &EmuDriver, rows: usize) -> (DevPtr, TensorMap) {
    let bits: Vec<u16> = (0..rows * K).map(|i| (element(i / K, i % K).to_bits() >> 16) as u16).collect();
    let base = upload(driver, &bits);
    let tensor = Tensor {
        base,
        rank: 2,
        element_bytes: 2,
        swizzle_bytes: 128,
        extent: [K as u64, rows as u64, 0, 0, 0],
        stride_bytes: [2 * K as u64, 0, 0, 0],
        r#box: [64, 64, 0, 0, 0],
    };
    (base, tensor_map(&tensor).unwrap())
}

/// The product, or the device's complaint.
fn multiply(name: &'static str, config: EmuConfig) -> Result<Vec<f32>, String> {
    let driver = EmuDriver::with(EmuConfig { info: hopper(), ..config });
    let ((_, mut a), (_, mut b)) = (matrix(&driver, M), matrix(&driver, N));
    let mut c = driver.alloc(4 * M * N, "c").unwrap();
    let (mut m, mut n, mut k) = (M as i32, N as i32, K as i32);
    let mut arguments: [*mut c_void; 6] = [
        (&raw mut a).cast(),
        (&raw mut b).cast(),
        (&raw mut c).cast(),
        (&raw mut m).cast(),
        (&raw mut n).cast(),
        (&raw mut k).cast(),
    ];
    let config = LaunchConfig { grid: [2, 2, 1], block: [160, 1, 1], shared_bytes: 4 * 2 * 8192 + 1024 };
    let gemm = kernel(name, &[128, 128, 8, 4, 4, 4]);
    // SAFETY: one value per parameter; the buffers have the extents given.
    unsafe { driver.launch(gemm, config, &mut arguments) }
        .and_then(|()| driver.synchronize())
        .map_err(|error| error.to_string())?;
    Ok(download(&driver, c, M * N))
}

fn hopper() -> tidemill_kernels::cuda::driver::DeviceInfo {
    let mut info = EmuConfig::default().info;
    (info.compute_capability, info.max_shared_bytes) = ((9, 0), 227 << 10);
    info
}

/// All schedules, also with dynamic shared memory 128 bytes off the alignment of a tile.
fn configs() -> Vec<EmuConfig> {
    let config = |schedule, shared_skew| EmuConfig { schedule, shared_skew, ..EmuConfig::default() };
    let late = Schedule { asynchronous: Asynchronous::Late, ..Schedule::default() };
    let random = Schedule { order: Order::Random, seed: 5, asynchronous: Asynchronous::Random, threads: 0 };
    [Schedule::default(), late, random].into_iter().flat_map(|s| [config(s, 0), config(s, 128)]).collect()
}

fn expected() -> Vec<f32> {
    let product = |i: usize, j: usize| (0..K).map(|k| element(i, k) * element(j, k)).sum::<f32>();
    (0..M * N).map(|n| product(n / N, n % N)).collect()
}

#[test]
fn tma_mbarriers_and_wgmma_multiply() {
    for config in configs() {
        assert!(multiply("hopper_gemm", config.clone()).as_ref() == Ok(&expected()), "{config:?}");
    }
}

/// Every result that is not the right product.
fn caught(name: &'static str) -> Vec<Result<Vec<f32>, String>> {
    configs()
        .into_iter()
        .map(|config| multiply(name, config))
        .filter(|r| r.as_ref() != Ok(&expected()))
        .collect()
}

#[test]
fn tiles_that_are_not_aligned_are_refused() {
    let complaints = caught("hopper_tile_not_aligned");
    assert!(complaints.iter().flatten().next().is_none(), "an error, not a wrong product");
    assert!(complaints[0].as_ref().unwrap_err().contains("needs a 1024-byte aligned tile"));
}

#[test]
fn wrong_counts_of_an_mbarrier_are_caught() {
    let arrivals = caught("hopper_wrong_arrivals");
    assert_eq!(arrivals.len(), configs().len(), "under every schedule");
    assert!(arrivals.iter().all(|r| r.as_ref().is_err_and(|e| e.contains("deadlock"))));
    // Loads that take effect at once hide it; the others multiply a tile that has not arrived.
    assert!(caught("hopper_wrong_bytes").len() >= 4);
}

#[test]
fn stages_reused_too_early_and_products_used_too_early_are_caught() {
    assert!(!caught("hopper_no_wait_for_empty").is_empty());
    assert!(!caught("hopper_no_wgmma_wait").is_empty());
}

#[test]
fn a_tensor_that_the_hardware_cannot_load_is_refused() {
    let driver = EmuDriver::new(Schedule::default());
    let base = driver.alloc(4096, "tensor").unwrap();
    let good = Tensor {
        base,
        rank: 2,
        element_bytes: 2,
        swizzle_bytes: 128,
        extent: [64, 16, 0, 0, 0],
        stride_bytes: [128, 0, 0, 0],
        r#box: [64, 8, 0, 0, 0],
    };
    assert!(tensor_map(&good).is_some());
    assert!(tensor_map(&Tensor { base: base.offset(8), ..good }).is_none());
    assert!(tensor_map(&Tensor { stride_bytes: [120, 0, 0, 0], ..good }).is_none());
    assert!(tensor_map(&Tensor { r#box: [64, 257, 0, 0, 0], ..good }).is_none());
    assert!(tensor_map(&Tensor { rank: 6, ..good }).is_none());
}

#[test]
fn blocks_of_a_cluster_see_each_other() {
    let mut call = call("cluster_exchange");
    call.grid = 2;
    call.device.cluster = 2;
    let theirs: Vec<i32> = call.input.iter().map(|v| v + 1000).collect();
    call.gives(&theirs);
}
