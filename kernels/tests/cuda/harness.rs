//! What all CUDA tests share.
#![allow(dead_code)]

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use half::bf16;
use tidemill_kernels::{
    DType,
    cuda::{
        Device,
        driver::Driver,
        gpu::{self, GpuOptions},
        memory::DeviceBuffer,
    },
};
use tidemill_kernels_emu::{EmuDriver, Schedule};

/// The variable that names a real device for all tests: `cuda:N`. Unset, the emulator runs them.
const TEST_DEVICE: &str = "TIDEMILL_TEST_DEVICE";

/// Runs `test` on the emulator under each schedule; or once on the GPU that [`TEST_DEVICE`] names.
pub fn on_every_schedule(test: impl Fn(&Device)) {
    match Gpu::named() {
        Some(gpu) => gpu.run(test),
        None => Schedule::all().into_iter().for_each(|schedule| test(&emulated(schedule))),
    }
}

/// Runs `test` on the emulator alone: it counts or checks what no GPU tells, which `what` names.
pub fn on_the_emulator(what: &str, test: impl Fn(&Device)) {
    match Gpu::named() {
        Some(gpu) => println!("skipped on {}: only the emulator can tell {what}", gpu.name),
        None => Schedule::all().into_iter().for_each(|schedule| test(&emulated(schedule))),
    }
}

fn emulated(schedule: Schedule) -> Device {
    Device::new(Arc::new(EmuDriver::new(schedule)))
}

/// A real GPU, opened once for all tests of the process.
struct Gpu {
    name: String,
    device: Device,
    /// Tests take turns: the driver has one stream, and one test's error must not fall into another.
    turn: Mutex<()>,
}

impl Gpu {
    /// The GPU that the environment names. Whoever names one that cannot be used gets no emulator in its place.
    fn named() -> Option<&'static Gpu> {
        static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
        let open = || {
            let name = std::env::var(TEST_DEVICE).ok()?;
            let ordinal = name.strip_prefix("cuda:").and_then(|n| n.parse().ok());
            let ordinal = ordinal.unwrap_or_else(|| panic!("{TEST_DEVICE} is {name:?}, not cuda:N"));
            let driver = gpu::open(ordinal, &GpuOptions::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
            println!("{name}: {}", driver.info().name);
            Some(Gpu { name, device: Device::new(Arc::new(driver)), turn: Mutex::new(()) })
        };
        GPU.get_or_init(open).as_ref()
    }

    fn run(&self, test: impl Fn(&Device)) {
        // A test that failed left nothing behind but its own buffers.
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        test(&self.device);
        // What went wrong on the device after the last comparison belongs to this test.
        self.device.driver().synchronize().unwrap();
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
    let bytes = size_of_val(values.as_slice());
    // SAFETY: the vector holds as many elements and lives until the synchronisation.
    unsafe { device.driver().copy_to_host(values.as_mut_ptr().cast(), buffer.ptr(), bytes) }.unwrap();
    device.driver().synchronize().unwrap();
    values
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
