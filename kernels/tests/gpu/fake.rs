//! Processes with the fake libraries, and what they share.

use std::{
    env,
    ffi::{CStr, c_char, c_int, c_void},
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    slice,
    sync::{LazyLock, OnceLock},
};

use libloading::Library;
use tidemill_kernels::cuda::{
    driver::{DevPtr, Driver, LaunchConfig},
    gpu::{GpuDriver, GpuError, GpuOptions, open},
    table,
};
use tidemill_kernels_emu::{EmuDriver, Schedule};

const INSIDE: &str = "TIDEMILL_INSIDE_FAKE_GPU";

/// Where libcuda and libnvrtc come from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Libraries {
    /// Both fake.
    Fake,
    /// The fake libcuda; a libnvrtc that cannot be loaded, and no Python to find one with.
    NoNvrtc,
    /// The same, but among Python's packages there is the fake libnvrtc.
    PythonsNvrtc,
    /// Files of those names that are no libraries, so that a real driver is not found either.
    Broken,
}

/// Runs `body` in a process of its own, under these libraries and with these variables set. `name` is the test's own.
#[track_caller]
pub fn inside(name: &str, libraries: Libraries, variables: &[(&str, &str)], body: impl FnOnce()) {
    if env::var_os(INSIDE).is_some() {
        body();
        println!("{INSIDE}: reached the end");
        std::process::exit(0);
    }
    let mut command = Command::new(env::current_exe().unwrap());
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]).env(INSIDE, "1");
    command.env("LD_LIBRARY_PATH", folder(libraries)).envs(variables.iter().copied());
    match libraries {
        Libraries::Fake => &mut command,
        Libraries::PythonsNvrtc => command.env("PATH", folder(libraries).with_file_name("bin")),
        Libraries::NoNvrtc | Libraries::Broken => command.env("PATH", ""),
    };
    let output = command.output().unwrap();
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    let reached = text.contains("reached the end");
    assert!(output.status.success() && reached, "{name}, inside:\n{text}");
}

