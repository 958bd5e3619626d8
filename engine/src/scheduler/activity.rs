//! Who is in the batch and who waits, for whoever watches.

use super::{Scheduler, Stage};
use crate::ids::{BlockId, SeqId};

/// A sequence in the batch.
#[derive(Debug, Clone, Copy)]
pub struct BatchRow<'a> {
    /// Which.
    pub seq: SeqId,
    /// Where it is in its work.
    pub stage: Stage,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens whose keys and values are in its blocks.
    pub computed_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// Its blocks, in sequence order.
    pub blocks: &'a [BlockId],
}

/// A sequence in the queue.
#[derive(Debug, Clone, Copy)]
pub struct WaitingRow {
    /// Which.
    pub seq: SeqId,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated before it lost its row.
    pub completion_tokens: usize,
    /// It had a row before.
    pub is_resumed: bool,
}

impl Scheduler {
    /// Rows that the batch can have.
    pub fn max_num_seqs(&self) -> usize {
        self.limits.max_num_seqs
    }

    /// The batch, in order of rank.
    pub fn rows(&self) -> impl Iterator<Item = BatchRow<'_>> {
        let row = |&seq: &SeqId| {
            let known = self.seqs.get(&seq)?;
            Some(BatchRow {
                seq,
                stage: known.stage(),
                prompt_tokens: known.prompt_len,
                computed_tokens: known.num_computed,
                completion_tokens: known.completion_tokens(),
                blocks: known.table.ids(),
            })
        };
        self.running.iter().filter_map(row)
    }

    /// The first `count` of the queue, in the order in which they are served; under fair shares, where the order depends on what is served
    /// meanwhile, by arrival.
    pub fn first_waiting(&self, count: usize) -> impl Iterator<Item = WaitingRow> {
        let row = |id: SeqId| {
            let seq = self.seqs.get(&id)?;
            Some(WaitingRow {
                seq: id,
                prompt_tokens: seq.prompt_len,
                completion_tokens: seq.completion_tokens(),
                is_resumed: seq.turn.resumed,
            })
        };
        self.waiting.first(count).into_iter().filter_map(row)
    }
}
