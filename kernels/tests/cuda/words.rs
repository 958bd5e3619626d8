//! Index tensors for the tests.

use std::sync::Arc;

use tidemill_kernels::cuda::{Device, driver::Driver, memory::DeviceMemory};
use tidemill_kernels_emu::EmuDriver;

/// Device memory that holds `words`.
pub fn upload(driver: &Arc<EmuDriver>, words: &[u32]) -> DeviceMemory {
    let memory = DeviceMemory::new(driver.clone(), 4 * words.len(), "test").unwrap();
    copy_in(driver, &memory, words);
    memory
}

/// Replaces the first words of `memory`.
pub fn copy_in(driver: &Arc<EmuDriver>, memory: &DeviceMemory, words: &[u32]) {
    assert!(4 * words.len() <= memory.bytes());
    // SAFETY: the memory holds as many words; the emulator copies at once.
    unsafe { driver.copy_to_device(memory.ptr(), words.as_ptr().cast(), 4 * words.len()) }.unwrap();
}

/// All words of `memory`.
pub fn download(driver: &Arc<EmuDriver>, memory: &DeviceMemory) -> Vec<u32> {
    let mut words = vec![0; memory.bytes() / 4];
    // SAFETY: the vector holds as many words; the emulator copies at once.
    unsafe { driver.copy_to_host(words.as_mut_ptr().cast(), memory.ptr(), 4 * words.len()) }.unwrap();
    words
}

/// A device, and its driver to allocate with.
pub fn device() -> (Device, Arc<EmuDriver>) {
    let driver = Arc::new(EmuDriver::new(Default::default()));
    (Device::new(driver.clone()), driver)
}

/// Runs `test` on a device under each schedule.
pub fn on_every_schedule(test: impl Fn(&Device, &Arc<EmuDriver>)) {
    for schedule in tidemill_kernels_emu::Schedule::all() {
        let driver = Arc::new(EmuDriver::new(schedule));
        test(&Device::new(driver.clone()), &driver);
    }
}
