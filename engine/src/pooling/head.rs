//! What follows pooling: a few small layers over the one state that a prompt comes to.
//!
//! They are computed where the request was made, not on the device: a layer has about a million weights and one row to multiply with.

use super::normalize;

/// Layers, one after the other. Without any, a state stays as it is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Head {
    layers: Vec<HeadLayer>,
}

/// A layer of a [`Head`].
#[derive(Debug, Clone, PartialEq)]
pub enum HeadLayer {
    /// A matrix product.
    Linear(Linear),
    /// A function of each value.
    Function(HeadFunction),
    /// Layer norm (Ba, Kiros and Hinton 2016, eq. 4).
    LayerNorm {
        /// As long as the state.
        weight: Vec<f32>,
        /// As long as the state, or empty.
        bias: Vec<f32>,
        /// Added to the variance.
        eps: f64,
    },
    /// Scales to length 1.
    Normalize,
}

/// `out = weight · x + bias`.
#[derive(Debug, Clone, PartialEq)]
pub struct Linear {
    /// `[N, K]`, row-major.
    pub weight: Vec<f32>,
    /// `[N]`, or empty.
    pub bias: Vec<f32>,
    /// K.
    pub inputs: usize,
}

/// A function of each value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadFunction {
    /// The hyperbolic tangent.
    Tanh,
    /// `max(x, 0)`.
    Relu,
    /// `x * Φ(x)` (Hendrycks and Gimpel 2016).
    Gelu,
    /// `x / (1 + e^-x)`.
    Silu,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
}

impl HeadFunction {
    /// Its value at `x`.
    fn at(self, x: f32) -> f32 {
        let x = f64::from(x);
        let y = match self {
            Self::Tanh => x.tanh(),
            Self::Relu => x.max(0.0),
            Self::Gelu => x * 0.5 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2),
            Self::Silu => x / (1.0 + (-x).exp()),
            Self::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        };
        y as f32
    }
}

impl Head {
    /// These layers, in order.
    pub fn new(layers: Vec<HeadLayer>) -> Self {
        Self { layers }
    }

    /// What the layers make of a state.
    pub fn apply(&self, mut state: Vec<f32>) -> Vec<f32> {
        for layer in &self.layers {
            match layer {
                HeadLayer::Linear(linear) => state = linear.apply(&state),
                HeadLayer::Function(function) => state.iter_mut().for_each(|x| *x = function.at(*x)),
                HeadLayer::LayerNorm { weight, bias, eps } => layer_norm(&mut state, weight, bias, *eps),
                HeadLayer::Normalize => normalize(&mut state),
            }
        }
        state
    }
}

impl Linear {
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let rows = self.weight.chunks_exact(self.inputs).map(|row| dot(row, x));
        let mut out: Vec<f32> = rows.collect();
        out.iter_mut().zip(&self.bias).for_each(|(out, bias)| *out += bias);
        out
    }
}

/// Sums that are kept beside each other, so that they need not wait for each other.
const LANES: usize = 16;

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (whole, rest) = (a.len() / LANES * LANES, a.len() % LANES);
    for (a, b) in a[..whole].chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    for lane in 0..rest {
        sums[lane] += a[whole + lane] * b[whole + lane];
    }
    sums.iter().map(|&sum| f64::from(sum)).sum::<f64>() as f32
}

fn layer_norm(state: &mut [f32], weight: &[f32], bias: &[f32], eps: f64) {
    let count = state.len() as f64;
    let mean = state.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
    let variance = state.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
    let scale = 1.0 / (variance + eps).sqrt();
    for (x, weight) in state.iter_mut().zip(weight) {
        *x = ((f64::from(*x) - mean) * scale) as f32 * weight;
    }
    state.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
}

/// From the state of a pair of texts to its score.
#[derive(Debug, Clone, PartialEq)]
pub struct Scorer {
    /// Gives one value.
    pub head: Head,
    /// What a score is of that value, unless a request asks for the value itself.
    pub function: Option<HeadFunction>,
}

impl Scorer {
    /// The score of a state; with `activated` false, the value before the function.
    pub fn score(&self, state: Vec<f32>, activated: bool) -> f32 {
        let value = self.head.apply(state).first().copied().unwrap_or(f32::NAN);
        match self.function.filter(|_| activated) {
            Some(function) => function.at(value),
            None => value,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_follow_one_another() {
        let (weight, bias) = (vec![1.0, 2.0, 3.0, -1.0, 0.0, 1.0], vec![0.5, -0.5]);
        let linear = HeadLayer::Linear(Linear { weight, bias, inputs: 3 });
        let head = Head::new(vec![linear.clone(), HeadLayer::Function(HeadFunction::Relu)]);
        assert_eq!(head.apply(vec![1.0, 1.0, 0.25]), [4.25, 0.0]);
        let head = Head::new(vec![linear, HeadLayer::Normalize]);
        let expected = [5.5 / 30.5_f32.sqrt(), 0.5 / 30.5_f32.sqrt()];
        let got = head.apply(vec![0.0, 1.0, 1.0]);
        assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{got:?}");
        assert_eq!(Head::default().apply(vec![1.0, 2.0]), [1.0, 2.0]);
    }

    #[test]
    fn a_product_is_right_whatever_its_length() {
        for len in 1..70 {
            let a: Vec<f32> = (0..len).map(|i| (i % 7) as f32 - 3.0).collect();
            let b: Vec<f32> = (0..len).map(|i| (i % 5) as f32 - 2.0).collect();
            let exact: f32 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            assert_eq!(dot(&a, &b), exact, "{len}");
        }
    }

    #[test]
    fn functions_have_the_values_of_the_literature() {
        let near = |a: f32, b: f32| assert!((a - b).abs() < 1e-6, "{a} is not {b}");
        near(HeadFunction::Gelu.at(1.0), 0.841_344_7);
        near(HeadFunction::Gelu.at(-2.0), -0.045_500_3);
        near(HeadFunction::Silu.at(1.0), 0.731_058_6);
        near(HeadFunction::Sigmoid.at(-1.0), 0.268_941_4);
        near(HeadFunction::Tanh.at(0.5), 0.462_117_2);
    }

    #[test]
    fn a_layer_norm_has_mean_and_variance_of_its_weights() {
        let mut state = vec![1.0, 2.0, 3.0, 4.0];
        layer_norm(&mut state, &[2.0; 4], &[1.0; 4], 0.0);
        let mean = state.iter().sum::<f32>() / 4.0;
        let variance = state.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / 4.0;
        assert!((mean - 1.0).abs() < 1e-6 && (variance - 4.0).abs() < 1e-5, "{mean} {variance}");
    }

    #[test]
    fn a_score_is_the_function_of_one_value_or_the_value() {
        let linear = Linear { weight: vec![1.0, -1.0], bias: Vec::new(), inputs: 2 };
        let head = Head::new(vec![HeadLayer::Linear(linear)]);
        let scorer = Scorer { head, function: Some(HeadFunction::Sigmoid) };
        assert_eq!(scorer.score(vec![3.0, 1.0], false), 2.0);
        assert!((scorer.score(vec![3.0, 1.0], true) - 0.880_797).abs() < 1e-6);
    }
}
