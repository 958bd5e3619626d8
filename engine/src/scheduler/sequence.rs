//! A sequence: one completion of one request, as the scheduler sees it.

use std::{collections::BTreeMap, sync::Arc};

use super::{Stage, form::Form, waiting::Turn};
use crate::{
    adapter::{Adapter, AdapterSlot},
    constraint::Constraint,
    ids::{SeqId, TenantId, TokenId},
    kv::{BlockHash, BlockTable},
    output::{FinishReason, MatchedStop},
    planted::{Bug, planted},
    pooling::{Pooler, Pooling},
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
    /// An older completion of the same request, which reads the prompt for this one too.
    pub prompt_of: Option<SeqId>,
    /// Under [`Policy::Priority`](super::Policy): lower is served first.
    pub priority: i32,
    /// Under [`Policy::Fair`](super::Policy): who shares with whom.
    pub tenant: TenantId,
    /// What it is to give instead of tokens; then `sampling` is [`Sampling::of_embedding`].
    pub pooling: Option<Pooling>,
    /// Its tokens see each other in both directions, as in encoders: all of them are computed in one step, and nobody else can use what
    /// that gives. No more of them than a step has.
    pub is_whole: bool,
    /// Segment of each token of the prompt; none: all are 0.
    pub segments: Option<Arc<[u32]>>,
    /// The beginning of its chain of blocks: only sequences of the same beginning share
    /// ([`BlockPool::prefix_root`](crate::kv::BlockPool::prefix_root)).
    pub root: BlockHash,
    /// What changes the model for it.
    pub adapter: Option<Adapter>,
    /// What its tokens may be.
    pub constraint: Option<Box<dyn Constraint>>,
}

/// Where a live sequence is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Another completion of its request reads the prompt for it.
    Held,
    Queue,
    Batch,
    /// Its client does not read; it comes to the queue when it does.
    Parked,
}

/// A live sequence.
#[derive(Debug)]
pub struct Sequence {
    pub(super) place: Place,
    pub(super) turn: Turn,
    /// To be parked: at once, or as soon as no step in flight contains it.
    pub(super) is_unread: bool,
    /// Prompt, then everything generated.
    pub(super) tokens: Vec<TokenId>,
    pub(super) prompt_len: usize,
    /// Where the newest tokens begin that came at once: one that was chosen, and those that it forced. Whoever misses no others generates.
    pub(super) newest: usize,
    /// Tokens whose keys and values are in `table`'s blocks.
    pub(super) num_computed: usize,
    /// The same once the steps in flight are done: the next step starts here.
    pub(super) num_planned: usize,
    /// The row of logits from which the newest step that samples for this sequence chooses its token.
    pub(super) sampled_at: u32,
    pub(super) table: BlockTable,
    pub(super) sampling: Arc<Sampling>,
    pub(super) seed: u64,
    /// Completions of the same request that are [held](Place::Held) until this one has read the prompt.
    pub(super) held: Vec<SeqId>,
    /// Occurrences in the output of every token of prompt and output; kept only when a penalty asks for it.
    pub(super) token_counts: BTreeMap<TokenId, u32>,
    /// Prompt positions whose log-probabilities were handed out: a recomputation does not repeat them.
    pub(super) num_scored: usize,
    /// The hidden states so far of a sequence that gives an embedding.
    pub(super) pooler: Option<Pooler>,
    /// See [`NewSequence::is_whole`].
    pub(super) is_whole: bool,
    /// See [`NewSequence::segments`].
    pub(super) segments: Option<Arc<[u32]>>,
    pub(super) num_preemptions: usize,
    pub(super) adapter: Option<Adapter>,
    /// Where its adapter is while it is in the batch.
    pub(super) slot: Option<AdapterSlot>,
    /// What its tokens may be.
    pub(super) form: Option<Form>,
}

