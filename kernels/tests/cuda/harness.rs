//! What all CUDA tests share.
#![allow(dead_code)]

use std::sync::Arc;

use half::bf16;
use tidemill_kernels::{
    DType,
    cuda::{
        Device,
        driver::{DevPtr, Driver, Pinned},
        memory::DeviceBuffer,
    },
};
use tidemill_kernels_emu::{EmuDriver, Schedule};

/// Runs `test` on a device under each schedule.
pub fn on_every_schedule(test: impl Fn(&Device)) {
    for schedule in Schedule::all() {
        test(&Device::new(Arc::new(EmuDriver::new(schedule))));
    }
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

/// A bf16 array of NaN: what a kernel leaves unwritten shows.
pub fn poisoned(device: &Device, elems: usize) -> DeviceBuffer {
    bf16s(device, &vec![f32::NAN; elems])
}

/// All elements as f32.
pub fn values(device: &Device, buffer: &DeviceBuffer) -> Vec<f32> {
    match buffer.dtype() {
        DType::Bf16 => download::<bf16>(device, buffer).into_iter().map(bf16::to_f32).collect(),
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
