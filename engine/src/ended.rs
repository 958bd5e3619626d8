//! Requests that have ended, for whoever asks late and for whoever keeps records.

use std::collections::{HashMap, VecDeque};

use crate::{
    explain::{EndedLife, Explanation},
    ids::RequestId,
};

/// Ended requests that are remembered, so that a late abort can be answered with "finished".
const REMEMBERED: usize = 4096;
/// Of these, the newest whose lives are remembered.
const LIVES: usize = 1024;

/// The requests that ended last.
#[derive(Debug, Default)]
pub(crate) struct Ended {
    by_id: HashMap<RequestId, Remembered>,
    /// Oldest first. An id may have been used again since: its number tells.
    order: VecDeque<(RequestId, u64)>,
    next: u64,
    sink: Option<async_channel::Sender<EndedLife>>,
    /// Lives that found the sink full.
    lost: u64,
}

#[derive(Debug)]
struct Remembered {
    number: u64,
    completion_tokens: usize,
    life: Option<Box<Explanation>>,
}

impl Ended {
    pub(crate) fn new(sink: Option<async_channel::Sender<EndedLife>>) -> Self {
        Self { sink, ..Self::default() }
    }

    pub(crate) fn push(&mut self, life: EndedLife) {
        let explanation = match &self.sink {
            Some(sink) => {
                let kept = life.explanation.clone();
                // Records are a courtesy: service does not wait for whoever keeps them, and goes on without.
                self.lost += u64::from(sink.try_send(life).is_err_and(|error| error.is_full()));
                kept
            }
            None => life.explanation,
        };
        let (id, number) = (explanation.id.clone(), self.next);
        self.next += 1;
        let completion_tokens = explanation.completion_tokens;
        let remembered = Remembered { number, completion_tokens, life: Some(Box::new(explanation)) };
        self.by_id.insert(id.clone(), remembered);
        self.order.push_back((id, number));
        if let Some((id, number)) = self.order.len().checked_sub(LIVES + 1).map(|at| &self.order[at])
            && let Some(old) = self.by_id.get_mut(id).filter(|old| old.number == *number)
        {
            old.life = None;
        }
        if self.order.len() > REMEMBERED
            && let Some((id, number)) = self.order.pop_front()
            && self.by_id.get(&id).is_some_and(|old| old.number == number)
        {
            self.by_id.remove(&id);
        }
    }

    /// Tokens that an ended request had produced, if it is remembered.
    pub(crate) fn completion_tokens(&self, id: &RequestId) -> Option<usize> {
        self.by_id.get(id).map(|ended| ended.completion_tokens)
    }

    pub(crate) fn life(&self, id: &RequestId) -> Option<&Explanation> {
        self.by_id.get(id)?.life.as_deref()
    }

    pub(crate) fn lost(&self) -> u64 {
        self.lost
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::explain::RequestState;

    fn life(id: &str, completion_tokens: usize) -> EndedLife {
        let explanation = Explanation {
            id: RequestId::new(id),
            state: RequestState::Ended,
            waits_for: None,
            ahead: 0,
            predicted_wait: None,
            priority: 0,
            tenant: Default::default(),
            prompt_tokens: 1,
            cached_tokens: 0,
            completion_tokens,
            kv_blocks: 0,
            num_preemptions: 0,
            life: Vec::new(),
            events_left_out: 0,
        };
        EndedLife { submitted: Instant::now(), trace_parent: None, explanation }
    }

    #[test]
    fn memory_is_bounded_and_the_newest_use_of_an_id_counts() {
        let mut ended = Ended::default();
        ended.push(life("again", 1));
        (0..REMEMBERED - 1).for_each(|n| ended.push(life(&n.to_string(), 0)));
        ended.push(life("again", 2));
        let again = RequestId::new("again");
        assert_eq!(ended.completion_tokens(&again), Some(2), "the first one was forgotten, not the second");
        assert_eq!((ended.by_id.len(), ended.order.len()), (REMEMBERED, REMEMBERED));
        assert_eq!(ended.by_id.values().filter(|old| old.life.is_some()).count(), LIVES);
        assert!(ended.life(&again).is_some() && ended.life(&RequestId::new("0")).is_none());
        (0..REMEMBERED).for_each(|n| ended.push(life(&format!("new {n}"), 0)));
        assert_eq!((ended.completion_tokens(&again), ended.by_id.len()), (None, REMEMBERED));
    }

    #[test]
    fn a_sink_that_lags_loses_lives_and_nobody_waits() {
        let (sink, lives) = async_channel::bounded(1);
        let mut ended = Ended::new(Some(sink));
        ["a", "b", "c"].into_iter().for_each(|id| ended.push(life(id, 7)));
        assert_eq!(ended.lost(), 2);
        assert_eq!(lives.try_recv().unwrap().explanation.id, RequestId::new("a"));
        drop(lives);
        ended.push(life("d", 7));
        assert_eq!(ended.lost(), 2, "nobody keeps records any more: nothing is lost");
    }
}
