//! What all CUDA tests share.
#![allow(dead_code)]

use std::{cell::OnceCell, sync::Arc};

use half::bf16;
use tidemill_kernels::{
    DType,
    cuda::{
        Device,
        driver::{DevPtr, Driver, Pinned},
        gpu::{self, GpuOptions},
        memory::DeviceBuffer,
    },
    tensor::f8_to_f32,
};
use tidemill_kernels_emu::{EmuDriver, Schedule};

/// The variable that names a real device for all tests: `cuda:N`. Unset, the emulator runs them.
const TEST_DEVICE: &str = "TIDEMILL_TEST_DEVICE";

/// Runs `test` on the emulator under each schedule; or once on the GPU that [`TEST_DEVICE`] names.
pub fn on_every_schedule(test: impl Fn(&Device)) {
    for schedule in schedules() {
        let driver = driver(schedule);
        test(&Device::new(driver.clone()));
        // What went wrong on a GPU after the last comparison belongs to this test.
        driver.synchronize().unwrap();
    }
}

/// The schedules that a test runs under: on a GPU there is one, and nobody chooses it.
pub fn schedules() -> Vec<Schedule> {
    if gpu_ordinal().is_some() { vec![Schedule::default()] } else { Schedule::all().into() }
}

/// An emulator that runs kernels under `schedule`; or the GPU that [`TEST_DEVICE`] names. Whoever names one that cannot be used
/// gets no emulator in its place.
pub fn driver(schedule: Schedule) -> Arc<dyn Driver> {
    thread_local! {
        // One per thread, as tests run on threads of their own and a driver has one stream.
        static GPU: OnceCell<Arc<dyn Driver>> = const { OnceCell::new() };
    }
    let Some(ordinal) = gpu_ordinal() else { return Arc::new(EmuDriver::new(schedule)) };
    let open = || -> Arc<dyn Driver> {
        let gpu =
            gpu::open(ordinal, &GpuOptions::default()).unwrap_or_else(|e| panic!("cuda:{ordinal}: {e}"));
        Arc::new(gpu)
    };
    GPU.with(|gpu| gpu.get_or_init(open).clone())
}

fn gpu_ordinal() -> Option<usize> {
    let name = std::env::var(TEST_DEVICE).ok()?;
    let ordinal = name.strip_prefix("cuda:").and_then(|n| n.parse().ok());
    Some(ordinal.unwrap_or_else(|| panic!("{TEST_DEVICE} is {name:?}, not cuda:N")))
}

fn upload<T: Copy>(device: &Device, dtype: DType, values: &[T]) -> DeviceBuffer {
    assert_eq!(size_of::<T>(), dtype.size());
    let buffer = device.buffer(dtype, values.len(), "test").unwrap();
    let bytes = size_of_val(values);
    // SAFETY: the buffer holds as many elements; the source lives until the synchronisation.
    unsafe { device.driver().copy_to_device(buffer.ptr(), values.as_ptr().cast(), bytes) }.unwrap();
    device.driver().synchronize().unwrap();
    buffer
}

fn download<T: Copy + Default>(device: &Device, buffer: &DeviceBuffer) -> Vec<T> {
    assert_eq!(size_of::<T>(), buffer.dtype().size());
    let mut values = vec![T::default(); buffer.elems()];
    copy_out(device.driver(), buffer.ptr(), &mut values);
    values
}

/// Waits, and copies as many values as there are from device memory.
pub fn copy_out<T: Copy>(driver: &dyn Driver, from: DevPtr, values: &mut [T]) {
    let bytes = size_of_val(values);
    let staging = driver.alloc_pinned(bytes.max(1), Pinned::Readback).unwrap();
    // SAFETY: the staging memory has as many bytes, lives until the synchronisation, and is freed once.
    unsafe {
        driver.copy_to_host(staging, from, bytes).unwrap();
        driver.synchronize().unwrap();
        std::ptr::copy_nonoverlapping(staging, values.as_mut_ptr().cast(), bytes);
        driver.free_pinned(staging);
    }
}

/// A bf16 array of `values`, rounded.
pub fn bf16s(device: &Device, values: &[f32]) -> DeviceBuffer {
    upload(device, DType::Bf16, &values.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>())
}

/// An f32 array of `values`.
pub fn f32s(device: &Device, values: &[f32]) -> DeviceBuffer {
    upload(device, DType::F32, values)
}

/// The F8E4M3 nearest to a value, the even one of two; 448 for what is beyond, 0x7f for no number.
pub fn nearest_f8(x: f32) -> u8 {
    if x.is_nan() {
        return 0x7f;
    }
    let off = |code: u8| (f64::from(f8_to_f32(code)) - f64::from(x.abs().min(448.0))).abs();
    let nearest = (0..0x7f).min_by(|&a, &b| off(a).total_cmp(&off(b)).then((a % 2).cmp(&(b % 2)))).unwrap();
    nearest | u8::from(x.is_sign_negative()) << 7
}

/// An F8E4M3 array of `values`, rounded.
pub fn f8s(device: &Device, values: &[f32]) -> DeviceBuffer {
    upload(device, DType::F8E4M3, &values.iter().map(|&v| nearest_f8(v)).collect::<Vec<_>>())
}

/// A bf16 array of NaN: what a kernel leaves unwritten shows.
pub fn poisoned(device: &Device, elems: usize) -> DeviceBuffer {
    bf16s(device, &vec![f32::NAN; elems])
}

/// All elements as f32.
pub fn values(device: &Device, buffer: &DeviceBuffer) -> Vec<f32> {
    match buffer.dtype() {
        DType::Bf16 => download::<bf16>(device, buffer).into_iter().map(bf16::to_f32).collect(),
        DType::F8E4M3 => download::<u8>(device, buffer).into_iter().map(f8_to_f32).collect(),
        _ => download(device, buffer),
    }
}

/// `values` as they are after rounding to bf16.
pub fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect()
}

/// Every element within `relative * |want| + absolute`, and none NaN.
#[track_caller]
pub fn assert_near(got: &[f32], want: &[f64], relative: f64, absolute: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let bound = relative * w.abs() + absolute;
        assert!((f64::from(g) - w).abs() <= bound, "{what}: element {i} is {g}, expected {w}");
    }
}
