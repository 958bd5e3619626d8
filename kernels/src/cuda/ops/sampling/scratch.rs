//! Memory of the sampler on the device.

use super::{BlockShape, OP, RESULT_WORDS, SampleArgs, THREADS};
use crate::{
    KernelError,
    cuda::{
        Device,
        driver::{DevPtr, Result},
        memory::DeviceMemory,
        words::DeviceWords,
    },
};

/// Entries of a row's histogram, and of its list (`BINS`, `LIST` in `sampling.cuh`).
const BINS: usize = 2048;
const LIST: usize = 2048;
/// At most so many blocks share a row.
const MAX_CHUNKS: usize = 64;
const WARPS: usize = THREADS as usize / 32;
/// `sizeof` of the kernels' `RowState` and `Pick`.
const STATE_BYTES: usize = 64;
const PICK_BYTES: usize = 16;
/// Logits that a block reads in one turn: with a smaller share some of its threads would be idle.
const TURN: usize = 4096;
/// Blocks that fill a multiprocessor.
const BLOCKS_PER_SM: usize = 8;
/// Probabilities of a row are added up in units of 2^-44 in 64 bits.
const MAX_VOCAB: usize = 1 << 20;

/// Scratch memory and results for steps of up to `shape.rows` rows: 49 KiB and
/// V / 128 bytes per row, and 4 bytes per word of lists.
pub struct Sampler {
    shape: BlockShape,
    max_chunks: usize,
    scratch: DeviceMemory,
    results: DeviceMemory,
}

impl Sampler {
    /// Allocates.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]; [`KernelError::Unsupported`] for a vocabulary of more than 2^20 tokens.
    pub fn new(device: &Device, shape: BlockShape) -> Result<Self> {
        if shape.vocab == 0 || shape.vocab > MAX_VOCAB {
            let detail = format!("a vocabulary of {}; the CUDA kernels take up to {MAX_VOCAB}", shape.vocab);
            return Err(KernelError::Unsupported { op: OP, detail });
        }
        let places = Places::new(shape);
        let scratch = DeviceMemory::new(device.driver.clone(), places.end, "sampler scratch")?;
        let results =
            DeviceMemory::new(device.driver.clone(), 4 * shape.rows * RESULT_WORDS, "sampler results")?;
        let max_chunks = BLOCKS_PER_SM * device.driver().info().num_sms as usize;
        Ok(Self { shape, max_chunks, scratch, results })
    }

    /// The largest steps that it serves.
    pub fn shape(&self) -> BlockShape {
        self.shape
    }

    /// `[R, RESULT_WORDS]`, for [`super::decode_results`] once they are on the host.
    pub fn results(&self) -> DeviceWords<'_> {
        DeviceWords::new(&self.results)
    }

    /// Blocks that share a row when there are `rows`: enough to fill the device. Results do not depend on it.
    fn chunks(&self, rows: usize) -> usize {
        (self.max_chunks / rows).clamp(1, MAX_CHUNKS).min(self.shape.vocab.div_ceil(TURN))
    }

    /// The kernels' argument for a step of `rows` rows.
    pub(super) fn args(&self, rows: usize, logits: DevPtr, block: DevPtr, feedback: DevPtr) -> SampleArgs {
        let (at, places) = (self.scratch.ptr(), Places::new(self.shape));
        SampleArgs {
            logits,
            block,
            states: at.offset(places.states),
            counts: at.offset(places.counts),
            masses: at.offset(places.masses),
            lists: at.offset(places.lists),
            picks: at.offset(places.picks),
            maxima: at.offset(places.maxima),
            saved: at.offset(places.saved),
            results: self.results.ptr(),
            feedback,
            vocab: self.shape.vocab as i32,
            chunks: self.chunks(rows) as i32,
        }
    }
}

/// Where things lie in the scratch memory, in bytes.
struct Places {
    masses: usize,
    lists: usize,
    picks: usize,
    states: usize,
    counts: usize,
    maxima: usize,
    saved: usize,
    end: usize,
}

impl Places {
    fn new(shape: BlockShape) -> Self {
        let rows = shape.rows;
        // Those of 16 and of 8 bytes first: each begins aligned.
        let picks = 0;
        let masses = picks + rows * MAX_CHUNKS * WARPS * PICK_BYTES;
        let lists = masses + rows * BINS * 8;
        let states = lists + rows * LIST * 8;
        let counts = states + rows * STATE_BYTES;
        let maxima = counts + rows * BINS * 4;
        // The groups of four of a row that begins in the middle of one, in whole turns.
        let segments = WARPS * (shape.vocab + 6).div_ceil(TURN);
        let saved = maxima + rows * segments * 4;
        Self { masses, lists, picks, states, counts, maxima, saved, end: saved + shape.list_words * 4 }
    }
}
