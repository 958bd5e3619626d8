//! A life as intervals: what a request was doing when.

use std::{collections::BTreeMap, time::Duration};

use tidemill_engine::explain::{Life, LifeEvent};

/// What a completion is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StageKind {
    /// It waits for a row.
    Queue,
    /// Its prompt is being read.
    Prefill,
    /// It generates, or what it had generated is being read again.
    Decode,
    /// It lost its blocks and waits for new ones.
    Preempted,
    /// Its client does not read.
    Parked,
}

impl StageKind {
    /// Its name in traces.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Preempted => "preempted",
            Self::Parked => "parked",
        }
    }
}

/// An interval of one completion's life. Times count from the request's submission.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// What it was doing.
    pub kind: StageKind,
    /// Which completion.
    pub index: u32,
    /// Beginning.
    pub from: Duration,
    /// End.
    pub to: Duration,
    /// Tokens found in the prefix cache, where the stage began with a look into it.
    pub cached_tokens: Option<usize>,
    /// Parts of the prompt that were read in it.
    pub chunks: Vec<Chunk>,
}

/// A part of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// When.
    pub at: Duration,
    /// Tokens of the part.
    pub tokens: usize,
    /// Tokens that are in the KV cache after it.
    pub computed: usize,
}

/// The intervals of an ended life, completion by completion in the order of time. Where the middle of a long life was left out, an
/// interval goes on until the next event that is known.
pub fn stages(life: &[LifeEvent]) -> Vec<Stage> {
    let ended = life.iter().map(|event| event.at).max().unwrap_or_default();
    let mut completions: BTreeMap<u32, Completion> = BTreeMap::new();
    for event in life {
        completions.entry(event.index).or_insert_with(|| Completion::new(event.index));
        // The stream is one, so its reader stops all completions.
        let all = matches!(event.what, Life::Parked | Life::Unparked);
        let concerned = completions.values_mut().filter(|completion| all || completion.index == event.index);
        concerned.for_each(|completion| completion.take(event));
    }
    completions.into_values().flat_map(|completion| completion.end(ended)).collect()
}

/// Time that the completion that took longest spent in stages of this kind.
pub fn time_in(stages: &[Stage], kind: StageKind) -> Duration {
    let mut sums: BTreeMap<u32, Duration> = BTreeMap::new();
    for stage in stages.iter().filter(|stage| stage.kind == kind) {
        *sums.entry(stage.index).or_default() += stage.to.saturating_sub(stage.from);
    }
    sums.into_values().max().unwrap_or_default()
}

/// One completion, event by event.
struct Completion {
    index: u32,
    done: Vec<Stage>,
    /// Nothing once it has ended.
    open: Option<Stage>,
    gave_token: bool,
}

impl Completion {
    /// All completions wait from the submission on.
    fn new(index: u32) -> Self {
        let open = Some(Self::stage(index, StageKind::Queue, Duration::ZERO, None));
        Self { index, done: Vec::new(), open, gave_token: false }
    }

    fn stage(index: u32, kind: StageKind, from: Duration, cached_tokens: Option<usize>) -> Stage {
        Stage { kind, index, from, to: from, cached_tokens, chunks: Vec::new() }
    }

    fn take(&mut self, event: &LifeEvent) {
        let running = if self.gave_token { StageKind::Decode } else { StageKind::Prefill };
        match event.what {
            Life::Queued => {}
            Life::Admitted { cached_tokens } | Life::Resumed { cached_tokens } => {
                self.turn_to(running, event.at, Some(cached_tokens));
            }
            Life::Chunk { tokens, computed } => {
                if let Some(open) = &mut self.open {
                    open.chunks.push(Chunk { at: event.at, tokens, computed });
                }
            }
            Life::FirstToken => {
                self.gave_token = true;
                self.turn_to(StageKind::Decode, event.at, None);
            }
            Life::Preempted => self.turn_to(StageKind::Preempted, event.at, None),
            Life::Parked => self.turn_to(StageKind::Parked, event.at, None),
            Life::Unparked => self.turn_to(StageKind::Queue, event.at, None),
            Life::Finished(_) | Life::Failed(_) | Life::Dropped => self.close(event.at),
        }
    }

    fn turn_to(&mut self, kind: StageKind, at: Duration, cached_tokens: Option<usize>) {
        if self.open.is_some() {
            self.close(at);
            self.open = Some(Self::stage(self.index, kind, at, cached_tokens));
        }
    }

    fn close(&mut self, at: Duration) {
        if let Some(mut stage) = self.open.take() {
            stage.to = at.max(stage.from);
            self.done.push(stage);
        }
    }

    fn end(mut self, at: Duration) -> Vec<Stage> {
        self.close(at);
        self.done
    }
}

