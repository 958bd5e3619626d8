//! The driver keeps the contract of its trait, and finds who does not.

use std::slice;

use tidemill_kernels::{
    KernelError,
    cuda::driver::{DevPtr, Driver, LaunchConfig, Pinned, Result},
};
use tidemill_kernels_emu::{EmuConfig, EmuDriver, Failure, Live, Schedule};

use crate::harness::{download, launch, upload};

fn lazy() -> EmuDriver {
    EmuDriver::new(Schedule::default())
}

fn block() -> LaunchConfig {
    LaunchConfig::linear(1, 256)
}

/// Requires an error of the call alone, with these words.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, words: &str) {
    match result {
        Err(KernelError::Device { detail, .. }) => assert!(detail.contains(words), "{detail}"),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn lost<T: std::fmt::Debug>(result: Result<T>) {
    assert!(matches!(result, Err(KernelError::DeviceLost { .. })), "{result:?}");
}

/// `out` and `in` for the kernel `reverse`, and what it makes of them.
fn reverse_setup(driver: &EmuDriver) -> (DevPtr, DevPtr, Vec<i32>) {
    let values: Vec<i32> = (0..256).collect();
    let (out, input) = (driver.alloc(1024, "out").unwrap(), upload(driver, &values));
    (out, input, values.into_iter().rev().collect())
}

#[test]
fn a_result_is_there_when_its_event_was_waited_for_and_not_before() {
    let driver = lazy();
    let (device, event) = (upload(&driver, &[7_u8; 4]), driver.create_event().unwrap());
    let host = driver.alloc_pinned(4, Pinned::Readback).unwrap();
    // SAFETY: four bytes each; the test reads early on purpose, memory that nobody writes meanwhile.
    unsafe {
        driver.copy_to_host(host, device, 4).unwrap();
        driver.record(event).unwrap();
        driver.fill(device, 9, 4).unwrap();
        assert_eq!(slice::from_raw_parts(host, 4), [0xff; 4], "too early");
        driver.wait(event).unwrap();
        assert_eq!(slice::from_raw_parts(host, 4), [7; 4]);
        driver.copy_to_host(host, device, 4).unwrap();
        driver.synchronize().unwrap();
        assert_eq!(slice::from_raw_parts(host, 4), [9; 4]);
    }
}

#[test]
fn a_pinned_source_is_read_when_the_copy_runs_and_a_pageable_one_at_the_call() {
    let driver = lazy();
    let device = driver.alloc(8, "both").unwrap();
    let pinned = driver.alloc_pinned(4, Pinned::Upload).unwrap();
    let mut pageable = [1_u8; 4];
    // SAFETY: four bytes each; overwriting the pinned source too early is the point.
    unsafe {
        pinned.write_bytes(1, 4);
        driver.copy_to_device(device, pinned, 4).unwrap();
        driver.copy_to_device(device.offset(4), pageable.as_ptr(), 4).unwrap();
        pinned.write_bytes(2, 4);
    }
    pageable.fill(2);
    assert_eq!(download::<u8>(&driver, device, 8), [2, 2, 2, 2, 1, 1, 1, 1]);
}

#[test]
fn an_eager_device_runs_at_once() {
    let driver = EmuDriver::with(EmuConfig { eager: true, ..EmuConfig::default() });
    let device = upload(&driver, &[7_u8; 4]);
    let host = driver.alloc_pinned(4, Pinned::Readback).unwrap();
    // SAFETY: four bytes each, and nothing is pending on an eager device.
    unsafe {
        driver.copy_to_host(host, device, 4).unwrap();
        assert_eq!(slice::from_raw_parts(host, 4), [7; 4]);
    }
}

#[test]
fn a_long_queue_runs_by_itself() {
    let driver = lazy();
    let device = driver.alloc(4, "counter").unwrap();
    let host = driver.alloc_pinned(4, Pinned::Readback).unwrap();
    // SAFETY: four bytes each.
    unsafe {
        for n in 0..2000_u32 {
            driver.fill(device, (n % 200) as u8, 4).unwrap();
            driver.copy_to_host(host, device, 4).unwrap();
        }
        assert_ne!(slice::from_raw_parts(host, 4), [0xff; 4]);
    }
}

#[test]
fn ranges_must_lie_inside_one_live_allocation() {
    let driver = lazy();
    let device = driver.alloc(100, "weights").unwrap();
    let host = driver.alloc_pinned(100, Pinned::Readback).unwrap();
    // SAFETY: every bad range is refused.
    unsafe {
        refused(driver.fill(device.offset(90), 0, 11), "bytes 90..101 of \"weights\", which has 100 bytes");
        refused(driver.fill(DevPtr(16), 0, 1), "lies in no live device memory");
        refused(driver.copy_to_host(host, device.offset(100), 1), "lies in no live device memory");
        refused(
            driver.copy_to_host(host.add(50), device, 51),
            "bytes 50..101 of page-locked memory of 100 bytes",
        );
        refused(driver.copy_to_device(device, host.add(50), 51), "page-locked memory");
        driver.fill(device.offset(99), 0, 1).unwrap();
        driver.free(device);
        refused(driver.fill(device, 0, 1), "lies in no live device memory");
    }
}

#[test]
fn results_go_to_page_locked_memory_made_for_them() {
    let driver = lazy();
    let device = driver.alloc(4, "result").unwrap();
    let upload = driver.alloc_pinned(4, Pinned::Upload).unwrap();
    let mut pageable = [0_u8; 4];
    // SAFETY: four bytes each.
    unsafe {
        refused(driver.copy_to_host(pageable.as_mut_ptr(), device, 4), "not page-locked");
        refused(driver.copy_to_host(upload, device, 4), "write-combined");
    }
}

#[test]
fn memory_is_freed_in_the_order_of_the_queue() {
    let driver = lazy();
    let (out, input, reversed) = reverse_setup(&driver);
    launch(&driver, "reverse", block(), out, input, 0).unwrap();
    // SAFETY: freed once; the launch queued before may still use it.
    unsafe { driver.free(input) };
    assert_eq!(download::<i32>(&driver, out, 256), reversed);
}

#[test]
fn a_kernel_that_uses_freed_memory_loses_the_device() {
    if option_env!("TIDEMILL_EMU_SANITIZE").is_some() {
        return; // the sanitizers have fault handlers of their own
    }
    let driver = lazy();
    let (out, input, _) = reverse_setup(&driver);
    // SAFETY: freed once; what follows is the mistake that must be found.
    unsafe { driver.free(input) };
    let event = driver.create_event().unwrap();
    launch(&driver, "reverse", block(), out, input, 0).unwrap();
    driver.record(event).unwrap();
    lost(driver.wait(event));
    lost(driver.synchronize());
    lost(driver.alloc(4, "more"));
    lost(driver.free_memory());
    lost(launch(&driver, "reverse", block(), out, out, 0));
}

#[test]
fn memory_is_limited_and_counted() {
    let mut config = EmuConfig::default();
    config.info.total_memory = 1000;
    let driver = EmuDriver::with(config);
    let first = driver.alloc(600, "first").unwrap();
    assert_eq!(driver.free_memory(), Ok(400));
    assert_eq!(driver.alloc(401, "second"), Err(KernelError::OutOfMemory { what: "second", bytes: 401 }));
    // SAFETY: freed once.
    unsafe { driver.free(first) };
    assert_eq!(driver.free_memory(), Ok(400), "the queue has not come to it");
    driver.alloc(1000, "second").unwrap();
    assert_eq!(driver.free_memory(), Ok(0));
}

#[test]
fn what_lives_can_be_asked() {
    let driver = lazy();
    let (device, pinned) =
        (driver.alloc(100, "a").unwrap(), driver.alloc_pinned(50, Pinned::Upload).unwrap());
    let event = driver.create_event().unwrap();
    driver.begin_capture().unwrap();
    let graph = driver.end_capture().unwrap();
    assert_eq!(driver.live(), Live { device_bytes: 100, pinned_bytes: 50, events: 1, graphs: 1 });
    // SAFETY: each came from this driver and is given back once.
    unsafe {
        driver.free(device);
        driver.free_pinned(pinned);
        driver.destroy_event(event);
        driver.destroy_graph(graph);
    }
    assert_eq!(driver.live(), Live::default());
}

#[test]
fn mistakes_in_calls_without_a_result_are_reported_by_the_next() {
    let driver = lazy();
    let device = driver.alloc(4, "twice").unwrap();
    let pinned = driver.alloc_pinned(4, Pinned::Upload).unwrap();
    // SAFETY: the second free is the mistake that must be found, and does nothing.
    unsafe {
        driver.free(device);
        driver.free(device);
        refused(driver.synchronize(), "freed twice");
        let device = driver.alloc(4, "target").unwrap();
        driver.copy_to_device(device, pinned, 4).unwrap();
        driver.free_pinned(pinned);
        refused(driver.synchronize(), "a queued copy still uses it");
    }
    driver.synchronize().unwrap();
}

#[test]
#[should_panic(expected = "freed twice")]
fn a_mistake_that_no_call_could_report_is_a_panic_in_the_end() {
    let driver = lazy();
    let device = driver.alloc(4, "twice").unwrap();
    // SAFETY: the second free is the mistake that must be found, and does nothing.
    unsafe {
        driver.free(device);
        driver.free(device);
    }
}

#[test]
fn a_graph_replays_recorded_values_and_rereads_its_sources() {
    let driver = lazy();
    let (out, input, reversed) = reverse_setup(&driver);
    let staging = driver.alloc_pinned(1024, Pinned::Upload).unwrap();
    driver.begin_capture().unwrap();
    // SAFETY: 1 KiB each.
    unsafe { driver.copy_to_device(input, staging, 1024) }.unwrap();
    launch(&driver, "reverse", block(), out, input, 0).unwrap();
    let graph = driver.end_capture().unwrap();
    assert_eq!(download::<i32>(&driver, out, 256), [-1; 256], "a capture runs nothing");
    for start in [0_i32, 1000] {
        let values: Vec<i32> = (start..start + 256).collect();
        // SAFETY: 1 KiB each; the last replay was waited for.
        unsafe {
            std::ptr::copy_nonoverlapping(values.as_ptr().cast(), staging, 1024);
            driver.launch_graph(graph).unwrap();
        }
        let expected: Vec<i32> = reversed.iter().map(|v| v + start).collect();
        assert_eq!(download::<i32>(&driver, out, 256), expected);
    }
}

#[test]
fn only_copies_fills_and_launches_are_captured() {
    let driver = lazy();
    let (device, event) = (driver.alloc(4, "a").unwrap(), driver.create_event().unwrap());
    driver.begin_capture().unwrap();
    let words = "while a graph is captured";
    refused(driver.alloc(4, "b"), words);
    refused(driver.alloc_pinned(4, Pinned::Upload), words);
    refused(driver.create_event(), words);
    refused(driver.record(event), words);
    refused(driver.wait(event), words);
    refused(driver.synchronize(), words);
    refused(driver.begin_capture(), words);
    // SAFETY: four bytes; freed once.
    unsafe {
        refused(driver.copy_to_device(device, [0_u8; 4].as_ptr(), 4), "pageable memory");
        driver.fill(device, 1, 4).unwrap();
        let graph = driver.end_capture().unwrap();
        refused(driver.end_capture(), "no capture has begun");
        driver.free(device);
        refused(driver.launch_graph(graph), "lies in no live device memory");
        driver.destroy_graph(graph);
        refused(driver.launch_graph(graph), "no such graph");
        driver.begin_capture().unwrap();
        refused(driver.launch_graph(graph), words);
    }
}

#[test]
fn events_are_recorded_then_waited_for_then_compared() {
    let driver = lazy();
    let (start, end) = (driver.create_event().unwrap(), driver.create_event().unwrap());
    refused(driver.wait(start), "never recorded");
    driver.record(start).unwrap();
    refused(driver.record(start), "nobody has waited");
    driver.record(end).unwrap();
    refused(driver.elapsed_ms(start, end), "not waited for");
    driver.synchronize().unwrap();
    assert!(driver.elapsed_ms(start, end).unwrap() >= 0.0);
    driver.record(start).unwrap();
    refused(driver.elapsed_ms(start, end), "not waited for");
    // SAFETY: it came from this driver; using it afterwards is the mistake that must be found.
    unsafe { driver.destroy_event(end) };
    refused(driver.wait(end), "no such event");
}

#[test]
fn a_planned_failure_hits_the_launch_that_was_meant() {
    let driver = lazy();
    let (out, input, reversed) = reverse_setup(&driver);
    driver.fail_launch(1, Failure::Refused);
    launch(&driver, "reverse", block(), out, input, 0).unwrap();
    refused(launch(&driver, "reverse", block(), input, out, 0), "the test asked for");
    assert_eq!(download::<i32>(&driver, out, 256), reversed, "the device works on");

    driver.fail_launch(0, Failure::Faults);
    launch(&driver, "reverse", block(), out, input, 0).unwrap();
    lost(driver.synchronize());

    let driver = lazy();
    let (out, input, _) = reverse_setup(&driver);
    driver.fail_launch(0, Failure::Lost);
    lost(launch(&driver, "reverse", block(), out, input, 0));
    lost(driver.synchronize());
}

#[test]
fn launches_that_a_gpu_refuses_are_refused() {
    let driver = lazy();
    let (out, input, _) = reverse_setup(&driver);
    let run = |config| launch(&driver, "reverse", config, out, input, 0);
    refused(run(LaunchConfig { block: [1025, 1, 1], ..block() }), "a block of");
    refused(run(LaunchConfig { block: [0, 1, 1], ..block() }), "a block of");
    refused(run(LaunchConfig { grid: [0, 1, 1], ..block() }), "a grid of");
    refused(run(LaunchConfig { grid: [1, 65_536, 1], ..block() }), "a grid of");
    refused(run(LaunchConfig { shared_bytes: 100 << 10, ..block() }), "at most 101376");
    refused(launch(&driver, "no_such_kernel", block(), out, input, 0), "no kernel of this name");
    driver.synchronize().unwrap();
}
