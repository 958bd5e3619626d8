//! Compiles the emulator's run-time, every `kernels/cuda/*.cu` as C++ for the CPU, and the faulty kernels of this crate's tests.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// Which checks the kernels are compiled with; see scripts/sanitize-kernels.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Checks {
    /// The emulator's own race check of shared memory.
    BuiltIn,
    /// AddressSanitizer.
    Address,
    /// ThreadSanitizer.
    Thread,
}

impl Checks {
    fn from_env() -> Self {
        match env::var("TIDEMILL_EMU_SANITIZE").as_deref() {
            Err(_) | Ok("") => Checks::BuiltIn,
            Ok("address") => Checks::Address,
            Ok("thread") => Checks::Thread,
            Ok(other) => panic!("TIDEMILL_EMU_SANITIZE is {other:?}; it takes \"address\" or \"thread\""),
        }
    }
}

fn main() {
    for path in ["build.rs", "runtime", "faults", "../cuda"] {
        println!("cargo:rerun-if-changed={path}");
    }
    println!("cargo:rerun-if-env-changed=TIDEMILL_EMU_SANITIZE");
    let checks = Checks::from_env();

    // Kernels register themselves in static initialisers: the linker must keep them all.
    let mut kernels = kernel_build(checks);
    kernels
        .files(sources("../cuda", "cu"))
        .link_lib_modifier("+whole-archive")
        .compile("tidemill_emu_kernels");

    // Linked into this crate's integration tests alone.
    let mut faults = kernel_build(checks);
    faults.files(sources("faults", "cu")).cargo_metadata(false).compile("tidemill_emu_faults");
    let archive = Path::new(&env::var_os("OUT_DIR").expect("cargo sets it")).join("libtidemill_emu_faults.a");
    println!("cargo:rustc-link-arg-tests=-Wl,--whole-archive,{},--no-whole-archive", archive.display());

    // Never with ThreadSanitizer: the hand-over between fibers would look like races.
    let mut runtime = base();
    runtime.files(sources("runtime", "cpp"));
    match checks {
        Checks::BuiltIn => drop(runtime.define("EMU_RACES", "1")),
        Checks::Address => drop(runtime.flag("-fsanitize=address")),
        Checks::Thread => {}
    }
    runtime.compile("tidemill_emu_runtime");

    // rustc links with -nodefaultlibs, so the sanitizer's run-time is named here, ahead of libc.
    match checks {
        Checks::BuiltIn => {}
        Checks::Address => println!("cargo:rustc-link-lib=dylib=asan"),
        Checks::Thread => println!("cargo:rustc-link-lib=dylib=tsan"),
    }
}

fn base() -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).debug(true).include("runtime").include("../cuda");
    build.flag("-fno-strict-aliasing").flag("-Wno-psabi").flag("-Wno-unused-parameter");
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64") {
        build.flag("-mavx2").flag("-mfma").flag("-mf16c");
    }
    build
}

fn kernel_build(checks: Checks) -> cc::Build {
    let mut build = base();
    build.flag("-xc++");
    // The built-in check gets its calls from ThreadSanitizer's instrumentation, without its run-time.
    build.flag(if checks == Checks::Address { "-fsanitize=address" } else { "-fsanitize=thread" });
    build
}

fn sources(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("{folder}: {error}"))
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    files.sort();
    files
}