#[cfg(test)]
mod tests {
    use tidemill_engine::{ErrorCode, output::FinishReason};

    use super::*;

    fn life(events: &[(u64, u32, Life)]) -> Vec<LifeEvent> {
        events
            .iter()
            .map(|&(ms, index, what)| LifeEvent { at: Duration::from_millis(ms), index, what })
            .collect()
    }

    fn shape(stages: &[Stage]) -> Vec<(&'static str, u32, u128, u128)> {
        stages.iter().map(|s| (s.kind.name(), s.index, s.from.as_millis(), s.to.as_millis())).collect()
    }

    #[test]
    fn a_plain_life_is_queue_prefill_decode_with_chunks_where_they_were_read() {
        let stages = stages(&life(&[
            (0, 0, Life::Queued),
            (10, 0, Life::Admitted { cached_tokens: 16 }),
            (12, 0, Life::Chunk { tokens: 64, computed: 80 }),
            (15, 0, Life::Chunk { tokens: 20, computed: 100 }),
            (20, 0, Life::FirstToken),
            (50, 0, Life::Finished(FinishReason::Stop)),
        ]));
        assert_eq!(shape(&stages), [("queue", 0, 0, 10), ("prefill", 0, 10, 20), ("decode", 0, 20, 50)]);
        assert_eq!((stages[1].cached_tokens, stages[1].chunks.len()), (Some(16), 2));
        assert_eq!(stages[1].chunks[1], Chunk { at: Duration::from_millis(15), tokens: 20, computed: 100 });
    }

    #[test]
    fn preempted_and_parked_intervals_stand_between_those_of_work() {
        let stages = stages(&life(&[
            (0, 0, Life::Queued),
            (1, 0, Life::Admitted { cached_tokens: 0 }),
            (2, 0, Life::Preempted),
            (5, 0, Life::Resumed { cached_tokens: 0 }),
            (9, 0, Life::FirstToken),
            (10, 0, Life::Parked),
            (30, 0, Life::Unparked),
            (34, 0, Life::Resumed { cached_tokens: 32 }),
            (40, 0, Life::Failed(ErrorCode::DeadlineExceeded)),
        ]));
        let expected = [
            ("queue", 0, 0, 1),
            ("prefill", 0, 1, 2),
            ("preempted", 0, 2, 5),
            ("prefill", 0, 5, 9),
            ("decode", 0, 9, 10),
            ("parked", 0, 10, 30),
            ("queue", 0, 30, 34),
            ("decode", 0, 34, 40),
        ];
        assert_eq!(shape(&stages), expected);
        assert_eq!(time_in(&stages, StageKind::Prefill), Duration::from_millis(5));
    }

    #[test]
    fn completions_have_their_own_intervals_and_an_end_of_all_closes_them() {
        let stages = stages(&life(&[
            (0, 0, Life::Queued),
            (1, 0, Life::Admitted { cached_tokens: 0 }),
            (2, 0, Life::FirstToken),
            (3, 1, Life::Admitted { cached_tokens: 16 }),
            (4, 1, Life::FirstToken),
            (6, 0, Life::Finished(FinishReason::Stop)),
            (9, 0, Life::Dropped),
        ]));
        let expected = [
            ("queue", 0, 0, 1),
            ("prefill", 0, 1, 2),
            ("decode", 0, 2, 6),
            ("queue", 1, 0, 3),
            ("prefill", 1, 3, 4),
            ("decode", 1, 4, 9),
        ];
        assert_eq!(shape(&stages), expected);
        assert_eq!(time_in(&stages, StageKind::Decode), Duration::from_millis(5), "of the longest");
    }

    #[test]
    fn a_stream_that_is_not_read_parks_all_completions_that_still_run() {
        let stages = stages(&life(&[
            (0, 0, Life::Queued),
            (1, 0, Life::FirstToken),
            (1, 1, Life::FirstToken),
            (1, 2, Life::FirstToken),
            (2, 2, Life::Finished(FinishReason::Stop)),
            (3, 0, Life::Parked),
            (8, 0, Life::Unparked),
            (9, 1, Life::Dropped),
        ]));
        for index in [0, 1] {
            let parked = ("parked", index, 3, 8);
            assert!(shape(&stages).contains(&parked), "{stages:?}");
        }
        let last = shape(&stages).into_iter().rfind(|stage| stage.1 == 2);
        assert_eq!(last, Some(("decode", 2, 1, 2)), "it had ended");
    }

    #[test]
    fn a_request_that_never_ran_only_waited() {
        let stages = stages(&life(&[(0, 0, Life::Queued), (7, 0, Life::Dropped)]));
        assert_eq!(shape(&stages), [("queue", 0, 0, 7)]);
        assert_eq!(time_in(&stages, StageKind::Decode), Duration::ZERO);
    }
}
