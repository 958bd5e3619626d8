//! `sampling.cu` and `logprobs.cu`: see [`crate::sampling`] for what is computed.
//!
//! A step's tasks travel as one block of words inside its metadata upload ([`encode()`]); the kernels read everything that varies
//! from there, so that a captured graph serves every step of the same padded number of rows. Results are words too
//! ([`decode_results`]).

mod encode;
mod launch;
mod results;
mod scratch;

pub use encode::{BlockShape, Encoded, Needs, encode, is_masked, list_words, mask_words};
pub use launch::{Sample, sample};
pub use results::{RESULT_WORDS, decode_results};
pub use scratch::Sampler;

pub(super) use launch::{CHOICE_KERNELS, LOGPROB_KERNELS};

use crate::cuda::driver::DevPtr;

const OP: &str = "sample";
const THREADS: u32 = 256;

/// Log-probabilities of the largest tokens that a row may ask for.
pub const MAX_TOP: usize = 20;

/// The argument of every kernel of the sampler, as `SampleArgs` in `sampling.cuh` has it.
#[derive(Clone, Copy)]
#[repr(C)]
struct SampleArgs {
    logits: DevPtr,
    block: DevPtr,
    states: DevPtr,
    counts: DevPtr,
    masses: DevPtr,
    lists: DevPtr,
    picks: DevPtr,
    maxima: DevPtr,
    saved: DevPtr,
    results: DevPtr,
    feedback: DevPtr,
    vocab: i32,
    chunks: i32,
}
