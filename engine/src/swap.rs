//! Whether it pays to keep blocks on the host, measured on the loaded model.

use std::time::Instant;

use tidemill_kernels::{
    KernelError, Ops,
    ops::{BlockCopy, KvShape},
};

use crate::{error::LoadError, model::decoder::Decoder};

/// Blocks that are copied at a time when copies are timed: as many as a sequence of usual length has.
const BATCH: usize = 32;
/// Times that each direction is timed. The median counts.
const ROUNDS: usize = 5;

/// Host blocks, and what a block costs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct SwapFacts {
    /// At least 1.
    pub host_blocks: usize,
    /// Seconds to copy a block to the host.
    pub save_seconds_per_block: f64,
    /// Seconds to copy a block back.
    pub load_seconds_per_block: f64,
    /// Seconds to compute a block's tokens in a step that is full of prompt.
    pub recompute_seconds_per_block: f64,
}

impl SwapFacts {
    /// Whether a block is saved and loaded in less time than its tokens are computed anew.
    pub fn pays(&self) -> bool {
        self.save_seconds_per_block + self.load_seconds_per_block < self.recompute_seconds_per_block
    }

    /// Allocates as many host blocks as `bytes` hold and measures; `None` when they hold none. What it writes to the KV cache is
    /// overwritten before it is ever read.
    ///
    /// # Errors
    /// [`LoadError::Option`] when the host has not so much memory; what the device returned.
    pub fn allocate<O: Ops>(
        decoder: &mut Decoder<O>,
        kv: KvShape,
        bytes: usize,
        max_num_seqs: usize,
    ) -> Result<Option<Self>, LoadError> {
        if bytes == 0 {
            return Ok(None);
        }
        let block_bytes = kv.block_bytes();
        // Host blocks are numbered in 32 bits.
        let host_blocks = (bytes / block_bytes).min(u32::MAX as usize);
        if host_blocks == 0 {
            tracing::warn!(
                bytes,
                block_bytes,
                "the swap space holds no block; preempted sequences are computed anew"
            );
            return Ok(None);
        }
        decoder.allocate_host_kv(host_blocks).map_err(|error| match error {
            KernelError::OutOfMemory { .. } => LoadError::Option {
                option: "--swap-space",
                detail: format!("{error}; the host has not as much to give: ask for less"),
            },
            error => error.into(),
        })?;
        let blocks = BATCH.min(host_blocks).min(kv.num_blocks) as u32;
        // The other way round on the host, so that no two are neighbours on both sides: the blocks of a sequence seldom are.
        let ids = || (0..blocks).map(move |block| (block, blocks - 1 - block));
        let saves: Vec<_> = ids().map(|(block, host)| BlockCopy::Save { block, host }).collect();
        let loads: Vec<_> = ids().map(|(block, host)| BlockCopy::Load { host, block }).collect();
        Ok(Some(Self {
            host_blocks,
            save_seconds_per_block: copy_seconds(decoder, &saves)? / f64::from(blocks),
            load_seconds_per_block: copy_seconds(decoder, &loads)? / f64::from(blocks),
            recompute_seconds_per_block: prefill_seconds_per_token(decoder, max_num_seqs)?
                * kv.block_size as f64,
        }))
    }
}

