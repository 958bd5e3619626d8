//! Which vector instructions this CPU has, found at run time.

use std::fmt;

use super::simd::{Portable, Simd};

/// An instruction set the CPU backend has code for.
///
/// Results are bit-identical for one `Isa`; two of them differ in the order of their sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// What the compiler makes of plain Rust for the build target.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// [`Isa::Avx512`] with the bf16 dot product `vdpbf16ps`.
    Avx512Bf16,
    /// [`Isa::Avx512Bf16`] with the bf16 tile product `tdpbf16ps`.
    Amx,
}

impl Isa {
    /// All of them, slowest first.
    pub const ALL: [Isa; 5] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx];

    /// The best instruction set of this CPU.
    pub fn detect() -> Isa {
        Isa::available().pop().unwrap_or(Isa::Portable)
    }

    /// Every instruction set that this CPU can run, slowest first; [`Isa::Portable`] is always among them.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Whether this CPU can run it.
    pub fn is_available(self) -> bool {
        self == Isa::Portable || native_available(self)
    }

    /// Lower-case name for display: `avx512-bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512-bf16",
            Isa::Amx => "amx",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An [`Isa`] that was found on this CPU: the proof that its code may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Host(Isa);

/// Vector code that is written once over [`Simd`]. Implementations mark `run` with `#[inline(always)]`: it is compiled once
/// for every instruction set, inside a function that has the set enabled.
pub(crate) trait Job {
    type Out;
    fn run<S: Simd>(self, s: S) -> Self::Out;
}

impl Host {
    pub(crate) fn new(isa: Isa) -> Option<Host> {
        isa.is_available().then_some(Host(isa))
    }

    pub(crate) const fn isa(self) -> Isa {
        self.0
    }

    /// Runs `job` with the widest vectors of this instruction set.
    #[inline]
    pub(crate) fn run<J: Job>(self, job: J) -> J::Out {
        #[cfg(target_arch = "x86_64")]
        match self.0 {
            Isa::Portable => {}
            // SAFETY: a `Host` of this set exists only where `is_available` found its features.
            Isa::Avx2 => return unsafe { run_avx2(job) },
            // SAFETY: as above; the larger sets include AVX-512.
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => return unsafe { run_avx512(job) },
        }
        job.run(Portable)
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<J: Job>(job: J) -> J::Out {
    // SAFETY: the features of `Avx2` are those of this function.
    job.run(unsafe { super::simd::Avx2::new() })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn run_avx512<J: Job>(job: J) -> J::Out {
    // SAFETY: the features of `Avx512` are those of this function.
    job.run(unsafe { super::simd::Avx512::new() })
}

#[cfg(target_arch = "x86_64")]
fn native_available(isa: Isa) -> bool {
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match isa {
        Isa::Portable => true,
        Isa::Avx2 => avx2,
        Isa::Avx512 => avx512,
        Isa::Avx512Bf16 => avx512 && is_x86_feature_detected!("avx512bf16"),
        Isa::Amx => avx512 && super::linear::amx_works(),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn native_available(_: Isa) -> bool {
    false
}
