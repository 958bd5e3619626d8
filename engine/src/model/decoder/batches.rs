//! Batches that nobody asked for: to warm up, to measure, to find out how much memory a step needs.

use tidemill_kernels::{
    ops::{BatchMeta, KvShape},
    sampling::{RowTask, SampleSpec},
};

use super::DecoderLimits;

/// One new token in each of `rows` rows, each the first of its own block.
pub(super) fn decode_batch(rows: u32, block_size: u32) -> BatchMeta {
    BatchMeta {
        token_ids: vec![0; rows as usize],
        positions: vec![0; rows as usize],
        slot_mapping: (0..rows).map(|row| row * block_size).collect(),
        cu_seqlens_q: (0..=rows).collect(),
        context_lens: vec![1; rows as usize],
        block_tables: (0..rows).collect(),
        max_blocks: 1,
        logits_indices: (0..rows).collect(),
        state_indices: Vec::new(),
        ..BatchMeta::default()
    }
}

/// As many tokens and rows as there can be, all of them in block 0: what they read and write means nothing.
pub(super) fn largest_batch(tokens: usize, rows: usize, block_size: usize) -> BatchMeta {
    let starts: Vec<usize> = (0..=rows).map(|row| row * tokens / rows).collect();
    let lens = || starts.windows(2).map(|pair| pair[1] - pair[0]);
    let max_blocks = lens().max().unwrap_or(0).div_ceil(block_size);
    let positions: Vec<u32> = lens().flat_map(|len| 0..len as u32).collect();
    BatchMeta {
        token_ids: vec![0; tokens],
        slot_mapping: positions.iter().map(|&p| p % block_size as u32).collect(),
        positions,
        cu_seqlens_q: starts.iter().map(|&start| start as u32).collect(),
        context_lens: lens().map(|len| len as u32).collect(),
        block_tables: vec![0; rows * max_blocks],
        max_blocks,
        logits_indices: starts[1..].iter().map(|&end| end as u32 - 1).collect(),
        state_indices: Vec::new(),
        ..BatchMeta::default()
    }
}

/// At most `max_rows` prompts of full contexts, each in blocks of its own, until the step or the cache is full.
pub(super) fn prefill_batch(limits: DecoderLimits, kv: &KvShape, max_rows: usize) -> BatchMeta {
    let per_row = limits.max_model_len.div_ceil(kv.block_size).min(kv.num_blocks);
    let longest = limits.max_model_len.min(per_row * kv.block_size);
    let rows = limits.max_num_batched_tokens.div_ceil(longest).min(kv.num_blocks / per_row).min(max_rows);
    let tokens = limits.max_num_batched_tokens.min(rows * longest);
    let mut meta = BatchMeta { cu_seqlens_q: vec![0], max_blocks: per_row, ..BatchMeta::default() };
    for row in 0..rows {
        let first_slot = (row * per_row * kv.block_size) as u32;
        let len = longest.min(tokens - row * longest) as u32;
        meta.token_ids.resize(meta.token_ids.len() + len as usize, 0);
        meta.positions.extend(0..len);
        meta.slot_mapping.extend(first_slot..first_slot + len);
        meta.context_lens.push(len);
        meta.cu_seqlens_q.push(meta.positions.len() as u32);
        meta.block_tables.extend((row * per_row) as u32..((row + 1) * per_row) as u32);
        meta.logits_indices.push(meta.positions.len() as u32 - 1);
    }
    meta
}

pub(super) fn greedy() -> RowTask {
    RowTask::Sample(SampleSpec::greedy(), None)
}

#[cfg(test)]
mod tests {
    use tidemill_kernels::DType;

    use super::*;

    #[test]
    fn a_step_full_of_prompt_takes_what_step_cache_and_rows_hold() {
        let lens = |max_num_batched_tokens, max_model_len, num_blocks, max_rows| {
            let limits = DecoderLimits { max_num_batched_tokens, max_model_len };
            let kv = KvShape {
                num_layers: 1,
                num_blocks,
                block_size: 16,
                num_kv_heads: 1,
                head_dim: 2,
                value_dim: 2,
                dtype: DType::F32,
            };
            let batch = prefill_batch(limits, &kv, max_rows);
            let mut slots = batch.slot_mapping.clone();
            slots.dedup();
            assert!(slots.is_sorted() && slots.len() == batch.num_tokens(), "no token writes over another");
            assert!(slots.iter().all(|&slot| slot < 16 * num_blocks as u32));
            assert_eq!(batch.block_tables.len(), batch.num_rows() * batch.max_blocks);
            batch.context_lens
        };
        assert_eq!(lens(150, 60, 32, 4), [60, 60, 30]);
        assert_eq!(lens(150, 60, 32, 2), [60, 60], "rows");
        assert_eq!(lens(150, 60, 7, 4), [60], "blocks for one full context");
        assert_eq!(lens(150, 200, 32, 4), [150]);
        assert_eq!(lens(150, 200, 3, 4), [48], "a cache smaller than a context");
        assert_eq!(lens(8, 60, 32, 4), [8]);
    }
}
