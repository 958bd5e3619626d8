//! Receipts and statistics from the wire.

use tidemill_engine::{
    Counters, EngineStats, Histogram, Histograms,
    ids::RequestId,
    kv::BlockCounts,
    output::{AbortReceipt, AbortStage},
};
use tidemill_proto::v1;

use super::{duration, malformed};
use crate::client::CallError;

/// An abort's receipt.
///
/// # Errors
/// For times that are none.
pub fn abort_receipt(receipt: v1::AbortResponse) -> Result<AbortReceipt, CallError> {
    let stage = match receipt.stage() {
        v1::AbortStage::Unspecified => AbortStage::Unknown,
        v1::AbortStage::Queued => AbortStage::Queued,
        v1::AbortStage::Prefill => AbortStage::Prefill,
        v1::AbortStage::Decode => AbortStage::Decode,
        v1::AbortStage::Finished => AbortStage::Finished,
    };
    let v1::AbortResponse {
        request_id,
        stage: _,
        completion_tokens,
        blocks_freed,
        rows_freed,
        seconds_to_free,
    } = receipt;
    Ok(AbortReceipt {
        id: RequestId::new(request_id),
        stage,
        completion_tokens: completion_tokens as usize,
        blocks_freed: blocks_freed as usize,
        rows_freed: rows_freed as usize,
        time_to_free: duration(seconds_to_free)?,
    })
}

/// A reading of the engine's gauges, counters and distributions.
///
/// # Errors
/// For times that are none, and for distributions that are missing or have not one more count than bounds.
pub fn engine_stats(stats: v1::Stats) -> Result<EngineStats, CallError> {
    let v1::Stats {
        num_requests_running,
        num_requests_waiting,
        kv_blocks_total,
        kv_blocks_free,
        kv_blocks_owned,
        kv_blocks_cached,
        prompt_tokens_total,
        generation_tokens_total,
        steps_total,
        preemptions_total,
        requests_finished_total,
        requests_aborted_total,
        requests_refused_total,
        requests_failed_total,
        engine_heartbeat_age_seconds,
        uptime_seconds,
        draining,
        num_requests_parked,
        prefix_cache_queries_total,
        prefix_cache_hits_total,
        kv_blocks_saved_total,
        kv_blocks_loaded_total,
        requests_parked_total,
        time_to_first_token_seconds,
        inter_token_latency_seconds,
        e2e_request_latency_seconds,
        request_queue_time_seconds,
        request_prefill_time_seconds,
        request_decode_time_seconds,
        iteration_tokens_total,
        abort_to_free_seconds,
        step_plan_seconds,
        step_execute_seconds,
        step_resolve_seconds,
        request_lives_lost_total,
        kv_host_blocks_used,
        requests_finished_by_length_total,
    } = stats;
    Ok(EngineStats {
        num_requests_running: num_requests_running as usize,
        num_requests_waiting: num_requests_waiting as usize,
        num_requests_parked: num_requests_parked as usize,
        kv_blocks: BlockCounts {
            total: kv_blocks_total as usize,
            free: kv_blocks_free as usize,
            owned: kv_blocks_owned as usize,
            cached: kv_blocks_cached as usize,
        },
        num_host_blocks_used: kv_host_blocks_used as usize,
        counters: Counters {
            prompt_tokens: prompt_tokens_total,
            generation_tokens: generation_tokens_total,
            steps: steps_total,
            preemptions: preemptions_total,
            finished: requests_finished_total,
            finished_by_length: requests_finished_by_length_total,
            aborted: requests_aborted_total,
            refused: requests_refused_total,
            failed: requests_failed_total,
            prefix_cache_queries: prefix_cache_queries_total,
            prefix_cache_hits: prefix_cache_hits_total,
            blocks_saved: kv_blocks_saved_total,
            blocks_loaded: kv_blocks_loaded_total,
            parked: requests_parked_total,
            lives_lost: request_lives_lost_total,
        },
        histograms: Histograms {
            time_to_first_token: histogram(time_to_first_token_seconds)?,
            inter_token_latency: histogram(inter_token_latency_seconds)?,
            e2e_request_latency: histogram(e2e_request_latency_seconds)?,
            request_queue_time: histogram(request_queue_time_seconds)?,
            request_prefill_time: histogram(request_prefill_time_seconds)?,
            request_decode_time: histogram(request_decode_time_seconds)?,
            iteration_tokens: histogram(iteration_tokens_total)?,
            abort_to_free: histogram(abort_to_free_seconds)?,
            step_plan: histogram(step_plan_seconds)?,
            step_execute: histogram(step_execute_seconds)?,
            step_resolve: histogram(step_resolve_seconds)?,
        },
        heartbeat_age: duration(engine_heartbeat_age_seconds)?,
        uptime: duration(uptime_seconds)?,
        draining,
    })
}

fn histogram(histogram: Option<v1::Histogram>) -> Result<Histogram, CallError> {
    match histogram {
        Some(v1::Histogram { bounds, counts, sum }) if counts.len() == bounds.len() + 1 => {
            Ok(Histogram { bounds: bounds.into(), counts, sum })
        }
        _ => Err(malformed("a distribution")),
    }
}
