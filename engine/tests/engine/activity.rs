//! What whoever watches the engine sees of it.

use tidemill_engine::{
    activity::{AbortCause, Activity, BlockMap},
    ids::RequestId,
    output::AbortStage,
    scheduler::Stage,
};

use crate::rig::{BLOCKS, Bench, block_on, collect, eventually, request, submit};

const FIRST: u16 = BlockMap::FIRST_ROW;

fn activity(bench: &Bench) -> Activity {
    block_on(bench.handle().activity()).unwrap()
}

fn count(map: &BlockMap, state: u16) -> usize {
    map.cells.iter().filter(|&&cell| cell == state).count()
}

#[test]
fn an_idle_engine_shows_an_empty_batch_and_free_blocks() {
    let bench = Bench::new();
    let idle = activity(&bench);
    assert_eq!((idle.steps, idle.max_num_seqs, idle.rows_left_out, idle.num_waiting), (0, 2, 0, 0));
    assert!(idle.rows.is_empty() && idle.waiting.is_empty() && idle.aborts.is_empty(), "{idle:?}");
    let cells = vec![BlockMap::FREE; BLOCKS];
    assert_eq!(idle.blocks, BlockMap { total: BLOCKS, blocks_per_cell: 1, cells });
}

#[test]
fn rows_blocks_and_queue_are_seen_at_every_stage() {
    let bench = Bench::looking_ahead(false);
    let handle = bench.handle();
    let prompt: Vec<u32> = (1..=12).collect();
    let a = submit(&handle, request("a", &prompt, 3));
    bench.step_started();
    let others: Vec<_> = ["b", "c", "d"].map(|id| submit(&handle, request(id, &[1, 2], 30))).into();

    let prefill = activity(&bench);
    assert_eq!(prefill.rows.len(), 1);
    let row = &prefill.rows[0];
    assert_eq!((row.id.as_str(), row.index, row.stage), ("a", 0, Stage::Prefill));
    assert_eq!((row.prompt_tokens, row.computed_tokens, row.completion_tokens), (12, 0, 0));
    assert_eq!((row.kv_blocks, count(&prefill.blocks, FIRST)), (3, 3));
    assert_eq!(count(&prefill.blocks, BlockMap::FREE), BLOCKS - 3);
    let waiting: Vec<_> = prefill.waiting.iter().map(|waiter| waiter.id.as_str()).collect();
    assert_eq!((prefill.num_waiting, waiting), (3, vec!["b", "c", "d"]));
    assert_eq!((prefill.waiting[0].prompt_tokens, prefill.waiting[0].is_resumed), (2, false));

    for _ in 0..2 {
        bench.finish_step();
        bench.step_started();
    }
    let decode = activity(&bench);
    let row = &decode.rows[0];
    assert_eq!((row.stage, row.computed_tokens, row.completion_tokens), (Stage::Decode, 12, 1));
    assert_eq!((decode.steps, decode.rows.len(), decode.num_waiting), (2, 2, 2));
    let held = decode.rows.iter().map(|row| row.kv_blocks);
    let drawn = [FIRST, FIRST + 1].map(|cell| count(&decode.blocks, cell));
    assert_eq!(held.collect::<Vec<_>>(), drawn, "each row's blocks in its colour");

    bench.finish_steps(2);
    collect(a).unwrap();
    eventually("the next has its row", || {
        activity(&bench).rows.last().is_some_and(|row| row.id.as_str() == "c")
    });
    let after = activity(&bench);
    assert_eq!(count(&after.blocks, BlockMap::CACHED), 3, "the full blocks of the first are kept");
    drop(others);
}

#[test]
fn a_shared_block_is_drawn_as_the_first_rows() {
    let bench = Bench::looking_ahead(false);
    let handle = bench.handle();
    let mut asked = request("twins", &[1, 2, 3, 4, 5], 9);
    asked.sampling.n = Some(2);
    let twins = submit(&handle, asked);
    for _ in 0..3 {
        bench.step_started();
        bench.finish_step();
    }
    bench.step_started();
    let both = activity(&bench);
    let named: Vec<_> = both.rows.iter().map(|row| (row.id.as_str(), row.index)).collect();
    assert_eq!(named, [("twins", 0), ("twins", 1)]);
    let (first, second) = (count(&both.blocks, FIRST), count(&both.blocks, FIRST + 1));
    assert_eq!((first, second + 1), (both.rows[0].kv_blocks, both.rows[1].kv_blocks));
    drop(twins);
}

#[test]
fn aborts_and_dropped_streams_leave_receipts() {
    let bench = Bench::looking_ahead(false);
    let handle = bench.handle();
    let dropped = submit(&handle, request("dropped", &[1, 2, 3, 4, 5], 40));
    bench.step_started();
    let queued = submit(&handle, request("queued", &[1, 2], 40));
    let receipt = handle.abort_blocking(RequestId::new("queued")).unwrap();
    handle.abort_blocking(RequestId::new("queued")).unwrap();
    handle.abort_blocking(RequestId::new("nobody")).unwrap();
    drop(dropped);
    let seen = activity(&bench);
    let told: Vec<_> = seen.aborts.iter().map(|past| (past.number, past.cause)).collect();
    assert_eq!(told, [(0, AbortCause::Called), (1, AbortCause::Dropped)], "what freed nothing is not there");
    assert_eq!(seen.aborts[0].receipt, receipt);
    let receipt = &seen.aborts[1].receipt;
    assert_eq!((receipt.id.as_str(), receipt.stage), ("dropped", AbortStage::Prefill));
    assert_eq!((receipt.blocks_freed, receipt.rows_freed), (2, 1));
    assert!(seen.aborts[0].at <= seen.aborts[1].at && seen.aborts[1].at <= seen.uptime);
    assert_eq!(count(&seen.blocks, BlockMap::FREE), BLOCKS);
    // A dropped stream is an abort like any other.
    eventually("both are counted and measured", || {
        let stats = handle.stats();
        let measured: u64 = stats.histograms.abort_to_free.counts.iter().sum();
        (stats.counters.aborted, measured) == (2, 2)
    });
    drop(queued);
}

#[test]
fn the_newest_aborts_are_kept() {
    let bench = Bench::looking_ahead(false);
    let handle = bench.handle();
    let running = submit(&handle, request("running", &[1], 40));
    bench.step_started();
    for number in 0..40 {
        drop(submit(&handle, request(&number.to_string(), &[1, 2], 4)));
        eventually("its place is free", || activity(&bench).num_waiting == 0);
    }
    let numbers: Vec<_> = activity(&bench).aborts.iter().map(|past| past.number).collect();
    assert_eq!(numbers, (8..40).collect::<Vec<u64>>());
    drop(running);
}
