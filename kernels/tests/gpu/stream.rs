//! The driver's own work: memory, copies, kernels, events, graphs, errors.

use std::{sync::Arc, thread};

use half::bf16;
use tidemill_kernels::{
    DType, KernelError,
    cuda::{
        Device,
        driver::{DevPtr, Driver, Pinned},
        gpu::GpuDriver,
        memory::{DeviceBuffer, PinnedMemory},
        ops::{Norm as NormCall, norm, whole_rows},
    },
    ops::Norm as Form,
};
use tidemill_kernels_emu::{EmuDriver, Schedule};

use crate::fake::{Fake, Libraries::Fake as Both, inside};

const ROWS: usize = 3;
const WIDTH: usize = 64;

/// Buffers of a norm of [`ROWS`] rows.
struct Norm {
    out: DeviceBuffer,
    x: DeviceBuffer,
    weight: DeviceBuffer,
}

impl Norm {
    fn new(device: &Device) -> Norm {
        let bf16s = || device.buffer(DType::Bf16, ROWS * WIDTH, "test").unwrap();
        let norm =
            Norm { out: bf16s(), x: bf16s(), weight: device.buffer(DType::F32, WIDTH, "test").unwrap() };
        let weight: Vec<u8> = (0..WIDTH).flat_map(|i| (1.0 + i as f32).to_le_bytes()).collect();
        upload(device, norm.weight.ptr(), &weight);
        norm.set_x(device, 1.0);
        norm
    }

    fn set_x(&self, device: &Device, scale: f32) {
        upload(device, self.x.ptr(), &input(scale));
    }

    /// Queues it.
    fn run(&mut self, device: &Device) -> Result<(), KernelError> {
        let Norm { out, x, weight } = self;
        let form = Form::Rms { weight, eps: 1e-5 };
        let slices = whole_rows(ROWS, WIDTH);
        norm(device, NormCall { out, x: Some(x), form, slices, add: false })
    }

    fn result(&self, device: &Device) -> Vec<u8> {
        download(device, self.out.ptr(), ROWS * WIDTH * 2)
    }
}

fn input(scale: f32) -> Vec<u8> {
    let value = |i: usize| bf16::from_f32(scale * ((i % 17) as f32 - 8.0 + (i / WIDTH) as f32));
    (0..ROWS * WIDTH).flat_map(|i| value(i).to_le_bytes()).collect()
}

fn upload(device: &Device, dst: DevPtr, bytes: &[u8]) {
    let mut source = bytes.to_vec();
    // SAFETY: the caller's range; pageable memory is read before the call returns.
    unsafe { device.driver().copy_to_device(dst, source.as_ptr(), source.len()) }.unwrap();
    source.fill(0xee);
}

fn download(device: &Device, src: DevPtr, bytes: usize) -> Vec<u8> {
    let driver = device.driver();
    let staging = driver.alloc_pinned(bytes, Pinned::Readback).unwrap();
    // SAFETY: the caller's range; the staging memory is read after the synchronisation and freed once.
    unsafe {
        driver.copy_to_host(staging, src, bytes).unwrap();
        driver.synchronize().unwrap();
        let out = std::slice::from_raw_parts(staging, bytes).to_vec();
        driver.free_pinned(staging);
        out
    }
}

/// What the emulator alone makes of it.
fn expected(scale: f32) -> Vec<u8> {
    let device = Device::new(Arc::new(EmuDriver::new(Schedule::default())));
    let mut norm = Norm::new(&device);
    norm.set_x(&device, scale);
    norm.run(&device).unwrap();
    norm.result(&device)
}

fn opened() -> (Fake, Arc<dyn Driver>, Device) {
    let (fake, driver) = Fake::open();
    let driver: Arc<dyn Driver> = Arc::new(driver.unwrap());
    (fake, driver.clone(), Device::new(driver))
}

#[test]
fn a_kernel_gets_its_arguments_in_order_and_from_any_thread() {
    inside("stream::a_kernel_gets_its_arguments_in_order_and_from_any_thread", Both, &[], || {
        let (fake, driver, device) = opened();
        let mut norm = Norm::new(&device);
        norm.run(&device).unwrap();
        assert_eq!(norm.result(&device), expected(1.0));

        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                norm.set_x(&device, -2.5);
                norm.run(&device).unwrap();
                norm.result(&device)
            });
            assert_eq!(thread.join().unwrap(), expected(-2.5));
        });
        let made_current = fake.log().matches("cuCtxSetCurrent\n").count();
        assert_eq!(made_current, 2, "once on each of the two threads");
        drop((norm, device, driver));
        assert_eq!(fake.live(), 0);
    });
}

