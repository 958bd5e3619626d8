//! The kernels as machine code for one device.

use std::{
    borrow::Cow,
    collections::BTreeSet,
    fmt,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{
    cache::Cache,
    error::{GpuError, Version},
    nvrtc::{self, Nvrtc},
};
use crate::cuda::table;

// `SOURCES`: name and text of every file in kernels/cuda; `EMBEDDED`: what nvcc made of them, where the build found one.
include!(concat!(env!("OUT_DIR"), "/cuda_images.rs"));

/// Images for all targets, made by the build.
#[derive(Clone, Copy)]
struct Embedded {
    cuda: Version,
    fatbins: &'static [(&'static str, &'static Aligned<[u8]>)],
}

/// The loader reads an image's header as words.
#[repr(align(16))]
struct Aligned<T: ?Sized>(T);

/// Where a device's kernels came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelOrigin {
    /// Compiled by nvcc when this binary was built.
    Embedded {
        /// nvcc's version.
        cuda: Version,
    },
    /// Compiled by NVRTC, now or at an earlier start.
    Compiled {
        /// NVRTC's version.
        cuda: Version,
        /// The target, for example `sm_90a`.
        arch: String,
        /// Files that were compiled now; the others were in the cache.
        compiled: usize,
        /// Time that took.
        took: Duration,
        /// Why the cache could not be written, if it could not: the next start compiles again.
        cache_error: Option<String>,
    },
}

impl fmt::Display for KernelOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded { cuda } => write!(f, "built with CUDA {cuda}"),
            Self::Compiled { cuda, arch, compiled: 0, .. } => write!(f, "NVRTC {cuda} for {arch}, cached"),
            Self::Compiled { cuda, arch, compiled, took, cache_error } => {
                write!(
                    f,
                    "NVRTC {cuda} for {arch}, {compiled} files compiled in {:.1} s",
                    took.as_secs_f32()
                )?;
                cache_error.iter().try_for_each(|error| write!(f, " and not cached ({error})"))
            }
        }
    }
}

/// An image for the loader, with the name of its kernel file.
pub(super) type Image = (&'static str, Cow<'static, [u8]>);

/// The images of all kernel files for a device: the embedded ones if the driver takes them, else NVRTC's.
///
/// A driver runs machine code of its own CUDA major version and of older ones (CUDA Compatibility, "Minor version compatibility").
pub(super) fn for_device(
    capability: (u32, u32),
    driver: Version,
    cache_dir: Option<&Path>,
) -> Result<(Vec<Image>, KernelOrigin), GpuError> {
    if let Some(Embedded { cuda, fatbins }) = EMBEDDED.filter(|embedded| embedded.cuda.major <= driver.major)
    {
        let images = fatbins.iter().map(|(file, image)| (*file, Cow::Borrowed(&image.0))).collect();
        return Ok((images, KernelOrigin::Embedded { cuda }));
    }
    let Some(nvrtc) = Nvrtc::find(driver.major)? else {
        return Err(match EMBEDDED {
            Some(Embedded { cuda, .. }) => GpuError::DriverTooOld { found: driver, needed: cuda },
            None => GpuError::NvrtcMissing { driver },
        });
    };
    compile(&nvrtc, &nvrtc::target(capability), cache_dir)
}

/// Compiles every kernel file that is not in the cache, on all cores.
fn compile(
    nvrtc: &Nvrtc,
    arch: &str,
    cache_dir: Option<&Path>,
) -> Result<(Vec<Image>, KernelOrigin), GpuError> {
    let started = Instant::now();
    let cache = cache_dir.map(|root| Cache::new(root, (SOURCES, arch, nvrtc.version(), nvrtc::FLAGS)));
    let files: Vec<&'static str> =
        table::all().map(|kernel| kernel.file).collect::<BTreeSet<_>>().into_iter().collect();
    let mut images = Vec::new();
    let mut missing = Vec::new();
    for file in files {
        match cache.as_ref().and_then(|cache| cache.load(file)) {
            Some(image) => images.push((file, Cow::Owned(image))),
            None => missing.push(file),
        }
    }
    let made = compile_files(nvrtc, arch, &missing)?;
    let cache_error = cache.and_then(|cache| {
        made.iter().find_map(|(file, image)| cache.store(file, image).err()).map(|e| e.to_string())
    });
    images.extend(made.into_iter().map(|(file, image)| (file, Cow::Owned(image))));
    let origin = KernelOrigin::Compiled {
        cuda: nvrtc.version(),
        arch: arch.into(),
        compiled: missing.len(),
        took: started.elapsed(),
        cache_error,
    };
    Ok((images, origin))
}

/// Compiles kernel files for a target on all cores.
fn compile_files(
    nvrtc: &Nvrtc,
    arch: &str,
    files: &[&'static str],
) -> Result<Vec<(&'static str, Vec<u8>)>, GpuError> {
    let next = AtomicUsize::new(0);
    let made = Mutex::new(Vec::new());
    let work = || {
        while let Some(&file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            let image = compile_file(nvrtc, arch, file).map(|image| (file, image));
            made.lock().push(image);
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(files.len());
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    made.into_inner().into_iter().collect()
}

/// Compiles one kernel file of this crate for a target.
///
/// # Errors
/// [`GpuError::NvrtcTooOld`], [`GpuError::Compile`].
pub fn compile_file(nvrtc: &Nvrtc, arch: &str, file: &str) -> Result<Vec<u8>, GpuError> {
    let name = format!("{file}.cu");
    let is_header = |(name, _): &&(&str, &str)| name.ends_with(".cuh");
    let headers: Vec<_> = SOURCES.iter().filter(is_header).copied().collect();
    let Some((_, source)) = SOURCES.iter().find(|(source, _)| *source == name) else {
        let log = "there is no such kernel file".into();
        return Err(GpuError::Compile { file: name, arch: arch.into(), log });
    };
    nvrtc.compile(nvrtc::Program { name: &name, source, headers: &headers, arch })
}
