//! Sizes that depend on model, options and memory together.

use tidemill_kernels::{DType, ops::KvShape};

use crate::{config::EngineConfig, error::LoadError, model::spec::ModelSpec};

/// Defaults that differ between devices.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Defaults {
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
}

/// What the options ask for, checked against the model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    /// The longest context wanted; the KV cache may hold less.
    pub max_model_len: usize,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub block_size: usize,
    /// Whether `max_model_len` is the user's own wish.
    len_is_explicit: bool,
}

impl Asked {
    /// # Errors
    /// The option that is out of range.
    pub fn check(config: &EngineConfig, spec: &ModelSpec, defaults: Defaults) -> Result<Self, LoadError> {
        let longest = spec.max_position_embeddings;
        // A step has a token for each row. Who gives one of the two gets the other one to fit.
        let (seqs, tokens) = (config.max_num_seqs, config.max_num_batched_tokens);
        let max_model_len = config.max_model_len.unwrap_or(longest);
        // So has one for each token of a prompt that cannot be cut.
        let whole = if spec.is_bidirectional() { max_model_len } else { 0 };
        let max_num_batched_tokens =
            tokens.unwrap_or(defaults.max_num_batched_tokens.max(seqs.unwrap_or_default()).max(whole));
        let asked = Self {
            max_model_len,
            max_num_seqs: seqs.unwrap_or(defaults.max_num_seqs.min(max_num_batched_tokens)),
            max_num_batched_tokens,
            block_size: config.block_size,
            len_is_explicit: config.max_model_len.is_some(),
        };
        for (name, value) in [
            ("--max-num-seqs", asked.max_num_seqs),
            ("--max-num-batched-tokens", asked.max_num_batched_tokens),
            ("--block-size", asked.block_size),
        ] {
            if value == 0 || value > 1 << 20 {
                return option(name, format!("{value} is not in [1, {}]", 1 << 20));
            }
        }
        config.scheduling.check(asked.max_num_seqs, asked.max_num_batched_tokens)?;
        if !(2..=longest).contains(&asked.max_model_len) {
            let detail =
                format!("{} is not in [2, {longest}], what the model was made for", asked.max_model_len);
            return option("--max-model-len", detail);
        }
        Ok(asked)
    }

    /// The KV cache that `budget` bytes, which `budget_option` decides, hold, at most what a full batch needs, and the longest context that fits into it.
    ///
    /// # Errors
    /// When it holds no block, or less than the `--max-model-len` asked for.
    pub fn kv(
        &self,
        spec: &ModelSpec,
        dtype: DType,
        budget: usize,
        budget_option: &'static str,
    ) -> Result<(KvShape, usize), LoadError> {
        let mut kv = self.kv_shape(spec, dtype, 0);
        let block_bytes = kv.block_bytes();
        let per_seq = self.max_model_len.div_ceil(self.block_size);
        let full = per_seq.saturating_mul(self.max_num_seqs);
        // Slots are numbered in 32 bits.
        let addressable = u32::MAX as usize / self.block_size;
        kv.num_blocks = (budget / block_bytes).min(full).min(addressable);
        if kv.num_blocks == 0 {
            let detail =
                format!("{budget} bytes are left for keys and values, and a block takes {block_bytes}");
            return option(budget_option, detail);
        }
        let capacity = kv.num_blocks * self.block_size;
        if self.max_model_len <= capacity {
            return Ok((kv, self.max_model_len));
        }
        if self.len_is_explicit {
            let detail = format!(
                "{} tokens need {} bytes of KV cache, but only {capacity} tokens fit; raise {budget_option}, or ask for \
                 fewer",
                self.max_model_len,
                per_seq * block_bytes
            );
            return option("--max-model-len", detail);
        }
        tracing::warn!(
            capacity,
            model = self.max_model_len,
            "the KV cache holds less than the model's context; max_model_len is lowered"
        );
        Ok((kv, capacity))
    }

    /// A KV cache of `num_blocks` blocks.
    pub fn kv_shape(&self, spec: &ModelSpec, dtype: DType, num_blocks: usize) -> KvShape {
        spec.kv_shape(num_blocks, self.block_size, dtype)
    }
}

fn option<T>(option: &'static str, detail: String) -> Result<T, LoadError> {
    Err(LoadError::Option { option, detail })
}
