//! Index tensors for the tests.

use std::sync::Arc;

use tidemill_kernels::cuda::{Device, driver::Driver, memory::DeviceMemory};

use crate::harness::{self, copy_out};

/// Device memory that holds `words`.
pub fn upload(driver: &Arc<dyn Driver>, words: &[u32]) -> DeviceMemory {
    let memory = DeviceMemory::new(driver.clone(), 4 * words.len(), "test").unwrap();
    copy_in(driver, &memory, words);
    memory
}

/// Replaces the first words of `memory`.
pub fn copy_in(driver: &Arc<dyn Driver>, memory: &DeviceMemory, words: &[u32]) {
    assert!(4 * words.len() <= memory.bytes());
    // SAFETY: the memory holds as many words; pageable memory is read before the call returns.
    unsafe { driver.copy_to_device(memory.ptr(), words.as_ptr().cast(), 4 * words.len()) }.unwrap();
}

/// All words of `memory`.
pub fn download(driver: &Arc<dyn Driver>, memory: &DeviceMemory) -> Vec<u32> {
    let mut words = vec![0; memory.bytes() / 4];
    copy_out(driver.as_ref(), memory.ptr(), &mut words);
    words
}

/// A device, and its driver to allocate with.
pub fn device() -> (Device, Arc<dyn Driver>) {
    let driver = harness::driver(Default::default());
    (Device::new(driver.clone()), driver)
}

/// Runs `test` on a device under each schedule.
pub fn on_every_schedule(test: impl Fn(&Device, &Arc<dyn Driver>)) {
    for schedule in harness::schedules() {
        let driver = harness::driver(schedule);
        test(&Device::new(driver.clone()), &driver);
    }
}