/// A folder with the libraries, made once per process of tests, which may find what another one made.
fn folder(libraries: Libraries) -> PathBuf {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    let root = ROOT.get_or_init(|| {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-gpu");
        for folder in ["fake", "no-nvrtc", "broken", "site/nvidia/cuda_nvrtc/lib", "bin"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        let cuda = compile("cuda.cpp", &root);
        let nvrtc = compile("nvrtc.cpp", &root);
        for folder in ["fake", "no-nvrtc"] {
            place(&cuda, &root.join(folder).join("libcuda.so.1"));
            // The name that is looked for first, so that a real one is not found.
            place(&cuda, &root.join(folder).join("libcuda.so"));
        }
        place(&nvrtc, &root.join("fake/libnvrtc.so.12"));
        place(&nvrtc, &root.join("site/nvidia/cuda_nvrtc/lib/libnvrtc.so.12"));
        place(&nvrtc, &root.join("site/nvidia/cuda_nvrtc/lib/libnvrtc-builtins.so.12.4"));
        for version in ["", ".1", ".9", ".10", ".11", ".12", ".13"] {
            for name in ["cuda", "nvcuda", "nvrtc"] {
                fs::write(root.join(format!("broken/lib{name}.so{version}")), "no library").unwrap();
            }
            fs::write(root.join(format!("no-nvrtc/libnvrtc.so{version}")), "no library").unwrap();
        }
        let python = format!("#!/bin/sh\necho\necho relative\necho {}\n", root.join("site").display());
        fs::write(root.join("bin/python3"), python).unwrap();
        fs::set_permissions(root.join("bin/python3"), fs::Permissions::from_mode(0o755)).unwrap();
        for library in [cuda, nvrtc] {
            fs::remove_file(library).unwrap();
        }
        root
    });
    root.join(match libraries {
        Libraries::Fake => "fake",
        Libraries::NoNvrtc | Libraries::PythonsNvrtc => "no-nvrtc",
        Libraries::Broken => "broken",
    })
}

/// Compiles one of the fakes to a file that no other process uses.
fn compile(source: &str, root: &Path) -> PathBuf {
    let library = root.join(format!("{source}-{}.so", std::process::id()));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("emu/libcuda").join(source);
    let mut command = Command::new(env::var_os("CXX").unwrap_or_else(|| "c++".into()));
    command.args(["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]);
    command.arg("-fvisibility=hidden").arg("-o").arg(&library).arg(source);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&output.stderr));
    library
}

/// Another name for a library. One that is there already is replaced whole, as it may be in use. Links, so that the loader knows
/// the names for one library.
fn place(library: &Path, name: &Path) {
    let part = name.with_extension(format!("part-{}", std::process::id()));
    fs::hard_link(library, &part).unwrap();
    fs::rename(&part, name).unwrap();
}

/// Whether this machine has an NVRTC where [`Libraries::NoNvrtc`] cannot hide it.
pub fn has_usual_nvrtc() -> bool {
    ["/usr/local/cuda/lib64", "/opt/cuda/lib64"].iter().any(|path| Path::new(path).exists())
}

/// The fake libcuda of this process.
pub struct Fake {
    library: Library,
}

#[repr(C)]
struct Hooks {
    alloc: extern "C" fn(usize) -> *mut c_void,
    free: extern "C" fn(*mut c_void),
    sizes: extern "C" fn(*const c_char, *mut usize, c_int) -> c_int,
    launch: extern "C" fn(*const c_char, *const u32, *const u32, u32, *mut *mut c_void) -> c_int,
}

static EMULATOR: LazyLock<EmuDriver> = LazyLock::new(|| EmuDriver::new(Schedule::default()));

impl Fake {
    /// Connects it to the emulator.
    pub fn new() -> Self {
        let hooks = Hooks { alloc, free, sizes, launch };
        // SAFETY: this is our own library, and the type is that of its function; it copies the hooks.
        unsafe {
            let library = Library::new("libcuda.so.1").unwrap();
            library.get::<extern "C" fn(*const Hooks)>(b"fake_cuda_install").unwrap()(&hooks);
            Fake { library }
        }
    }

    /// Connects it and opens GPU 0.
    pub fn open() -> (Self, Result<GpuDriver, GpuError>) {
        let fake = Self::new();
        (fake, open(0, &GpuOptions::default()))
    }

    /// The calls that are noted, one per line.
    pub fn log(&self) -> String {
        // SAFETY: as above; the string is copied before the next call.
        unsafe {
            let log = self.library.get::<extern "C" fn() -> *const c_char>(b"fake_cuda_log").unwrap()();
            CStr::from_ptr(log).to_str().unwrap().to_owned()
        }
    }

    /// How many objects and allocations were not given back.
    pub fn live(&self) -> usize {
        // SAFETY: as above.
        unsafe { self.library.get::<extern "C" fn() -> usize>(b"fake_cuda_live").unwrap()() }
    }
}

extern "C" fn alloc(bytes: usize) -> *mut c_void {
    EMULATOR.alloc(bytes, "fake").map_or(std::ptr::null_mut(), |ptr| ptr.0 as *mut c_void)
}

extern "C" fn free(ptr: *mut c_void) {
    // SAFETY: the library frees what `alloc` gave, once, after all work on it.
    unsafe { EMULATOR.free(DevPtr(ptr as u64)) }
}

extern "C" fn sizes(name: *const c_char, sizes: *mut usize, room: c_int) -> c_int {
    // SAFETY: the library passes a string and an array with that much room.
    let (name, out) = unsafe { (text(name), slice::from_raw_parts_mut(sizes, room as usize)) };
    let Some(found) = tidemill_kernels_emu::parameter_sizes(name) else { return -1 };
    out[..found.len()].copy_from_slice(&found);
    found.len() as c_int
}

extern "C" fn launch(
    name: *const c_char,
    grid: *const u32,
    block: *const u32,
    shared_bytes: u32,
    arguments: *mut *mut c_void,
) -> c_int {
    // SAFETY: the library passes a string, two triples, and one pointer per parameter.
    unsafe {
        let name = text(name);
        let kernel = table::all().find(|kernel| kernel.name == name).unwrap();
        let [grid, block] = [grid, block].map(|extents| *extents.cast::<[u32; 3]>());
        let arguments = slice::from_raw_parts_mut(arguments, kernel.parameter_sizes.len());
        let ran = EMULATOR
            .launch(kernel, LaunchConfig { grid, block, shared_bytes }, arguments)
            .and_then(|()| EMULATOR.synchronize());
        ran.inspect_err(|e| eprintln!("{e}")).is_err().into()
    }
}

/// # Safety
/// `text` ends with a NUL and outlives the call.
unsafe fn text<'a>(text: *const c_char) -> &'a str {
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_str().unwrap()
}