impl Sequence {
    pub(super) fn new(new: NewSequence, table: BlockTable) -> Self {
        let mut token_counts = BTreeMap::new();
        if new.sampling.has_penalties() {
            token_counts.extend(new.prompt.iter().map(|&token| (token, 0)));
        }
        // Room for the whole of it: a growing one would allocate in the midst of decoding.
        let mut tokens = Vec::with_capacity(new.prompt.len() + new.sampling.max_tokens);
        tokens.extend_from_slice(&new.prompt);
        Self {
            place: Place::Queue,
            turn: Turn { id: new.id, priority: new.priority, tenant: new.tenant, resumed: false },
            is_unread: false,
            tokens,
            prompt_len: new.prompt.len(),
            newest: new.prompt.len(),
            num_computed: 0,
            num_planned: 0,
            sampled_at: 0,
            table,
            sampling: new.sampling,
            seed: new.seed,
            held: Vec::new(),
            token_counts,
            num_scored: 0,
            pooler: new.pooling.map(|pooling| Pooler::new(pooling, new.prompt.len())),
            is_whole: new.is_whole,
            segments: new.segments,
            num_preemptions: 0,
            adapter: new.adapter,
            slot: None,
            form: new.constraint.map(Form::new),
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
        // Penalties count the tokens of the output, and a constraint must see them.
        let needs_host = (self.sampling.has_penalties() && !planted(Bug::StalePenalties))
            || !(self.may_sample_unseen() || planted(Bug::StaleForm));
        let is_read = !self.is_unread || planted(Bug::ParkedGoesOn);
        is_read && (self.num_sampling() == 0 || !(known_to_end || needs_host))
    }

    /// Whether its constraint, if it has one, lets any token come behind those that are being sampled, whatever these are.
    pub(super) fn may_sample_unseen(&self) -> bool {
        self.form.as_ref().is_none_or(|form| form.allowed.is_free_behind(self.num_sampling()))
    }

    /// Whether it generates: it misses its newest tokens alone. Others read a prompt, or again what they had before a preemption.
    pub(super) fn generates(&self) -> bool {
        self.num_missing() == 1 || self.num_planned >= self.newest
    }

    /// Whether its prompt is in the KV cache, for others to share. In flight is not enough: if that row fails, nobody has written the
    /// blocks.
    pub(super) fn has_prompt(&self) -> bool {
        self.num_computed >= self.prompt_len
    }

    /// Whether a step in flight contains it.
    pub(super) fn is_in_flight(&self) -> bool {
        self.num_planned > self.num_computed
    }

    /// Tokens of its beginning that may be taken from the prefix cache: the last one is computed, because its logits choose the next, and so
    /// is every position whose logits or hidden state are still to be reported.
    pub(super) fn reusable(&self) -> usize {
        if self.is_whole {
            return 0;
        }
        let unscored = self.sampling.prompt_logprobs.is_some() && self.num_scored + 1 < self.prompt_len;
        let scored = match unscored && !planted(Bug::ScoresSkipped) {
            true => self.num_scored,
            false => usize::MAX,
        };
        let pooled = self.pooler.as_ref().filter(|_| !planted(Bug::StatesSkipped));
        let pooled = pooled.map_or(usize::MAX, Pooler::reusable);
        (self.tokens.len() - 1).min(scored).min(pooled)
    }

    pub(super) fn stage(&self) -> Stage {
        match self.place {
            Place::Held | Place::Queue | Place::Parked => Stage::Queued,
            Place::Batch if self.num_computed < self.newest || self.completion_tokens() == 0 => {
                Stage::Prefill
            }
            Place::Batch => Stage::Decode,
        }
    }

    /// Notes that so many of its tokens are in the KV cache; full blocks can be found by others from now on, unless what is in them owes to
    /// tokens behind them.
    pub(super) fn computed(&mut self, tokens: usize) {
        self.num_computed = tokens;
        if self.is_whole && !planted(Bug::WholeShared) {
            return;
        }
        let full = if planted(Bug::PartialBlock) { self.tokens.len() } else { tokens };
        self.table.register(&self.tokens[..full]);
    }

    /// Why a token ends the sequence as its `number`th, if it does by what it is.
    pub(super) fn stop_at(
        &self,
        token: TokenId,
        number: usize,
    ) -> Option<(FinishReason, Option<MatchedStop>)> {
        let sampling = &self.sampling;
        if number < sampling.min_tokens {
            None
        } else if sampling.stop_token_ids.contains(&token) {
            Some((FinishReason::Stop, Some(MatchedStop::Token(token))))
        } else if sampling.eos_token_ids.contains(&token) {
            Some((FinishReason::Stop, None))
        } else {
            None
        }
    }

    /// Appends a generated token.
    pub(super) fn push(&mut self, token: TokenId) {
        self.tokens.push(token);
        if self.sampling.has_penalties() {
            *self.token_counts.entry(token).or_insert(0) += 1;
        }
    }

    /// Gives its blocks and its row up; never while a step in flight contains it. Its tokens stay, and so does what its client has seen.
    pub(super) fn release(&mut self, place: Place) -> usize {
        self.place = place;
        self.turn.resumed = !planted(Bug::PreemptedLosesTurn);
        self.slot = None;
        (self.num_computed, self.num_planned) = (0, 0);
        self.table.release()
    }
}
