//! How a mixture of experts chooses.

/// How a mixture of experts routes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing {
    /// X.
    pub experts: usize,
    /// k: experts of a token.
    pub top_k: usize,
    /// What makes scores of logits.
    pub scoring: ExpertScoring,
    /// Only experts of the best groups are chosen from.
    pub groups: Option<ExpertGroups>,
    /// The chosen scores are divided by their sum.
    pub renormalize: bool,
    /// What the weights are multiplied with in the end.
    pub scale: f32,
}

/// What makes scores of an expert's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertScoring {
    /// Softmax over all experts.
    Softmax,
    /// The logistic function of each.
    Sigmoid,
}

/// Groups of neighbouring experts, of equal size (DeepSeek-V2, arXiv 2405.04434, section 2.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Groups in all; divides X.
    pub count: usize,
    /// Groups that are chosen from.
    pub top: usize,
    /// A group's score is the sum of its two best experts' (DeepSeek-V3) instead of its best one's.
    pub by_top_two: bool,
}
