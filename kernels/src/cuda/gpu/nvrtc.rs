//! NVRTC, NVIDIA's compiler as a library: found, loaded and asked for machine code.
//!
//! Loaded by our own hand and not by cudarc, which takes whatever `libnvrtc.so` comes first: an NVRTC newer than the driver makes
//! images that the driver refuses.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    fs,
    path::{Path, PathBuf},
    process::Command,
    ptr,
};

use libloading::Library;

use super::error::{GpuError, Version};

/// How every kernel file is compiled, beside the target.
pub(super) const FLAGS: &[&str] = &["--std=c++17"];

/// The oldest major version whose options and targets are used here.
const OLDEST_MAJOR: u32 = 12;

/// The target for a device: with its own instructions (`a`) from Hopper on.
pub(super) fn target((major, minor): (u32, u32)) -> String {
    let suffix = if major >= 9 { "a" } else { "" };
    format!("sm_{major}{minor}{suffix}")
}

/// A loaded libnvrtc. May be used from several threads.
pub struct Nvrtc {
    api: Api,
    version: Version,
    targets: Vec<c_int>,
    _library: Library,
    _builtins: Vec<Library>,
}

/// A kernel file to be compiled.
pub(super) struct Program<'a> {
    pub name: &'a str,
    pub source: &'a str,
    /// Name and text of everything that may be included.
    pub headers: &'a [(&'a str, &'a str)],
    /// For example `sm_90a`.
    pub arch: &'a str,
}

type Handle = *mut c_void;
type Size = unsafe extern "C" fn(Handle, *mut usize) -> c_int;
type Text = unsafe extern "C" fn(Handle, *mut c_char) -> c_int;

/// The functions that are used, as in nvrtc.h. All return an `nvrtcResult`, 0 on success.
struct Api {
    create: unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Handle) -> c_int,
    log_size: Size,
    log: Text,
    cubin_size: Size,
    cubin: Text,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
}

impl Nvrtc {
    /// The newest NVRTC whose images a driver of CUDA `newest_major` runs; `None` if there is none.
    ///
    /// Looked for where the dynamic loader looks, in the usual CUDA folders, and among the packages of `python3`.
    ///
    /// # Errors
    /// [`GpuError::NvrtcUnusable`] for one that was found and cannot be used.
    pub fn find(newest_major: u32) -> Result<Option<Nvrtc>, GpuError> {
        let majors = || (OLDEST_MAJOR..=newest_major).rev();
        for major in majors() {
            // SAFETY: libnvrtc's initialisers touch nothing of ours.
            if let Ok(library) = unsafe { Library::new(library_name(major)) } {
                return Self::new(library, Vec::new()).map(Some);
            }
        }
        let usual = ["/usr/local/cuda/lib64", "/opt/cuda/lib64"].map(PathBuf::from);
        let found = |folders: &[PathBuf]| {
            let mut places =
                majors().flat_map(|major| folders.iter().map(move |folder| (folder.clone(), major)));
            places.find(|(folder, major)| folder.join(library_name(*major)).is_file())
        };
        match found(&usual).or_else(|| found(&python_folders())) {
            Some((folder, major)) => Self::load(&folder, major).map(Some),
            None => Ok(None),
        }
    }

    /// The NVRTC of one major version in a folder.
    ///
    /// # Errors
    /// [`GpuError::NvrtcUnusable`].
    pub fn load(folder: &Path, major: u32) -> Result<Nvrtc, GpuError> {
        let unusable = |e: libloading::Error| GpuError::NvrtcUnusable { detail: e.to_string() };
        // NVRTC opens its builtins by their bare name; what is loaded already is found, whatever the loader's path.
        let builtins = builtins(folder).into_iter().map(|path| {
            // SAFETY: a data library without initialisers.
            unsafe { Library::new(path) }.map_err(unusable)
        });
        let builtins = builtins.collect::<Result<_, _>>()?;
        // SAFETY: libnvrtc's initialisers touch nothing of ours.
        let library = unsafe { Library::new(folder.join(library_name(major))) }.map_err(unusable)?;
        Self::new(library, builtins)
    }

