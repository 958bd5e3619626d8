//! Rotary position embeddings: frequencies and their table.
//!
//! Rotary embeddings: Su et al., RoFormer (arXiv 2104.09864). Linear interpolation: Chen et al. (arXiv 2306.15595).
//! YaRN: Peng et al. (arXiv 2309.00071). The `llama3` rule: Llama 3.1's reference code. All arithmetic is done in the
//! order and precision of `modeling_rope_utils.py` of Hugging Face transformers 5.23, the reference of our goldens.

use std::f64::consts::PI;

/// Base frequency and what stretches it.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// R: elements of a head that are rotated, the first ones; even.
    pub dim: usize,
    /// Neighbours are rotated together, instead of elements that are R / 2 apart.
    pub is_interleaved: bool,
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// How frequencies are adapted to longer contexts.
    pub scaling: RopeScaling,
}

/// How frequencies are adapted to longer contexts than the model was first trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All frequencies are divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Long wavelengths are divided by `factor`, short ones kept, those between interpolated.
    Llama3 {
        /// Divisor of long wavelengths.
        factor: f64,
        /// Wavelengths over `original_max_position_embeddings / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Wavelengths under `original_max_position_embeddings / high_freq_factor` are short.
        high_freq_factor: f64,
        /// Context length of the first training, in tokens.
        original_max_position_embeddings: usize,
    },
    /// YaRN: interpolation by a linear ramp over dimensions, and a factor on the attention scores.
    Yarn {
        /// Divisor of interpolated frequencies.
        factor: f64,
        /// What cosines and sines are multiplied with.
        attention_factor: f64,
        /// Dimensions that turn more often than this over the original context are kept.
        beta_fast: f64,
        /// Dimensions that turn less often than this are interpolated.
        beta_slow: f64,
        /// Context length of the first training, in tokens.
        original_max_position_embeddings: usize,
        /// Rounds the ramp's ends outwards to whole dimensions.
        truncate: bool,
    },
    /// LongRoPE (Ding et al., arXiv 2402.13753): each frequency is divided by a factor of its own. There are two sets of them; which one
    /// holds is decided once, by the longest context that there can be: a switch within a sequence would change what its cached keys mean.
    LongRope {
        /// R / 2 factors for contexts up to `original_max_position_embeddings`.
        short_factor: Vec<f64>,
        /// R / 2 factors for longer ones.
        long_factor: Vec<f64>,
        /// What cosines and sines are multiplied with.
        attention_factor: f64,
        /// Context length of the first training, in tokens.
        original_max_position_embeddings: usize,
    },
}

impl RopeSpec {
    /// What cosines and sines are multiplied with.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
                attention_factor
            }
            _ => 1.0,
        }
    }

    /// The `R / 2` frequencies in radians per position, for contexts of at most `positions` tokens.
    pub fn inv_freq(&self, positions: usize) -> Vec<f32> {
        let dim = self.dim;
        let powers = powers(self.theta, dim);
        match &self.scaling {
            RopeScaling::Default => powers.iter().map(|p| 1.0 / p).collect(),
            RopeScaling::Linear { factor } => powers.iter().map(|p| (1.0 / p) / *factor as f32).collect(),
            &RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let scale = Llama3 {
                    factor: factor as f32,
                    low: low_freq_factor,
                    high: high_freq_factor,
                    original: original_max_position_embeddings as f64,
                };
                powers.iter().map(|p| scale.apply(1.0 / p)).collect()
            }
            &RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_max_position_embeddings,
                truncate,
                ..
            } => {
                let original = original_max_position_embeddings as f64;
                let at = |turns| correction_dim(turns, dim, self.theta, original);
                let (mut low, mut high) = (at(beta_fast), at(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let ramp = Ramp::new(low.max(0.0), high.min(dim as f64 - 1.0));
                powers.iter().enumerate().map(|(i, &p)| ramp.mix(i, p, factor as f32)).collect()
            }
            RopeScaling::LongRope { short_factor, long_factor, original_max_position_embeddings, .. } => {
                let is_long = positions > *original_max_position_embeddings;
                let factors = if is_long { long_factor } else { short_factor };
                powers.iter().zip(factors).map(|(p, &factor)| 1.0 / (factor as f32 * p)).collect()
            }
        }
    }
}

/// `theta^(2i / head_dim)` in f32, for i in 0..head_dim / 2.
fn powers(theta: f64, head_dim: usize) -> Vec<f32> {
    // The base is rounded to f32 first, as PyTorch does with a scalar base; the power is the correctly rounded one.
    let base = f64::from(theta as f32);
    let exponents = (0..head_dim).step_by(2).map(|i| i as f32 / head_dim as f32);
    exponents.map(|exponent| base.powf(f64::from(exponent)) as f32).collect()
}

/// `_compute_llama3_parameters`.
struct Llama3 {
    factor: f32,
    low: f64,
    high: f64,
    original: f64,
}

impl Llama3 {
    fn apply(&self, inv_freq: f32) -> f32 {
        let wavelength = (2.0 * PI) as f32 / inv_freq;
        if wavelength > (self.original / self.low) as f32 {
            return inv_freq / self.factor;
        }
        if wavelength < (self.original / self.high) as f32 {
            return inv_freq;
        }
        let smooth = (self.original as f32 / wavelength - self.low as f32) / (self.high - self.low) as f32;
        (1.0 - smooth) * inv_freq / self.factor + smooth * inv_freq
    }
}

/// The dimension that turns `turns` times over the original context (arXiv 2309.00071, section 3.2).
fn correction_dim(turns: f64, head_dim: usize, theta: f64, original: f64) -> f64 {
    head_dim as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln())
}

/// The share of interpolation for each dimension: 0 up to `low`, 1 from `high`.
struct Ramp {
    low: f32,
    width: f32,
}

impl Ramp {
    fn new(low: f64, high: f64) -> Self {
        // As the reference does: no division by zero.
        let high = if low == high { high + 0.001 } else { high };
        Self { low: low as f32, width: (high - low) as f32 }
    }

    fn mix(&self, dim: usize, power: f32, factor: f32) -> f32 {
        let share = ((dim as f32 - self.low) / self.width).clamp(0.0, 1.0);
        let keep = 1.0 - share;
        (1.0 / (factor * power)) * (1.0 - keep) + (1.0 / power) * keep
    }
}

/// Cosines and sines for positions `0..positions`: shape `[positions, R]`, row-major, each row holding
/// `R / 2` cosines and then `R / 2` sines, multiplied with the attention factor.
///
/// The angle is the product of position and frequency in f32, as in the reference.
pub fn rope_table(spec: &RopeSpec, positions: usize) -> Vec<f32> {
    let inv_freq = spec.inv_freq(positions);
    let scale = spec.attention_factor() as f32;
    let mut table = Vec::with_capacity(positions * inv_freq.len() * 2);
    for position in 0..positions {
        let angles = inv_freq.iter().map(|freq| f64::from(position as f32 * freq));
        table.extend(angles.clone().map(|angle| angle.cos() as f32 * scale));
        table.extend(angles.map(|angle| angle.sin() as f32 * scale));
    }
    table
}
