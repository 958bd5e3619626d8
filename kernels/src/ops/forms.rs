//! What an op is to compute: functions, norms, what attention sees.

#[allow(unused_imports)] // for links
use super::Ops;

/// What [`Ops::linear`] does with its product `v = x · Wᵀ + bias`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Epilogue {
    /// `out = v`.
    Store,
    /// `out += v`: the residual connection.
    Add,
    /// `out = f(v)`. Not [`Activation::SwigluOai`], which takes two values.
    Activate(Activation),
    /// `out = cap * tanh(v / cap)`: bounded logits (Gemma Team 2024, section 2). The cap is positive.
    SoftCap(f32),
}

/// The function of a feed-forward block. Gated, it gives `f(gate) * up`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `x / (1 + e^-x)` (Elfwing et al. 2018).
    Silu,
    /// `x * Φ(x)` (Hendrycks and Gimpel 2016).
    Gelu,
    /// Its approximation by tanh (ibid., section 2).
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// Gated alone, as in GPT-OSS: `g = min(gate, limit)`, `u = clamp(up, -limit, limit)`, `(u + 1) * g / (1 + e^(-alpha g))`.
    SwigluOai {
        /// Slope of the sigmoid.
        alpha: f32,
        /// Bound of both halves.
        limit: f32,
    },
}

/// A norm over rows, before or in place of which values are in f32.
#[derive(Debug)]
pub enum Norm<'a, V> {
    /// Root-mean-square norm (Zhang and Sennrich 2019, eq. 4): `x / sqrt(mean(x²) + eps) * weight`.
    Rms {
        /// As long as what is normalised.
        weight: &'a V,
        /// Added to the mean square.
        eps: f32,
    },
    /// Layer norm (Ba, Kiros and Hinton 2016, eq. 4): `(x - mean) / sqrt(variance + eps) * weight + bias`.
    Layer {
        /// As long as what is normalised.
        weight: &'a V,
        /// As long as what is normalised.
        bias: Option<&'a V>,
        /// Added to the variance.
        eps: f32,
    },
}

impl<V> Clone for Norm<'_, V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V> Copy for Norm<'_, V> {}

/// Where [`Ops::embedding`] looks up, and what it does with what it finds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Lookup {
    /// `out[t, :] = table[token_ids[t], :] * scale`.
    Tokens {
        /// 1 copies the bits.
        scale: f32,
    },
    /// `out[t, :] += table[positions[t] + offset, :]`: learned positions.
    Positions {
        /// Rows of the table before that of position 0.
        offset: usize,
    },
    /// `out[t, :] += table[segments[t], :]`.
    Segments,
}

/// What [`Ops::rope_kv_write`] does to queries and keys on their way to attention.
#[derive(Debug)]
pub struct QkTransform<'a, V> {
    /// Root-mean-square norm of each query and key head before the rotation (Qwen3).
    pub norm: Option<HeadNorm<'a, V>>,
    /// Absent for layers without rotary positions.
    pub rotary: Option<Rotary<'a, V>>,
}

/// Weights of the norm over heads.
#[derive(Debug)]
pub struct HeadNorm<'a, V> {
    /// `[D]`, for all query heads.
    pub q_weight: &'a V,
    /// `[D]`, for all key heads.
    pub k_weight: &'a V,
    /// Added to the mean square.
    pub eps: f32,
}

/// Rotary position embedding (RoFormer, Su et al. 2021, eq. 34) of the first R elements of each head.
#[derive(Debug)]
pub struct Rotary<'a, V> {
    /// `[max_positions, R]`: for each position R/2 cosines, then R/2 sines (already multiplied by the scaling kind's attention factor).
    pub table: &'a V,
    /// R, even, at most D.
    pub dim: usize,
    /// Pairs are `(2i, 2i + 1)` instead of `(i, i + R/2)`, the usual layout of Hugging Face checkpoints.
    pub interleaved: bool,
}

/// What a layer's attention sees and how it scores.
#[derive(Debug)]
pub struct Scoring<'a, V> {
    /// What `q·k` is multiplied with.
    pub scale: f32,
    /// The token at position `p` sees position `j` only if `|p - j| < window`.
    pub window: Option<usize>,
    /// `cap * tanh(score / cap)` after the scale (Gemma Team 2024, section 2).
    pub soft_cap: Option<f32>,
    /// `[Q]`: `slope[q] * (j - p)` is added after the cap (ALiBi, Press et al. 2022).
    pub slopes: Option<&'a V>,
    /// `[Q]`: the softmax's denominator has one more term, `exp(sink[q])` (GPT-OSS).
    pub sinks: Option<&'a V>,
    /// Whether a token sees no later position. Where it does, all tokens of the row are in this step.
    pub causal: bool,
}

impl<V> Clone for Scoring<'_, V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V> Copy for Scoring<'_, V> {}
