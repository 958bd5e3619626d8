//! The engine at work, for the wire.

use tidemill_engine::{
    activity::{AbortCause, ActiveRow, Activity, BlockMap, PastAbort, Waiter},
    scheduler::Stage,
};
use tidemill_proto::v1;

use super::abort_response;

/// A reading of the batch, the queue, the blocks and the last aborts.
pub fn activity(activity: &Activity) -> v1::Activity {
    v1::Activity {
        steps_total: activity.steps,
        uptime_seconds: activity.uptime.as_secs_f64(),
        max_num_seqs: activity.max_num_seqs as u32,
        rows: activity.rows.iter().map(row).collect(),
        rows_left_out: activity.rows_left_out as u32,
        num_waiting: activity.num_waiting as u32,
        waiting: activity.waiting.iter().map(waiter).collect(),
        blocks: Some(block_map(&activity.blocks)),
        aborts: activity.aborts.iter().map(past_abort).collect(),
    }
}

fn row(row: &ActiveRow) -> v1::ActiveRow {
    let stage = match row.stage {
        Stage::Queued => v1::RequestState::Queued,
        Stage::Prefill => v1::RequestState::Prefill,
        Stage::Decode => v1::RequestState::Decode,
    };
    v1::ActiveRow {
        request_id: row.id.as_str().to_owned(),
        index: row.index,
        stage: stage.into(),
        prompt_tokens: row.prompt_tokens as u32,
        computed_tokens: row.computed_tokens as u32,
        completion_tokens: row.completion_tokens as u32,
        kv_blocks: row.kv_blocks as u32,
    }
}

fn waiter(waiter: &Waiter) -> v1::Waiter {
    v1::Waiter {
        request_id: waiter.id.as_str().to_owned(),
        index: waiter.index,
        prompt_tokens: waiter.prompt_tokens as u32,
        completion_tokens: waiter.completion_tokens as u32,
        is_resumed: waiter.is_resumed,
    }
}

fn block_map(map: &BlockMap) -> v1::BlockMap {
    v1::BlockMap {
        total: map.total as u32,
        blocks_per_cell: map.blocks_per_cell as u32,
        cells: map.cells.iter().map(|&cell| cell.into()).collect(),
    }
}

fn past_abort(past: &PastAbort) -> v1::PastAbort {
    let cause = match past.cause {
        AbortCause::Called => v1::AbortCause::Called,
        AbortCause::Dropped => v1::AbortCause::Dropped,
    };
    v1::PastAbort {
        number: past.number,
        at_uptime_seconds: past.at.as_secs_f64(),
        cause: cause.into(),
        receipt: Some(abort_response(&past.receipt)),
    }
}