#[test]
fn copies_and_fills_run_in_order_and_pageable_memory_is_read_at_once() {
    let name = "stream::copies_and_fills_run_in_order_and_pageable_memory_is_read_at_once";
    inside(name, Both, &[], || {
        let (fake, driver, device) = opened();
        let buffer = device.buffer(DType::F32, 16, "test").unwrap();
        let mut up = PinnedMemory::new(driver.clone(), 64, Pinned::Upload).unwrap();
        let down = PinnedMemory::new(driver.clone(), 64, Pinned::Readback).unwrap();
        assert!(fake.log().contains("cuMemHostAlloc flags 4\ncuMemHostAlloc flags 0\n"));
        let before = fake.log().matches("cuStreamSynchronize").count();
        // SAFETY: all ranges lie within 64 bytes; pinned memory is left alone until the synchronisation.
        unsafe {
            driver.fill(buffer.ptr(), 7, 64).unwrap();
            fill_pinned(&mut up, 1);
            driver.copy_to_device(buffer.ptr().offset(32), up.ptr(), 16).unwrap();
            driver.copy_to_device(buffer.ptr().offset(8), up.ptr().add(16), 0).unwrap();
            driver.copy_to_host(down.ptr(), buffer.ptr(), 64).unwrap();
            assert_eq!(fake.log().matches("cuStreamSynchronize").count(), before, "nothing waited");
            driver.synchronize().unwrap();
            let got = std::slice::from_raw_parts(down.ptr(), 64).to_vec();
            assert_eq!(got, [vec![7; 32], vec![1; 16], vec![7; 16]].concat());
        }
        upload(&device, buffer.ptr(), &[9; 64]);
        assert_eq!(download(&device, buffer.ptr(), 64), [9; 64], "the source was overwritten after the call");
        drop((up, down, buffer, device, driver));
        assert_eq!(fake.live(), 0);
    });
}

/// # Safety
/// No copy of it is queued.
unsafe fn fill_pinned(memory: &mut PinnedMemory, value: u8) {
    // SAFETY: the memory is as long as it says; the rest is the caller's promise.
    unsafe { memory.ptr().write_bytes(value, memory.bytes()) }
}

#[test]
fn an_event_is_waited_for_and_measures() {
    inside("stream::an_event_is_waited_for_and_measures", Both, &[], || {
        let (fake, driver, device) = opened();
        let mut norm = Norm::new(&device);
        let down = PinnedMemory::new(driver.clone(), 4, Pinned::Readback).unwrap();
        let (start, end) = (driver.create_event().unwrap(), driver.create_event().unwrap());
        driver.record(start).unwrap();
        norm.run(&device).unwrap();
        // SAFETY: four bytes of both; the host reads them after the event.
        unsafe { driver.copy_to_host(down.ptr(), norm.out.ptr(), 4) }.unwrap();
        driver.record(end).unwrap();
        let early = driver.elapsed_ms(start, end);
        assert!(
            matches!(early, Err(KernelError::Device { call: "cuEventElapsedTime", .. })),
            "not yet reached"
        );
        driver.wait(end).unwrap();
        // SAFETY: the copy has run.
        assert_eq!(unsafe { std::slice::from_raw_parts(down.ptr(), 4) }, &expected(1.0)[..4]);
        assert!(driver.elapsed_ms(start, end).unwrap() > 0.0);
        // SAFETY: both were made above and are not used again.
        unsafe {
            driver.destroy_event(start);
            driver.destroy_event(end);
        }
        drop((norm, down, device, driver));
        assert_eq!(fake.live(), 0);
    });
}

#[test]
fn a_graph_replays_with_the_memory_of_the_day() {
    inside("stream::a_graph_replays_with_the_memory_of_the_day", Both, &[], || {
        let (fake, driver, device) = opened();
        let mut norm = Norm::new(&device);
        let bytes = norm.out.elems() * 2;
        let up = PinnedMemory::new(driver.clone(), bytes, Pinned::Upload).unwrap();
        let down = PinnedMemory::new(driver.clone(), bytes, Pinned::Readback).unwrap();
        let read = || {
            driver.synchronize().unwrap();
            // SAFETY: the memory is that long, and no copy is queued any more.
            unsafe { std::slice::from_raw_parts(down.ptr(), bytes) }.to_vec()
        };
        // SAFETY: the memory is that long; nothing is queued yet.
        unsafe { down.ptr().write_bytes(0xaa, bytes) };
        driver.begin_capture().unwrap();
        // SAFETY: all ranges are `bytes` long; pinned memory is written only after a synchronisation.
        unsafe {
            driver.copy_to_device(norm.x.ptr(), up.ptr(), bytes).unwrap();
            driver.fill(norm.out.ptr(), 0xff, bytes).unwrap();
            norm.run(&device).unwrap();
            driver.copy_to_host(down.ptr(), norm.out.ptr(), bytes).unwrap();
        }
        let graph = driver.end_capture().unwrap();
        assert!(fake.log().contains("cuGraphUpload\n"));
        assert_eq!(read(), vec![0xaa; bytes], "recorded, not run");
        for scale in [1.0, -3.0, 0.5] {
            // SAFETY: as above; the memory lives.
            unsafe {
                up.ptr().copy_from_nonoverlapping(input(scale).as_ptr(), bytes);
                driver.launch_graph(graph).unwrap();
            }
            assert_eq!(read(), expected(scale));
        }
        // SAFETY: nothing queued uses it.
        unsafe { driver.destroy_graph(graph) };
        drop((norm, up, down, device, driver));
        assert_eq!(fake.live(), 0);
    });
}

