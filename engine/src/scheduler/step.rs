//! A step: what is computed for whom.

use std::{ops::Range, sync::Arc};

use super::Sequence;
use crate::{
    adapter::{Adapter, AdapterSlot},
    ids::{BlockId, HostBlockId, SeqId, TokenId},
    sampling::Sampling,
};

/// How to choose a row's next token.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplePlan {
    /// The request's parameters.
    pub sampling: Arc<Sampling>,
    /// Key of the random stream.
    pub seed: u64,
    /// Position of the token to be chosen: the counter of the random stream.
    pub position: usize,
    /// Occurrences in the output of every token of prompt and output; empty without penalties.
    pub token_counts: Vec<(TokenId, u32)>,
    /// End-of-sequence and stop tokens may not be chosen yet.
    pub forbid_stops: bool,
    /// A bit per token that may be chosen, the lowest token in the lowest bit of the first word; none: all may.
    pub allowed: Option<Arc<[u32]>>,
}

/// The tokens that a row computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenInput {
    /// These, at least one.
    Known(Vec<TokenId>),
    /// One: the token that the previous step samples for this row of its logits (see [`StepPlan::samples`]). The host need not know it.
    Sampled(u32),
}

impl TokenInput {
    /// Tokens of the row.
    pub fn num_tokens(&self) -> usize {
        match self {
            Self::Known(tokens) => tokens.len(),
            Self::Sampled(_) => 1,
        }
    }

    /// The tokens that the host knows.
    pub fn known(&self) -> &[TokenId] {
        match self {
            Self::Known(tokens) => tokens,
            Self::Sampled(_) => &[],
        }
    }
}

/// One sequence's share of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanRow {
    /// Whose.
    pub seq: SeqId,
    /// Position of the first token of `input`.
    pub start: usize,
    /// The tokens to compute.
    pub input: TokenInput,
    /// Blocks for positions `0..end()`.
    pub blocks: Vec<BlockId>,
    /// Present when the last token of `input` is the sequence's last: the next one is to be chosen.
    pub sample: Option<SamplePlan>,
    /// Prompt log-probabilities wanted in this row: `targets[i]` is scored at the position before it, `score_at.start + i`.
    pub score_at: Range<usize>,
    /// The prompt tokens to score, one per position of `score_at`.
    pub targets: Vec<TokenId>,
    /// How many of the most likely tokens to report for each target.
    pub score_top: u32,
    /// Where its adapter is, if it has one.
    pub adapter: Option<AdapterSlot>,
    /// Positions of this row whose hidden states are wanted.
    pub pool_at: Range<usize>,
    /// Segment of each position of the sequence; none: all are 0.
    pub segments: Option<Arc<[u32]>>,
}

impl PlanRow {
    /// The position after the row's last token.
    pub fn end(&self) -> usize {
        self.start + self.input.num_tokens()
    }
}

/// A step: rows of decode tokens and prompt chunks, mixed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepPlan {
    /// In the order in which they were planned.
    pub rows: Vec<PlanRow>,
    /// What slots hold from this step on, one after the other.
    pub adapters: Vec<(AdapterSlot, Adapter)>,
    /// Blocks to be copied out to host memory before anything else of the step.
    pub saves: Vec<(BlockId, HostBlockId)>,
    /// Blocks to be copied in from host memory after the saves and before the rows are computed.
    pub loads: Vec<(HostBlockId, BlockId)>,
}

impl StepPlan {
    /// Tokens over all rows.
    pub fn num_tokens(&self) -> usize {
        self.rows.iter().map(|row| row.input.num_tokens()).sum()
    }

    /// For each row that samples: its index in `rows`, and its row of logits. The step has one row of logits for
    /// each result that it gives: for each of `rows` its targets, then its sample.
    pub fn samples(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        let mut logits = 0;
        self.rows.iter().enumerate().filter_map(move |(index, row)| {
            logits += row.targets.len() as u32 + u32::from(row.sample.is_some());
            row.sample.as_ref().map(|_| (index, logits - 1))
        })
    }
}

/// Memory of plans that were resolved, for plans to come: planning allocates nothing once it has seen its largest step.
#[derive(Debug, Default)]
pub(super) struct Spare {
    plans: Vec<StepPlan>,
    rows: Vec<PlanRow>,
    tokens: Vec<Vec<TokenId>>,
    /// See [`super::plan::Prompts`].
    pub chunks: Vec<(SeqId, usize)>,
}

impl Spare {
    pub fn plan(&mut self) -> StepPlan {
        self.plans.pop().unwrap_or_default()
    }

    /// Keeps a plan's memory.
    pub fn recycle(&mut self, mut plan: StepPlan) {
        self.rows.append(&mut plan.rows);
        plan.adapters.clear();
        plan.saves.clear();
        plan.loads.clear();
        self.plans.push(plan);
    }

    /// The row that computes the next `chunk` tokens of a sequence.
    pub fn row(&mut self, seq: &Sequence, chunk: usize) -> PlanRow {
        let (start, end) = (seq.num_planned, seq.num_planned + chunk);
        let mut row = self.rows.pop().unwrap_or_else(|| PlanRow {
            seq: seq.turn.id,
            start,
            input: TokenInput::Sampled(0),
            blocks: Vec::new(),
            sample: None,
            score_at: 0..0,
            targets: Vec::new(),
            score_top: 0,
            adapter: None,
            pool_at: 0..0,
            segments: None,
        });
        if let TokenInput::Known(mut tokens) =
            std::mem::replace(&mut row.input, TokenInput::Sampled(seq.sampled_at))
        {
            tokens.clear();
            self.tokens.push(tokens);
        }
        if let Some(known) = seq.tokens.get(start..end) {
            let mut tokens = self.tokens.pop().unwrap_or_default();
            tokens.extend_from_slice(known);
            row.input = TokenInput::Known(tokens);
        }
        (row.seq, row.start) = (seq.turn.id, start);
        row.blocks.clear();
        row.blocks.reserve(seq.table.room());
        row.blocks.extend_from_slice(seq.table.ids());
        row.sample = (end == seq.num_tokens() && seq.pooler.is_none()).then(|| SamplePlan {
            sampling: seq.sampling.clone(),
            seed: seq.seed,
            position: end,
            token_counts: seq.token_counts.iter().map(|(&token, &count)| (token, count)).collect(),
            forbid_stops: end - seq.prompt_len < seq.sampling.min_tokens && !must_stop(seq),
            allowed: seq.form.as_ref().and_then(|form| form.allowed.mask().cloned()),
        });
        // The logits at position p say how likely the token at p + 1 is.
        row.score_at = match seq.sampling.prompt_logprobs {
            Some(_) => seq.num_scored.max(start)..end.min(seq.prompt_len - 1),
            None => 0..0,
        };
        row.targets.clear();
        row.targets.extend(row.score_at.clone().map(|at| seq.tokens[at + 1]));
        row.score_top = seq.sampling.prompt_logprobs.unwrap_or(0);
        row.adapter = seq.slot;
        row.segments.clone_from(&seq.segments);
        row.pool_at = seq.pooler.as_ref().map_or(0..0, |pooler| pooler.needed(start..end));
        row
    }
}

/// Whether the sequence's constraint leaves it nothing but tokens that end it: a form comes before a number of tokens.
fn must_stop(seq: &Sequence) -> bool {
    let stops = seq.sampling.eos_token_ids.iter().chain(&seq.sampling.stop_token_ids);
    seq.form.as_ref().is_some_and(|form| form.allowed.leaves_only(stops))
}
