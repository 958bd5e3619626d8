//! Where a part comes from.

use std::ops::Range;

/// A matrix `[N, K]` that stacks parts along N.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Linear {
    pub parts: Vec<Part>,
    /// Whether each part has a bias.
    pub bias: bool,
}

/// A matrix of the checkpoint, or some of its rows.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Part {
    /// Without `.weight`.
    pub name: String,
    /// `[N, K]` of the whole.
    pub shape: [usize; 2],
    /// The rows that are taken, in this order; `None`: all.
    pub rows: Option<Vec<Range<usize>>>,
    /// It is stored as `[K, N]`.
    pub is_transposed: bool,
}

/// What a vector is changed into: `(x + plus) * times`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Change {
    pub plus: f32,
    pub times: f32,
}

/// A layer's gated experts.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ExpertsSource {
    /// Matrices of their own: for each expert gate and up, and down.
    Each(Vec<UpDown<Linear>>),
    /// All in one tensor; see [`StackedExperts`].
    Stacked(StackedExperts),
}

/// Experts whose matrices stand in one tensor: `{gate_up}` `[X, H, 2 I]`, of whose columns the even ones are the gate and the odd ones go up, and `{down}` `[X, I, H]`;
/// and biases `{gate_up}_bias` `[X, 2 I]`, `{down}_bias` `[X, H]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct StackedExperts {
    pub gate_up: String,
    pub down: String,
    /// X.
    pub experts: usize,
    /// H.
    pub hidden: usize,
    /// I.
    pub width: usize,
}

/// The two halves of a feed-forward block.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct UpDown<T> {
    pub up: T,
    pub down: T,
}

impl Change {
    pub const NONE: Self = Self { plus: 0.0, times: 1.0 };
}

impl Linear {
    pub fn new(parts: Vec<Part>, bias: bool) -> Self {
        Self { parts, bias }
    }
}

impl Part {
    /// A whole matrix `[N, K]`.
    pub fn all(name: String, shape: [usize; 2]) -> Self {
        Self { name, shape, rows: None, is_transposed: false }
    }

    /// Extents as they are stored.
    pub fn stored_shape(&self) -> [usize; 2] {
        let [n, k] = self.shape;
        if self.is_transposed { [k, n] } else { [n, k] }
    }
}
