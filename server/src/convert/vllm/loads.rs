//! How busy the engine is, for a gateway that balances.

use std::time::SystemTime;

use tidemill_engine::{EngineStats, ModelInfo};
use tidemill_proto::vllm::grpc::engine::{GetLoadsResponse, SchedulerLoad};

use super::int32;

/// What happened of late.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rates {
    /// Tokens generated per second.
    pub generated: f64,
    /// Share of looked-up prompt tokens that were found in the prefix cache.
    pub cache_hits: f64,
}

/// The load of the only rank.
pub fn loads_response(info: &ModelInfo, stats: &EngineStats, rates: Rates) -> GetLoadsResponse {
    let (running, waiting) = (stats.num_requests_running, stats.num_requests_waiting);
    let blocks = &stats.kv_blocks;
    let usage = blocks.owned as f64 / blocks.total.max(1) as f64;
    let load = SchedulerLoad {
        dp_rank: 0,
        num_running_reqs: int32(running),
        num_waiting_reqs: int32(waiting),
        num_total_reqs: int32(running + waiting + stats.num_requests_parked),
        num_used_tokens: int32(blocks.owned * info.block_size),
        max_total_num_tokens: int32(blocks.total * info.block_size),
        token_usage: usage,
        gen_throughput: rates.generated,
        cache_hit_rate: rates.cache_hits,
        utilization: usage,
        max_running_requests: int32(info.max_num_seqs),
    };
    GetLoadsResponse {
        timestamp: prost_types::Timestamp::from(SystemTime::now()).to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        dp_rank_count: 1,
        loads: vec![load],
    }
}