    fn new(library: Library, builtins: Vec<Library>) -> Result<Nvrtc, GpuError> {
        let unusable = |detail: String| GpuError::NvrtcUnusable { detail };
        let (mut major, mut minor, mut count) = (0, 0, 0);
        // SAFETY: names and types are those of nvrtc.h, unchanged since CUDA 11.2; each call writes the numbers it is given
        // room for.
        let (api, targets) = unsafe {
            let api = Api::load(&library).map_err(|e| unusable(e.to_string()))?;
            let version =
                symbol::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>(&library, "nvrtcVersion");
            let num =
                symbol::<unsafe extern "C" fn(*mut c_int) -> c_int>(&library, "nvrtcGetNumSupportedArchs");
            let list =
                symbol::<unsafe extern "C" fn(*mut c_int) -> c_int>(&library, "nvrtcGetSupportedArchs");
            let (version, num, list) = match (version, num, list) {
                (Ok(version), Ok(num), Ok(list)) => (version, num, list),
                (Err(e), ..) | (_, Err(e), _) | (.., Err(e)) => return Err(unusable(e.to_string())),
            };
            if version(&mut major, &mut minor) != 0 || num(&mut count) != 0 {
                return Err(unusable("it does not tell its version".into()));
            }
            let mut targets = vec![0; usize::try_from(count).unwrap_or(0)];
            if list(targets.as_mut_ptr()) != 0 {
                return Err(unusable("it does not tell its targets".into()));
            }
            (api, targets)
        };
        let version = Version { major: major as u32, minor: minor as u32 };
        Ok(Nvrtc { api, version, targets, _library: library, _builtins: builtins })
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Machine code for the program's target.
    ///
    /// # Errors
    /// [`GpuError::NvrtcTooOld`], [`GpuError::Compile`] with the log.
    pub(super) fn compile(&self, program: Program<'_>) -> Result<Vec<u8>, GpuError> {
        let Program { name, source, headers, arch } = program;
        let number: String = arch.chars().filter(char::is_ascii_digit).collect();
        if !self.targets.iter().any(|target| target.to_string() == number) {
            return Err(GpuError::NvrtcTooOld { version: self.version, arch: arch.into() });
        }
        let options = FLAGS.iter().map(|flag| flag.to_string()).chain([format!("--gpu-architecture={arch}")]);
        let options: Vec<CString> = options.map(c_string).collect();
        let texts: Vec<CString> = headers.iter().map(|(_, text)| c_string(*text)).collect();
        let names: Vec<CString> = headers.iter().map(|(name, _)| c_string(*name)).collect();
        let (c_source, c_name) = (c_string(source), c_string(name));
        let failed = |log: String| GpuError::Compile { file: name.into(), arch: arch.into(), log };

        let mut handle = ptr::null_mut();
        // SAFETY: all strings live to the end of this function; the arrays have the length given.
        let created = unsafe {
            (self.api.create)(
                &mut handle,
                c_source.as_ptr(),
                c_name.as_ptr(),
                names.len() as c_int,
                pointers(&texts).as_ptr(),
                pointers(&names).as_ptr(),
            )
        };
        if created != 0 {
            return Err(failed(self.error(created)));
        }
        let mut handle = Owned { api: &self.api, handle };
        // SAFETY: as above.
        let compiled =
            unsafe { (self.api.compile)(handle.handle, options.len() as c_int, pointers(&options).as_ptr()) };
        if compiled != 0 {
            let log = handle.read(self.api.log_size, self.api.log).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            return Err(failed(format!("{}\n{}", self.error(compiled), log.trim_end_matches('\0'))));
        }
        handle.read(self.api.cubin_size, self.api.cubin).map_err(|code| failed(self.error(code)))
    }

    fn error(&self, code: c_int) -> String {
        // SAFETY: gives a static string for every code, known or not.
        unsafe { CStr::from_ptr((self.api.error_string)(code)) }.to_string_lossy().into_owned()
    }
}

/// A program, destroyed when it is dropped.
struct Owned<'a> {
    api: &'a Api,
    handle: Handle,
}

impl Owned<'_> {
    fn read(&mut self, size: Size, text: Text) -> Result<Vec<u8>, c_int> {
        let mut bytes = 0;
        // SAFETY: the handle lives; the second call writes as many bytes as the first one says.
        unsafe {
            let status = size(self.handle, &mut bytes);
            if status != 0 {
                return Err(status);
            }
            let mut out = vec![0_u8; bytes];
            match text(self.handle, out.as_mut_ptr().cast()) {
                0 => Ok(out),
                status => Err(status),
            }
        }
    }
}

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed here alone.
        unsafe { (self.api.destroy)(&mut self.handle) };
    }
}

impl Api {
    /// # Safety
    /// `library` is libnvrtc.
    unsafe fn load(library: &Library) -> Result<Api, libloading::Error> {
        // SAFETY: the types of the fields are those of nvrtc.h.
        unsafe {
            Ok(Api {
                create: symbol(library, "nvrtcCreateProgram")?,
                compile: symbol(library, "nvrtcCompileProgram")?,
                destroy: symbol(library, "nvrtcDestroyProgram")?,
                log_size: symbol(library, "nvrtcGetProgramLogSize")?,
                log: symbol(library, "nvrtcGetProgramLog")?,
                cubin_size: symbol(library, "nvrtcGetCUBINSize")?,
                cubin: symbol(library, "nvrtcGetCUBIN")?,
                error_string: symbol(library, "nvrtcGetErrorString")?,
            })
        }
    }
}

/// # Safety
/// `T` is the symbol's type, and is not called once the library is gone.
unsafe fn symbol<T: Copy>(library: &Library, name: &str) -> Result<T, libloading::Error> {
    // SAFETY: the caller's promise.
    unsafe { library.get::<T>(name.as_bytes()) }.map(|symbol| *symbol)
}

fn library_name(major: u32) -> String {
    format!("libnvrtc.so.{major}")
}

/// The builtins beside a libnvrtc, without the debugging variant.
fn builtins(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_builtins = |path: &PathBuf| {
        path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("libnvrtc-builtins.so."))
    };
    paths.filter(is_builtins).collect()
}

/// Where pip puts NVRTC: in the packages of the `python3` that a shell would start. Relative entries are left out, as
/// nothing is to be loaded from the working directory.
fn python_folders() -> Vec<PathBuf> {
    let output = Command::new("python3").args(["-c", "import sys; print(*sys.path, sep='\\n')"]).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let sites = text.lines().map(PathBuf::from).filter(|path| path.is_absolute());
    // The layouts of the wheels for CUDA 13 and for CUDA 12.
    sites.flat_map(|site| ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"].map(|lib| site.join(lib))).collect()
}

fn c_string(text: impl Into<Vec<u8>>) -> CString {
    CString::new(text).expect("sources, names and options hold no NUL")
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}
