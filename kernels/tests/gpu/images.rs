//! Kernels that NVRTC compiles: chosen when the driver is older than the embedded ones, or there are none.
//!
//! The fake libnvrtc is a CUDA 12.4, so a driver of 12.4 takes it in every build.

use std::{fs, path::PathBuf};

use tidemill_kernels::cuda::gpu::{GpuDriver, GpuError, GpuOptions, KernelOrigin, Version, open};

use crate::fake::{
    Fake,
    Libraries::{Fake as Both, PythonsNvrtc},
    has_usual_nvrtc, inside,
};

const DRIVER: (&str, &str) = ("FAKE_CUDA_VERSION", "12040");

/// A folder for one test, empty.
fn folder(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    folder
}

fn with_cache(cache_dir: PathBuf) -> Result<GpuDriver, GpuError> {
    open(0, &GpuOptions { cache_dir: Some(cache_dir) })
}

/// Files that were compiled, and why they were not cached.
fn compiled(driver: &GpuDriver) -> (usize, Option<String>) {
    match driver.kernel_origin() {
        KernelOrigin::Compiled { cuda, arch, compiled, cache_error, .. } => {
            assert_eq!((*cuda, arch.as_str()), (Version { major: 12, minor: 4 }, "sm_90a"));
            (*compiled, cache_error.clone())
        }
        other => panic!("{other}"),
    }
}

#[test]
fn the_second_start_compiles_nothing_and_a_damaged_image_is_made_anew() {
    let name = "images::the_second_start_compiles_nothing_and_a_damaged_image_is_made_anew";
    inside(name, Both, &[DRIVER], || {
        let _fake = Fake::new();
        let cache = folder("kernel-cache");
        let (all, error) = compiled(&with_cache(cache.clone()).unwrap());
        assert!(all > 0 && error.is_none());
        assert_eq!(compiled(&with_cache(cache.clone()).unwrap()).0, 0);
        let inner = fs::read_dir(&cache).unwrap().next().unwrap().unwrap().path();
        let entry = inner.join("rmsnorm.cubin");
        let whole = fs::read(&entry).unwrap();
        fs::write(&entry, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(compiled(&with_cache(cache.clone()).unwrap()).0, 1);
        assert_eq!(fs::read(&entry).unwrap(), whole);
        assert_eq!(compiled(&open(0, &GpuOptions::default()).unwrap()).0, all, "no cache is used unasked");
        fs::remove_dir_all(cache).unwrap();
    });
}

#[test]
fn nvrtc_is_found_among_the_packages_of_python() {
    inside("images::nvrtc_is_found_among_the_packages_of_python", PythonsNvrtc, &[DRIVER], || {
        if has_usual_nvrtc() {
            return println!("skipped: this machine has an NVRTC in a usual place");
        }
        let (_fake, driver) = Fake::open();
        assert!(compiled(&driver.unwrap()).0 > 0);
    });
}

#[test]
fn a_cache_that_cannot_be_written_is_told_and_does_no_harm() {
    inside("images::a_cache_that_cannot_be_written_is_told_and_does_no_harm", Both, &[DRIVER], || {
        let _fake = Fake::new();
        let file = folder("kernel-cache-file");
        fs::write(&file, "in the way").unwrap();
        let driver = with_cache(file.clone()).unwrap();
        let error = compiled(&driver).1.unwrap();
        assert!(driver.kernel_origin().to_string().contains(&error));
        fs::remove_file(file).unwrap();
    });
}

#[test]
fn a_kernel_that_does_not_compile_is_named_with_the_log() {
    let variables = [DRIVER, ("FAKE_NVRTC_FAIL", "rmsnorm.cu")];
    inside("images::a_kernel_that_does_not_compile_is_named_with_the_log", Both, &variables, || {
        match Fake::open().1.err().unwrap() {
            GpuError::Compile { file, arch, log } => {
                assert_eq!((file.as_str(), arch.as_str()), ("rmsnorm.cu", "sm_90a"));
                assert!(log.contains("the fake compiler says so"), "{log}");
            }
            other => panic!("{other}"),
        }
    });
}

#[test]
fn a_gpu_newer_than_nvrtc_is_refused() {
    let variables = [DRIVER, ("FAKE_CUDA_CAPABILITY", "120")];
    inside("images::a_gpu_newer_than_nvrtc_is_refused", Both, &variables, || {
        let error = Fake::open().1.err().unwrap();
        let version = Version { major: 12, minor: 4 };
        assert_eq!(error, GpuError::NvrtcTooOld { version, arch: "sm_120a".into() });
    });
}

#[test]
fn a_kernel_that_is_not_in_its_image_is_named() {
    let variables = [DRIVER, ("FAKE_CUDA_FAIL", "cuModuleGetFunction:500")];
    inside("images::a_kernel_that_is_not_in_its_image_is_named", Both, &variables, || {
        match Fake::open().1.err().unwrap() {
            GpuError::Driver { call: "cuModuleGetFunction", detail } => {
                assert!(detail.contains(".cu, ") && detail.contains("FAKE_ERROR_500"), "{detail}");
            }
            other => panic!("{other}"),
        }
    });
}
