//! Why a request waits.

use std::time::Instant;

use super::Core;
use crate::{
    explain::{Explanation, RequestState},
    ids::RequestId,
    scheduler::{Stage, Standing},
};

impl Core {
    /// What is known of a request, live or ended not long ago.
    pub(super) fn explain(&mut self, id: &RequestId, now: Instant) -> Option<Explanation> {
        let (mut explanation, seqs) = self.ledger.explain(id)?;
        let standings: Vec<_> = seqs.into_iter().filter_map(|seq| self.scheduler.explain(seq)).collect();
        // The furthest of its completions says where the request is.
        let Some(furthest) = standings.iter().max_by_key(|standing| progress(standing)) else {
            return Some(explanation);
        };
        if explanation.state != RequestState::Parked {
            explanation.state = state(furthest);
        }
        explanation.waits_for = furthest.waits_for;
        if explanation.state == RequestState::Queued {
            explanation.ahead = furthest.ahead;
            explanation.predicted_wait = self.admission.predict(furthest.ahead, now);
        }
        explanation.kv_blocks = standings.iter().map(|standing| standing.kv_blocks).sum();
        explanation.num_preemptions = standings.iter().map(|standing| standing.num_preemptions).sum();
        Some(explanation)
    }
}

fn progress(standing: &Standing) -> (Stage, bool, usize) {
    (standing.stage, standing.is_preempted, standing.completion_tokens)
}

fn state(standing: &Standing) -> RequestState {
    match standing.stage {
        _ if standing.is_preempted => RequestState::Preempted,
        Stage::Queued => RequestState::Queued,
        Stage::Prefill => RequestState::Prefill,
        Stage::Decode => RequestState::Decode,
    }
}