#[test]
fn what_a_graph_cannot_hold_is_refused_and_the_recording_goes_on() {
    let name = "stream::what_a_graph_cannot_hold_is_refused_and_the_recording_goes_on";
    inside(name, Both, &[], || {
        let (fake, driver, device) = opened();
        let mut norm = Norm::new(&device);
        let freed = device.buffer(DType::F32, 16, "test").unwrap();
        let event = driver.create_event().unwrap();
        driver.begin_capture().unwrap();
        assert!(refused(driver.alloc(16, "test").map(drop)));
        assert!(refused(driver.alloc_pinned(16, Pinned::Upload).map(drop)));
        assert!(refused(driver.record(event)));
        // SAFETY: the source lives; nothing is queued.
        assert!(refused(unsafe { driver.copy_to_device(norm.x.ptr(), [0_u8; 4].as_ptr(), 4) }));
        assert!(refused(driver.wait(event)));
        assert!(refused(driver.synchronize()));
        let frees = fake.log().matches("cuMemFreeAsync").count();
        drop(freed);
        assert_eq!(fake.log().matches("cuMemFreeAsync").count(), frees, "not a part of the graph");
        norm.run(&device).unwrap();
        let graph = driver.end_capture().unwrap();
        assert_eq!(fake.log().matches("cuMemFreeAsync").count(), frees + 1);
        // SAFETY: the norm's memory lives; nothing queued uses graph and event when they are destroyed.
        unsafe {
            driver.launch_graph(graph).unwrap();
            assert_eq!(norm.result(&device), expected(1.0));
            driver.destroy_graph(graph);
            driver.destroy_event(event);
        }
        drop((norm, device, driver));
        assert_eq!(fake.live(), 0);
    });
}

fn refused(result: Result<(), KernelError>) -> bool {
    matches!(result, Err(KernelError::Device { .. }))
}

#[test]
fn memory_runs_out_with_the_name_of_what_asked_and_comes_back() {
    let variables = [("FAKE_CUDA_MEMORY", "268435456")];
    inside("stream::memory_runs_out_with_the_name_of_what_asked_and_comes_back", Both, &variables, || {
        let (_fake, driver) = Fake::open();
        let driver = driver.unwrap();
        let (all, most) = (driver.free_memory().unwrap(), 200 << 20);
        let ptr = driver.alloc(most, "weights").unwrap();
        assert_eq!(driver.free_memory().unwrap(), all - most);
        let full = driver.alloc(most, "KV cache").unwrap_err();
        assert_eq!(full, KernelError::OutOfMemory { what: "KV cache", bytes: most });
        // SAFETY: allocated above, nothing uses it.
        unsafe { driver.free(ptr) };
        assert_eq!(driver.free_memory().unwrap(), all, "what the pool keeps counts as free");
        driver.synchronize().unwrap();
        assert_eq!(driver.free_memory().unwrap(), all);
        let again = driver.alloc(most, "KV cache").unwrap();
        // SAFETY: as above.
        unsafe { driver.free(again) };
    });
}

#[test]
fn a_kernel_that_fails_loses_the_device() {
    inside("stream::a_kernel_that_fails_loses_the_device", Both, &[], || {
        let (_fake, driver, device) = opened();
        let mut norm = Norm::new(&device);
        // SAFETY: deliberately broken: the range ends beyond the buffer.
        unsafe { driver.fill(norm.x.ptr(), 0, 1 << 20) }.unwrap();
        norm.run(&device).unwrap();
        let lost = |result| matches!(result, Err(KernelError::DeviceLost { .. }));
        assert!(lost(driver.synchronize()));
        assert!(lost(norm.run(&device)));
        assert!(lost(driver.alloc(16, "test").map(drop)));
        assert!(lost(driver.begin_capture()));
        assert!(lost(driver.create_event().map(drop)));
    });
}

#[test]
fn a_sticky_code_is_told_from_one_that_passes() {
    const STICKY: [&str; 4] = ["214", "700", "716", "719"];
    const PASSING: [&str; 2] = ["1", "701"];
    for code in STICKY.into_iter().chain(PASSING) {
        let fail = format!("cuLaunchKernel:{code}");
        let variables = [("FAKE_CUDA_FAIL", fail.as_str())];
        inside("stream::a_sticky_code_is_told_from_one_that_passes", Both, &variables, || {
            let fail = std::env::var("FAKE_CUDA_FAIL").unwrap();
            let (_fake, _driver, device) = opened();
            let error = Norm::new(&device).run(&device).unwrap_err();
            let said = match error {
                KernelError::DeviceLost { call: "rmsnorm_bf16", .. } => true,
                KernelError::Device { call: "rmsnorm_bf16", .. } => false,
                other => panic!("{other}"),
            };
            assert_eq!(said, STICKY.iter().any(|code| fail.ends_with(&format!(":{code}"))), "{fail}");
        });
    }
}

#[test]
fn the_driver_may_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<GpuDriver>();
}
