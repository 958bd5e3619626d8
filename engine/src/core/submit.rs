//! A request comes in.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Core, Submission};
use crate::{
    admission::Arrival, constraint::Constraint, error::RequestError, event::Event, ids::SeqId, kv::BlockHash,
    ledger::Opening, request::ValidatedRequest, sampling::Sampling, scheduler::NewSequence,
};

impl Core {
    pub(super) fn submit(&mut self, mut submission: Submission, now: Instant) {
        let request = &submission.request;
        let root = self.prefix_root(&submission);
        if let Err(error) = self.admit(request, root, now) {
            self.counters.refused += 1;
            // A receiver that is gone already will send its own Drop command.
            return drop(submission.events.try_send(Event::Failed(error)));
        }
        let constraints = std::mem::take(&mut submission.request.constraints);
        let request = &submission.request;
        debug_assert!(self.scheduler.fits(request.prompt.len(), request.sampling.max_tokens), "validated");
        self.counters.prompt_tokens += request.prompt.len() as u64;
        let n = u64::from(request.n);
        let seqs: Vec<SeqId> = (self.next_seq..self.next_seq + n).map(SeqId).collect();
        self.next_seq += n;
        for new in sequences(request, &seqs, root, constraints) {
            self.scheduler.add(new);
        }
        let Submission { ticket, request, events, unread, slot, submitted } = submission;
        let opening = Opening {
            ticket,
            id: request.id,
            events,
            unread,
            seqs,
            prompt_tokens: request.prompt.len(),
            priority: request.priority,
            tenant: request.tenant,
            trace_parent: request.trace_parent,
            submitted,
            deadline: request.deadline,
            queue_limit: self.admission.max_queue_time().and_then(|limit| submitted.checked_add(limit)),
            slot,
        };
        self.ledger.open(opening, now);
    }

    /// Who shares cached prefixes with whom: the same model, the same adapter, the same credential, the same salt.
    fn prefix_root(&self, submission: &Submission) -> BlockHash {
        let request = &submission.request;
        let adapter = request.adapter.as_ref().map(|adapter| adapter.id.0.to_string()).unwrap_or_default();
        let parts = [&*self.settings.model_name, &*adapter, &*request.credential, &*request.cache_salt];
        self.scheduler.prefix_root(&parts, submission.ticket.0)
    }

    /// Whether a request is let in.
    fn admit(&self, request: &ValidatedRequest, root: BlockHash, now: Instant) -> Result<(), RequestError> {
        if self.stats.is_draining() {
            return Err(RequestError::Draining);
        }
        if self.ledger.find(&request.id).is_some() {
            return Err(RequestError::DuplicateId(request.id.to_string()));
        }
        let ahead = self.scheduler.ahead_of_new(request.priority, &request.tenant);
        // Only a deadline asks what serving takes, and only behind others.
        let service = match request.deadline {
            Some(_) if ahead > 0 => self.least_service(request, root),
            _ => Duration::ZERO,
        };
        self.admission.judge(Arrival { ahead, service, deadline: request.deadline }, now)
    }

    /// What serving a request takes at least: its prompt but for what is cached, and then a step for each token that cannot be left out.
    fn least_service(&self, request: &ValidatedRequest, root: BlockHash) -> Duration {
        let sampling = &request.sampling;
        let may_end_early = !(sampling.stop_token_ids.is_empty()
            && sampling.eos_token_ids.is_empty()
            && request.stop.is_empty());
        let tokens = match request.constraints.is_empty() {
            true if may_end_early => sampling.min_tokens.max(1),
            true => sampling.max_tokens,
            // A form may be complete, and tokens may be forced, at any time.
            false => 1,
        };
        let prompt = &request.prompt;
        let computed_from = request.pooling.map_or(usize::MAX, |pooling| pooling.wanted(prompt.len()).start);
        let reusable = if request.is_whole { 0 } else { computed_from.min(prompt.len() - 1) };
        let cached = self.pool.table(root).probe(prompt, reusable, &[]).cached_tokens;
        let prefill = self.pacer.prefill_time(prompt.len() - cached);
        let step = self.pacer.step_time().unwrap_or(Duration::ZERO);
        prefill.saturating_add(step.saturating_mul(u32::try_from(tokens).unwrap_or(u32::MAX)))
    }
}

/// The sequences of a request. The first one reads the prompt for all, and reports it.
fn sequences(
    request: &ValidatedRequest,
    seqs: &[SeqId],
    root: BlockHash,
    constraints: Vec<Box<dyn Constraint>>,
) -> impl Iterator<Item = NewSequence> {
    let mut sampling = request.sampling.clone();
    let mut constraints = constraints.into_iter();
    let first = seqs.first().copied();
    (0..).zip(seqs).map(move |(index, &id)| {
        if index == 1 && sampling.prompt_logprobs.is_some() {
            sampling = Arc::new(Sampling { prompt_logprobs: None, ..(*sampling).clone() });
        }
        NewSequence {
            id,
            prompt: request.prompt.clone(),
            seed: sampling.seed_of(index),
            sampling: sampling.clone(),
            prompt_of: first.filter(|&first| first != id),
            priority: request.priority,
            tenant: request.tenant.clone(),
            pooling: request.pooling,
            is_whole: request.is_whole,
            segments: request.segments.clone(),
            root,
            adapter: request.adapter.clone(),
            constraint: constraints.next(),
        }
    })
}
