//! Every kernel file compiles with NVRTC, without any header of CUDA's: for the oldest target, the newest, and the one with instructions of its own.
//! `scripts/check-kernels` compiles them for every target with the same back end.
//!
//! Needs libnvrtc (`scripts/setup-cuda`), but no GPU. Without it nothing is tested, unless TIDEMILL_REQUIRE_NVRTC=1 asks for failure.

#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeSet,
    env, fs,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use tidemill_kernels::cuda::{
    gpu::{GpuError, compile_file, nvrtc::Nvrtc},
    table,
};

const TARGETS: [&str; 3] = ["sm_80", "sm_90a", "sm_120a"];
/// Those that binaries are built for.
const BUILT: &str = include_str!("../cuda/targets.txt");

/// What `scripts/setup-cuda` installed, else what the machine has; `None`, and a line that says so, when there is neither.
fn nvrtc() -> Option<Nvrtc> {
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv-cuda/lib");
    for python in fs::read_dir(venv).into_iter().flatten().flatten() {
        let folder = python.path().join("site-packages/nvidia/cu13/lib");
        if folder.join("libnvrtc.so.13").is_file() {
            return Some(Nvrtc::load(&folder, 13).unwrap());
        }
    }
    let found = Nvrtc::find(13).unwrap();
    if found.is_none() {
        let required = env::var_os("TIDEMILL_REQUIRE_NVRTC").is_some_and(|value| value == "1");
        assert!(!required, "libnvrtc not found, but TIDEMILL_REQUIRE_NVRTC=1; run scripts/setup-cuda");
        println!("skipped: libnvrtc not found; run scripts/setup-cuda");
    }
    found
}

#[test]
fn every_kernel_compiles_and_is_in_its_image() {
    assert!(TARGETS.iter().all(|target| BUILT.split_whitespace().any(|built| built == *target)));
    let Some(nvrtc) = nvrtc() else { return };
    let files: BTreeSet<&str> = table::all().map(|kernel| kernel.file).collect();
    let work: Vec<(&str, &str)> =
        TARGETS.iter().flat_map(|&arch| files.iter().map(move |&file| (arch, file))).collect();
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(&(arch, file)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let image = compile_file(&nvrtc, arch, file).unwrap_or_else(|e| panic!("{e}"));
                    assert_eq!(image[..4], *b"\x7fELF", "{file} for {arch}");
                    for kernel in table::all().filter(|kernel| kernel.file == file) {
                        let section = format!(".text.{}\0", kernel.name);
                        let found = image.windows(section.len()).any(|bytes| bytes == section.as_bytes());
                        assert!(found, "{} is not in {file} for {arch}", kernel.name);
                    }
                }
            });
        }
    });
}

#[test]
fn a_target_that_nvrtc_does_not_know_and_a_file_that_does_not_exist_are_errors() {
    let Some(nvrtc) = nvrtc() else { return };
    assert!(matches!(compile_file(&nvrtc, "sm_35", "rmsnorm"), Err(GpuError::NvrtcTooOld { .. })));
    assert!(matches!(compile_file(&nvrtc, "sm_80", "nothing"), Err(GpuError::Compile { .. })));
}