/// Median seconds that these copies take.
fn copy_seconds<O: Ops>(decoder: &mut Decoder<O>, copies: &[BlockCopy]) -> Result<f64, KernelError> {
    let mut seconds = Vec::with_capacity(ROUNDS);
    // One more, as the first touches memory that nobody has touched.
    for _ in 0..=ROUNDS {
        decoder.ops().synchronize()?;
        let start = Instant::now();
        decoder.copy_blocks(copies)?;
        decoder.ops().synchronize()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    let timed = &mut seconds[1..];
    timed.sort_by(f64::total_cmp);
    Ok(timed[ROUNDS / 2])
}

/// Seconds per token of a step that is full of prompt.
fn prefill_seconds_per_token<O: Ops>(
    decoder: &mut Decoder<O>,
    max_num_seqs: usize,
) -> Result<f64, KernelError> {
    // The first finds weights and buffers cold.
    decoder.prefill(max_num_seqs)?;
    let start = Instant::now();
    let tokens = decoder.prefill(max_num_seqs)?;
    Ok(start.elapsed().as_secs_f64() / tokens as f64)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tidemill_kernels_emu::{EmuDriver, Schedule};

    use super::*;
    use crate::{
        config::EngineConfig,
        device::{Built, Model},
        model::{
            checkpoint::Checkpoint,
            files::{ModelFiles, ModelSource},
            spec::ModelSpec,
        },
    };

    #[test]
    fn swapping_pays_when_both_copies_take_less_than_computing() {
        let facts = |save, load, recompute| SwapFacts {
            host_blocks: 1,
            save_seconds_per_block: save,
            load_seconds_per_block: load,
            recompute_seconds_per_block: recompute,
        };
        assert!(facts(1.0, 2.0, 3.1).pays());
        assert!(!facts(1.0, 2.0, 3.0).pays());
    }

    /// The built-in model on a CPU, or on an emulated GPU; in both cases with 32 blocks of 32 KiB.
    fn built(driver: Option<Arc<EmuDriver>>, swap_space: usize) -> Result<Built, LoadError> {
        let config = EngineConfig {
            max_num_seqs: Some(4),
            max_num_batched_tokens: Some(16),
            max_model_len: Some(64),
            kv_cache_memory: Some(1 << 20),
            enforce_eager: true,
            swap_space,
            threads: Some(2),
            ..EngineConfig::new(ModelSource::Builtin)
        };
        let files = ModelFiles::open(&config.source).unwrap();
        let (spec, checkpoint) = (ModelSpec::load(&files).unwrap(), Checkpoint::open(&files).unwrap());
        let model = Model { config: &config, spec: &spec, checkpoint: &checkpoint };
        match driver {
            Some(driver) => model.on_cuda(driver, |_| ()),
            None => model.on_cpu(|_| ()),
        }
    }

    /// 4 layers, keys and values, 16 tokens, 2 heads of 64, bfloat16.
    const BLOCK_BYTES: usize = 4 * 2 * 16 * 2 * 64 * 2;

    fn emulated() -> Arc<EmuDriver> {
        Arc::new(EmuDriver::new(Schedule::default()))
    }

    #[test]
    fn swap_space_becomes_host_blocks_whose_cost_is_measured() {
        for driver in [None, Some(emulated())] {
            let swap = built(driver, 20 * BLOCK_BYTES + 100).unwrap().facts.swap.unwrap();
            assert_eq!(swap.host_blocks, 20);
            let seconds =
                [swap.save_seconds_per_block, swap.load_seconds_per_block, swap.recompute_seconds_per_block];
            assert!(seconds.iter().all(|&seconds| seconds > 0.0 && seconds < 60.0), "{seconds:?}");
        }
    }

    #[test]
    fn without_room_for_a_block_nothing_is_allocated_and_nothing_measured() {
        let pinned_bytes = |swap_space| {
            let driver = emulated();
            let built = built(Some(driver.clone()), swap_space).unwrap();
            assert_eq!(built.facts.swap.is_some(), swap_space >= BLOCK_BYTES);
            driver.live().pinned_bytes
        };
        let without = pinned_bytes(0);
        assert_eq!(pinned_bytes(BLOCK_BYTES - 1), without);
        assert!(pinned_bytes(BLOCK_BYTES) >= without + BLOCK_BYTES);
    }

    #[test]
    fn more_swap_space_than_the_host_has_is_refused_by_name() {
        for driver in [None, Some(emulated())] {
            // 128 TiB, what the ids of host blocks reach.
            match built(driver, usize::MAX).map(drop).unwrap_err() {
                LoadError::Option { option, detail } => {
                    assert_eq!(option, "--swap-space", "{detail}");
                }
                other => panic!("{other}"),
            }
        }
    }
}
