//! Checks and launches.

use super::{BlockShape, Needs, OP, SampleArgs, Sampler, THREADS};
use crate::{
    DType, KernelError,
    cuda::{
        Device,
        driver::{Driver, Kernel, LaunchConfig, Result},
        memory::DeviceBuffer,
        words::DeviceWords,
    },
};

mod choice {
    use super::{Driver, LaunchConfig, Needs, Result, SampleArgs};
    use crate::cuda::table::kernels;

    kernels! {
        file "sampling";
        /// Clears the state of each row and edits its logits.
        fn sample_prepare(args: SampleArgs);
        /// Largest logits, and the draw of rows without filters.
        fn sample_scan(args: SampleArgs);
        /// Histograms of rows with filters.
        fn filter_histogram(args: SampleArgs);
        /// Lists of tokens that may survive the filters.
        fn filter_collect(args: SampleArgs);
        /// Filters, draws, writes the tokens.
        fn sample_choose(args: SampleArgs);
    }

    /// Queues the choice of the tokens; `rows` blocks, and `tiles` that share rows.
    ///
    /// # Safety
    /// The addresses in `args` are valid as `sampling.cu` says.
    pub(super) unsafe fn queue(
        driver: &dyn Driver,
        [rows, tiles]: [LaunchConfig; 2],
        args: SampleArgs,
        needs: Needs,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe {
            sample_prepare(driver, rows, args)?;
            sample_scan(driver, tiles, args)?;
            if needs.filters {
                filter_histogram(driver, tiles, args)?;
                filter_collect(driver, tiles, args)?;
            }
            sample_choose(driver, rows, args)
        }
    }
}

mod logprobs {
    use super::{Driver, LaunchConfig, Result, SampleArgs};
    use crate::cuda::table::kernels;

    kernels! {
        file "logprobs";
        /// Sums, ranks and histograms of the raw rows.
        fn logprob_scan(args: SampleArgs);
        /// Lists of the largest tokens.
        fn logprob_collect(args: SampleArgs);
        /// Writes the log-probabilities.
        fn logprob_finish(args: SampleArgs);
    }

    /// Queues the log-probabilities of the tokens chosen; `rows` blocks, and `tiles` that share rows.
    ///
    /// # Safety
    /// The addresses in `args` are valid as `logprobs.cu` says, and the tokens were chosen.
    pub(super) unsafe fn queue(
        driver: &dyn Driver,
        [rows, tiles]: [LaunchConfig; 2],
        args: SampleArgs,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe {
            logprob_scan(driver, tiles, args)?;
            logprob_collect(driver, tiles, args)?;
            logprob_finish(driver, rows, args)
        }
    }
}

pub(in crate::cuda::ops) static CHOICE_KERNELS: &[Kernel] = choice::KERNELS;
pub(in crate::cuda::ops) static LOGPROB_KERNELS: &[Kernel] = logprobs::KERNELS;

/// Arguments of [`sample`]. Letters as in [`crate::ops`].
pub struct Sample<'a> {
    /// Scratch memory; receives the results.
    pub sampler: &'a mut Sampler,
    /// `[R, V]` f32, overwritten.
    pub logits: &'a mut DeviceBuffer,
    /// What [`super::encode()`] gave for `shape`, on the device.
    pub block: DeviceWords<'a>,
    /// Shape of the block; V is the sampler's.
    pub shape: BlockShape,
    /// `[R]`, written: the token chosen for each row, 0 for a row without a finite logit; untouched for rows that score or pad.
    pub feedback: DeviceWords<'a>,
    /// Covers what every block needs that this call, or its captured graph, shall serve.
    pub needs: Needs,
}

/// Queues the step's sampling; the results are in [`Sampler::results`] when it has run. See [`crate::Ops::sample`].
///
/// A row whose task needs a kernel that `needs` leaves out comes back as not finite (filters) or without log-probabilities.
///
/// # Errors
/// [`KernelError::Shape`] when a buffer is too small or the sampler was made for smaller steps; what the driver reports.
pub fn sample(device: &Device, call: Sample<'_>) -> Result<()> {
    let Sample { sampler, logits, block, shape, feedback, needs } = call;
    let largest = sampler.shape();
    if shape.vocab != largest.vocab || shape.rows > largest.rows || shape.list_words > largest.list_words {
        let extents = |s: BlockShape| vec![s.rows, s.vocab, s.list_words];
        let (got, expected) = (extents(shape), extents(largest));
        return Err(KernelError::Shape { op: OP, what: "block".into(), got, expected });
    }
    if shape.rows == 0 {
        return Ok(());
    }
    let logits = logits.at_least(OP, "logits", DType::F32, shape.rows * shape.vocab)?;
    let block = block.at_least(OP, "block", shape.words())?;
    let feedback = feedback.at_least(OP, "feedback", shape.rows)?;
    let args = sampler.args(shape.rows, logits, block, feedback);
    let rows = LaunchConfig::linear(shape.rows, THREADS);
    let mut tiles = LaunchConfig::linear(args.chunks as usize, THREADS);
    tiles.grid[1] = shape.rows as u32;
    // SAFETY: 1. logits, block and feedback were checked above; 2. the sampler's memory was made for this shape or a larger one;
    // 3. offsets and tokens inside the block were checked by `encode`.
    unsafe {
        choice::queue(device.driver(), [rows, tiles], args, needs)?;
        if needs.logprobs {
            logprobs::queue(device.driver(), [rows, tiles], args)?;
        }
    }
    Ok(())
}
