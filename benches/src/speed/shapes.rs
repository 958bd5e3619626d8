//! Which kernels are measured, and at which shapes.

use std::time::Duration;

use tidemill_kernels::ops::HeadShape;

use super::{experts::Experts, machine::Sizes};

/// Rows of the tables that activations are drawn from.
pub const TABLE_ROWS: usize = 512;
/// Terms of the products that logits are made of.
pub const LOGITS_DEPTH: usize = 64;

/// The shapes.
#[derive(Debug, Clone)]
pub struct Shapes {
    /// H.
    pub hidden: usize,
    /// I.
    pub inter: usize,
    /// Heads.
    pub heads: HeadShape,
    /// V of the model.
    pub vocab: usize,
    /// V of the sampler.
    pub sampled_vocab: usize,
    /// Rows of the sampler.
    pub sampled_rows: usize,
    /// M of the projections, with the names of the cases.
    pub rows: Vec<(&'static str, usize)>,
    /// M, N and K of square products, with their names.
    pub square: Vec<(&'static str, usize)>,
    /// A mixture of experts.
    pub experts: Experts,
    /// Attention: name, sequences, context, new tokens of each.
    pub attention: Vec<(&'static str, usize, usize, usize)>,
}

impl Shapes {
    /// Of Mistral-7B; the sampler's are of Llama 3.
    pub fn full() -> Self {
        Self {
            hidden: 4096,
            inter: 14336,
            heads: HeadShape { num_heads: 32, num_kv_heads: 8, head_dim: 128 },
            vocab: 32000,
            sampled_vocab: 128_256,
            sampled_rows: 256,
            rows: vec![
                ("M=1", 1),
                ("M=8", 8),
                ("M=64", 64),
                ("M=256", 256),
                ("M=1024", 1024),
                ("M=8192", 8192),
            ],
            square: vec![("gemm 8192", 8192), ("gemm 4096", 4096)],
            experts: Experts::QWEN3_30B_A3B,
            attention: vec![
                ("attention decode 64 x 1k", 64, 1024, 1),
                ("attention decode 1 x 1k", 1, 1024, 1),
                ("attention decode 1 x 32k", 1, 32768, 1),
                ("attention prefill 1k", 1, 1024, 1024),
                ("attention prefill 8k", 1, 8192, 8192),
            ],
        }
    }

    /// So small that the emulator is done in seconds: shows that every case runs.
    pub fn tiny() -> Self {
        Self {
            hidden: 64,
            inter: 96,
            heads: HeadShape { num_heads: 4, num_kv_heads: 2, head_dim: 64 },
            vocab: 256,
            sampled_vocab: 512,
            sampled_rows: 3,
            rows: vec![("M=1", 1), ("M=8192", 33)],
            square: vec![("gemm 8192", 64)],
            experts: Experts::TINY,
            attention: vec![("attention decode 64 x 1k", 2, 40, 1), ("attention prefill 1k", 1, 24, 24)],
        }
    }

    fn most(&self, of: impl Fn(&(&'static str, usize, usize, usize)) -> usize) -> usize {
        self.attention.iter().map(of).max().unwrap_or(1)
    }

    /// Elements of the largest random matrix.
    pub fn largest(&self) -> usize {
        let widest = self.inter.max(self.heads.qkv_width());
        let square = self.square.iter().map(|s| s.1 * s.1.max(TABLE_ROWS));
        let others = [
            self.sampled_vocab * LOGITS_DEPTH,
            self.vocab.max(TABLE_ROWS) * self.hidden,
            2 * self.inter * self.hidden,
            TABLE_ROWS * widest,
        ];
        others.into_iter().chain(square).max().unwrap_or(1)
    }

    /// What the ops are made for.
    pub fn sizes(&self) -> Sizes {
        let rows = self.rows.iter().chain(&self.square).map(|&(_, rows)| rows);
        Sizes {
            max_tokens: rows.chain([self.most(|a| a.3), self.sampled_rows]).max().unwrap_or(1),
            max_rows: self.most(|a| a.1).max(self.sampled_rows),
            max_model_len: self
                .most(|a| a.2.max(a.3))
                .max(self.square.iter().map(|s| s.1).max().unwrap_or(1)),
            heads: self.heads,
            vocab: self.sampled_vocab,
        }
    }
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// The shapes.
    pub shapes: Shapes,
    /// Cases whose names contain this.
    pub only: String,
    /// Time spent on each case.
    pub budget: Duration,
    /// Floating-point operations per second of the best matrix product that is known of this machine; ours may be better.
    pub peak_flops: Option<f64>,
}
