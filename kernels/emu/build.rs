//! Compiles the emulator's run-time and every `kernels/cuda/*.cu` as C++ for the CPU.

use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=runtime");
    println!("cargo:rerun-if-changed=../cuda");
    println!("cargo:rerun-if-env-changed=TIDEMILL_EMU_SANITIZE");
    // "address" or "thread"; see scripts/sanitize-kernels.
    let sanitizer = env::var("TIDEMILL_EMU_SANITIZE").ok();
    let base = || {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(2).debug(true).include("runtime").include("../cuda");
        for flag in
            ["-mavx2", "-mfma", "-mf16c", "-fno-strict-aliasing", "-Wno-psabi", "-Wno-unused-parameter"]
        {
            build.flag(flag);
        }
        build
    };
    let mut runtime = base();
    runtime.file("runtime/cuda_on_cpu.cpp");
    let mut kernels = base();
    // Kernels register themselves in static initialisers: the linker must keep them all.
    kernels.flag("-xc++").link_lib_modifier("+whole-archive");
    let mut files: Vec<_> = fs::read_dir("../cuda")
        .expect("kernels/cuda lies beside this crate")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    files.sort();
    kernels.files(&files);
    if let Some(sanitizer) = &sanitizer {
        kernels.flag(format!("-fsanitize={sanitizer}"));
        // The scheduler's hand-over between fibers would look like races.
        if sanitizer == "address" {
            runtime.flag("-fsanitize=address");
        }
    }
    kernels.compile("tidemill_emu_kernels");
    runtime.compile("tidemill_emu_runtime");
    // rustc links with -nodefaultlibs, so the sanitizer's run-time is named here, ahead of libc.
    match sanitizer.as_deref() {
        Some("address") => println!("cargo:rustc-link-lib=dylib=asan"),
        Some("thread") => println!("cargo:rustc-link-lib=dylib=tsan"),
        _ => {}
    }
}
