//! The engine at work, from the wire.

use tidemill_engine::{
    activity::{AbortCause, ActiveRow, Activity, BlockMap, PastAbort, Waiter},
    ids::RequestId,
    scheduler::Stage,
};
use tidemill_proto::v1;

use super::{abort_receipt, duration, malformed};
use crate::client::CallError;

/// A reading of the batch, the queue, the blocks and the last aborts.
///
/// # Errors
/// For what no engine of this protocol sends.
pub fn activity(activity: v1::Activity) -> Result<Activity, CallError> {
    let v1::Activity {
        steps_total,
        uptime_seconds,
        max_num_seqs,
        rows,
        rows_left_out,
        num_waiting,
        waiting,
        blocks,
        aborts,
    } = activity;
    Ok(Activity {
        steps: steps_total,
        uptime: duration(uptime_seconds)?,
        max_num_seqs: max_num_seqs as usize,
        rows: rows.into_iter().map(row).collect::<Result<_, _>>()?,
        rows_left_out: rows_left_out as usize,
        num_waiting: num_waiting as usize,
        waiting: waiting.into_iter().map(waiter).collect(),
        blocks: block_map(blocks.unwrap_or_default())?,
        aborts: aborts.into_iter().map(past_abort).collect::<Result<_, _>>()?,
    })
}

fn row(row: v1::ActiveRow) -> Result<ActiveRow, CallError> {
    let stage = match row.stage() {
        v1::RequestState::Queued => Stage::Queued,
        v1::RequestState::Prefill => Stage::Prefill,
        v1::RequestState::Decode => Stage::Decode,
        _ => return Err(malformed("the stage of a row")),
    };
    let v1::ActiveRow {
        request_id,
        index,
        stage: _,
        prompt_tokens,
        computed_tokens,
        completion_tokens,
        kv_blocks,
    } = row;
    Ok(ActiveRow {
        id: RequestId::new(request_id),
        index,
        stage,
        prompt_tokens: prompt_tokens as usize,
        computed_tokens: computed_tokens as usize,
        completion_tokens: completion_tokens as usize,
        kv_blocks: kv_blocks as usize,
    })
}

fn waiter(waiter: v1::Waiter) -> Waiter {
    let v1::Waiter { request_id, index, prompt_tokens, completion_tokens, is_resumed } = waiter;
    Waiter {
        id: RequestId::new(request_id),
        index,
        prompt_tokens: prompt_tokens as usize,
        completion_tokens: completion_tokens as usize,
        is_resumed,
    }
}

fn block_map(map: v1::BlockMap) -> Result<BlockMap, CallError> {
    let v1::BlockMap { total, blocks_per_cell, cells } = map;
    let cell = |cell: u32| u16::try_from(cell).map_err(|_| malformed("a cell of the block map"));
    Ok(BlockMap {
        total: total as usize,
        blocks_per_cell: blocks_per_cell as usize,
        cells: cells.into_iter().map(cell).collect::<Result<_, _>>()?,
    })
}

fn past_abort(past: v1::PastAbort) -> Result<PastAbort, CallError> {
    let cause = match past.cause() {
        v1::AbortCause::Called => AbortCause::Called,
        v1::AbortCause::Dropped => AbortCause::Dropped,
        v1::AbortCause::Unspecified => return Err(malformed("the cause of an abort")),
    };
    let v1::PastAbort { number, at_uptime_seconds, cause: _, receipt } = past;
    Ok(PastAbort {
        number,
        at: duration(at_uptime_seconds)?,
        cause,
        receipt: abort_receipt(receipt.ok_or_else(|| malformed("an abort without its receipt"))?)?,
    })
}
