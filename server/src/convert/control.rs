//! Receipts and statistics for the wire.

use tidemill_engine::{
    Drained, EngineStats, Histogram,
    output::{AbortReceipt, AbortStage},
};
use tidemill_proto::v1;

/// An abort's receipt.
pub fn abort_response(receipt: &AbortReceipt) -> v1::AbortResponse {
    let stage = match receipt.stage {
        AbortStage::Unknown => v1::AbortStage::Unspecified,
        AbortStage::Queued => v1::AbortStage::Queued,
        AbortStage::Prefill => v1::AbortStage::Prefill,
        AbortStage::Decode => v1::AbortStage::Decode,
        AbortStage::Finished => v1::AbortStage::Finished,
    };
    v1::AbortResponse {
        request_id: receipt.id.as_str().to_owned(),
        stage: stage.into(),
        completion_tokens: receipt.completion_tokens as u32,
        blocks_freed: receipt.blocks_freed as u32,
        rows_freed: receipt.rows_freed as u32,
        seconds_to_free: receipt.time_to_free.as_secs_f64(),
    }
}

/// What a drain did.
pub fn drain_response(drained: Drained) -> v1::DrainResponse {
    v1::DrainResponse { finished: drained.finished as u32, cut_off: drained.cut_off as u32 }
}

/// The receipts of an abort of everything.
pub fn abort_all_response(receipts: &[AbortReceipt]) -> v1::AbortAllResponse {
    v1::AbortAllResponse { receipts: receipts.iter().map(abort_response).collect() }
}

/// A reading of the engine's gauges, counters and distributions.
pub fn stats(stats: &EngineStats) -> v1::Stats {
    let histograms = &stats.histograms;
    v1::Stats {
        num_requests_running: stats.num_requests_running as u32,
        num_requests_waiting: stats.num_requests_waiting as u32,
        kv_blocks_total: stats.kv_blocks.total as u32,
        kv_blocks_free: stats.kv_blocks.free as u32,
        kv_blocks_owned: stats.kv_blocks.owned as u32,
        kv_blocks_cached: stats.kv_blocks.cached as u32,
        prompt_tokens_total: stats.counters.prompt_tokens,
        generation_tokens_total: stats.counters.generation_tokens,
        steps_total: stats.counters.steps,
        preemptions_total: stats.counters.preemptions,
        requests_finished_total: stats.counters.finished,
        requests_finished_by_length_total: stats.counters.finished_by_length,
        requests_aborted_total: stats.counters.aborted,
        requests_refused_total: stats.counters.refused,
        requests_failed_total: stats.counters.failed,
        engine_heartbeat_age_seconds: stats.heartbeat_age.as_secs_f64(),
        uptime_seconds: stats.uptime.as_secs_f64(),
        draining: stats.draining,
        num_requests_parked: stats.num_requests_parked as u32,
        prefix_cache_queries_total: stats.counters.prefix_cache_queries,
        prefix_cache_hits_total: stats.counters.prefix_cache_hits,
        kv_host_blocks_used: stats.num_host_blocks_used as u32,
        kv_blocks_saved_total: stats.counters.blocks_saved,
        kv_blocks_loaded_total: stats.counters.blocks_loaded,
        requests_parked_total: stats.counters.parked,
        request_lives_lost_total: stats.counters.lives_lost,
        time_to_first_token_seconds: Some(histogram(&histograms.time_to_first_token)),
        inter_token_latency_seconds: Some(histogram(&histograms.inter_token_latency)),
        e2e_request_latency_seconds: Some(histogram(&histograms.e2e_request_latency)),
        request_queue_time_seconds: Some(histogram(&histograms.request_queue_time)),
        request_prefill_time_seconds: Some(histogram(&histograms.request_prefill_time)),
        request_decode_time_seconds: Some(histogram(&histograms.request_decode_time)),
        iteration_tokens_total: Some(histogram(&histograms.iteration_tokens)),
        abort_to_free_seconds: Some(histogram(&histograms.abort_to_free)),
        step_plan_seconds: Some(histogram(&histograms.step_plan)),
        step_execute_seconds: Some(histogram(&histograms.step_execute)),
        step_resolve_seconds: Some(histogram(&histograms.step_resolve)),
    }
}

fn histogram(histogram: &Histogram) -> v1::Histogram {
    v1::Histogram { bounds: histogram.bounds.to_vec(), counts: histogram.counts.clone(), sum: histogram.sum }
}
