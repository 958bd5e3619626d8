//! What the engine is at, for whoever watches.

use std::{collections::VecDeque, time::Instant};

use super::Core;
use crate::{
    activity::{AbortCause, ActiveRow, Activity, BlockMap, PastAbort, Waiter},
    output::AbortReceipt,
    scheduler::WaitingRow,
};

/// The aborts that happened last.
#[derive(Debug, Default)]
pub(super) struct PastAborts {
    /// Oldest first.
    newest: VecDeque<(AbortCause, AbortReceipt, Instant)>,
    /// All that ever happened.
    count: u64,
}

impl PastAborts {
    pub(super) fn push(&mut self, cause: AbortCause, receipt: AbortReceipt, at: Instant) {
        if self.newest.len() == Activity::MAX_ABORTS {
            self.newest.pop_front();
        }
        self.newest.push_back((cause, receipt, at));
        self.count += 1;
    }
}

impl Core {
    /// How things stand.
    pub(super) fn activity(&self, now: Instant) -> Activity {
        let mut blocks = self.pool.map();
        let mut rows = Vec::with_capacity(self.scheduler.num_running().min(Activity::MAX_ROWS));
        for row in self.scheduler.rows().take(Activity::MAX_ROWS) {
            let Some((id, index)) = self.ledger.name(row.seq) else { continue };
            // Rows are few: the sum fits.
            let cell = BlockMap::FIRST_ROW + rows.len() as u16;
            for block in row.blocks {
                let at = &mut blocks.cells[block.0 as usize / blocks.blocks_per_cell];
                if *at < BlockMap::FIRST_ROW {
                    *at = cell;
                }
            }
            rows.push(ActiveRow {
                id: id.clone(),
                index,
                stage: row.stage,
                prompt_tokens: row.prompt_tokens,
                computed_tokens: row.computed_tokens,
                completion_tokens: row.completion_tokens,
                kv_blocks: row.blocks.len(),
            });
        }
        Activity {
            steps: self.counters.steps,
            uptime: self.stats.since_start(now),
            max_num_seqs: self.scheduler.max_num_seqs(),
            rows_left_out: self.scheduler.num_running() - rows.len(),
            rows,
            num_waiting: self.scheduler.num_waiting(),
            waiting: self.first_waiting(),
            blocks,
            aborts: self.aborts(),
        }
    }

    fn first_waiting(&self) -> Vec<Waiter> {
        let waiter = |row: WaitingRow| {
            let (id, index) = self.ledger.name(row.seq)?;
            Some(Waiter {
                id: id.clone(),
                index,
                prompt_tokens: row.prompt_tokens,
                completion_tokens: row.completion_tokens,
                is_resumed: row.is_resumed,
            })
        };
        self.scheduler.first_waiting(Activity::MAX_WAITING).filter_map(waiter).collect()
    }

    fn aborts(&self) -> Vec<PastAbort> {
        let first = self.past_aborts.count - self.past_aborts.newest.len() as u64;
        let numbered = (first..).zip(&self.past_aborts.newest);
        let past = |(number, (cause, receipt, at)): (u64, &(AbortCause, AbortReceipt, Instant))| PastAbort {
            number,
            at: self.stats.since_start(*at),
            cause: *cause,
            receipt: receipt.clone(),
        };
        numbered.map(past).collect()
    }
}
