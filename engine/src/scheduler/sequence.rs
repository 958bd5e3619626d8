//! A sequence: one completion of one request, as the scheduler sees it.

use std::{collections::BTreeMap, sync::Arc};

use super::Stage;
use crate::{
    ids::{SeqId, TokenId},
    kv::BlockTable,
    sampling::Sampling,
};

/// What the scheduler needs to know of a new sequence.
#[derive(Debug, Clone)]
pub struct NewSequence {
    /// Higher than all before it.
    pub id: SeqId,
    /// At least one token.
    pub prompt: Arc<[TokenId]>,
    /// Shared with the other completions of the request.
    pub sampling: Arc<Sampling>,
    /// Key of this completion's random stream.
    pub seed: u64,
    /// An older sequence with the same prompt, whose prompt blocks this one waits for and shares.
    pub prompt_of: Option<SeqId>,
}

/// Whether a sequence has a row of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Queue,
    Batch,
}

/// A live sequence.
#[derive(Debug)]
pub struct Sequence {
    pub(super) place: Place,
    /// Prompt, then everything generated.
    pub(super) tokens: Vec<TokenId>,
    pub(super) prompt_len: usize,
    /// Tokens whose keys and values are in `table`'s blocks.
    pub(super) num_computed: usize,
    /// The same once the steps in flight are done: the next step starts here.
    pub(super) num_planned: usize,
    /// The row of logits from which the newest step that samples for this sequence chooses its token.
    pub(super) sampled_at: u32,
    pub(super) table: BlockTable,
    pub(super) sampling: Arc<Sampling>,
    pub(super) seed: u64,
    pub(super) prompt_of: Option<SeqId>,
    /// Occurrences in the output of every token of prompt and output; kept only when a penalty asks for it.
    pub(super) token_counts: BTreeMap<TokenId, u32>,
    /// Prompt positions whose log-probabilities were handed out: a recomputation does not repeat them.
    pub(super) num_scored: usize,
    pub(super) num_preemptions: usize,
}

impl Sequence {
    pub(super) fn new(new: NewSequence, table: BlockTable) -> Self {
        let mut token_counts = BTreeMap::new();
        if new.sampling.has_penalties() {
            token_counts.extend(new.prompt.iter().map(|&token| (token, 0)));
        }
        Self {
            place: Place::Queue,
            tokens: new.prompt.to_vec(),
            prompt_len: new.prompt.len(),
            num_computed: 0,
            num_planned: 0,
            sampled_at: 0,
            table,
            sampling: new.sampling,
            seed: new.seed,
            prompt_of: new.prompt_of,
            token_counts,
            num_scored: 0,
            num_preemptions: 0,
        }
    }

    /// Tokens generated so far.
    pub fn completion_tokens(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Times it was preempted.
    pub fn num_preemptions(&self) -> usize {
        self.num_preemptions
    }

    /// Tokens that are being sampled by steps in flight. A row that computes the last token samples the next, so whatever is
    /// planned from the last known token on is one of them.
    pub(super) fn num_sampling(&self) -> usize {
        (self.num_planned + 1).saturating_sub(self.tokens.len())
    }

    /// Prompt, everything generated, and what is being sampled.
    pub(super) fn num_tokens(&self) -> usize {
        self.tokens.len() + self.num_sampling()
    }

    /// Tokens that have no keys and values once the steps in flight are done: at least the newest one.
    pub(super) fn num_missing(&self) -> usize {
        self.num_tokens() - self.num_planned
    }

    /// Whether the next step can be planned now. While its newest token is being sampled, a sequence waits for it where
    /// it is known to be the last, or where choosing the one after it takes the host.
    pub(super) fn is_plannable(&self) -> bool {
        let known_to_end = self.num_tokens() - self.prompt_len >= self.sampling.max_tokens;
        // Penalties count the tokens of the output.
        self.num_sampling() == 0 || !(known_to_end || self.sampling.has_penalties())
    }

    pub(super) fn stage(&self) -> Stage {
        match self.place {
            Place::Queue => Stage::Queued,
            Place::Batch if self.tokens.len() - self.num_computed > 1 || self.completion_tokens() == 0 => {
                Stage::Prefill
            }
            Place::Batch => Stage::Decode,
        }
    }

    /// Appends a generated token.
    pub(super) fn push(&mut self, token: TokenId) {
        self.tokens.push(token);
        if self.sampling.has_penalties() {
            *self.token_counts.entry(token).or_insert(0) += 1;
        }
    }

    /// Back to the queue with nothing computed; never while a step in flight contains it. Its tokens stay, and so does what its client has seen.
    pub(super) fn preempt(&mut self) {
        self.table.release();
        self.place = Place::Queue;
        (self.num_computed, self.num_planned) = (0, 0);
        self.num_preemptions += 1;
        // The blocks it once shared may be gone; it can compute its prompt itself.
        self.prompt_of = None;
    }
}
