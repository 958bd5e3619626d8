//! Options of the scheduler: whose turn it is, what is cached, what is refused, who is too slow.

use std::{num::NonZeroUsize, str::FromStr, time::Duration};

use clap::{ArgAction, Args, ValueEnum};
use tidemill_engine::{SchedulingConfig, ids::TenantId};

use super::{engine_defaults, size};
use crate::config::size::ByteSize;

/// Orders of the queue that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PolicyArg {
    /// First come, first served.
    Fcfs,
    /// Requests with the lowest `priority` first; they may take the place of running ones with a higher value.
    Priority,
    /// Tenants share by their weights, in tokens of service; the one that was given the least is next.
    Fair,
}

/// Whose turn it is, and what is refused.
#[derive(Debug, Args)]
#[command(next_help_heading = "Scheduling")]
pub struct SchedulingArgs {
    /// Order of the queue.
    #[arg(
        long,
        value_enum,
        value_name = "POLICY",
        default_value = "fcfs",
        env = "TIDEMILL_SCHEDULING_POLICY"
    )]
    pub scheduling_policy: PolicyArg,
    /// Share of a tenant under --scheduling-policy fair, 1 to 1000; whoever is not named has 1. May be given several times; the variable
    /// takes a comma-separated list. A tenant is what requests name, or else the fingerprint of their API key (`b3sum`, first 16 digits).
    #[arg(long, value_name = "NAME=W", env = "TIDEMILL_TENANT_WEIGHT", value_delimiter = ',')]
    pub tenant_weight: Vec<TenantWeight>,
    /// Compute every prompt from its beginning, and keep no blocks of ended requests for others that begin alike.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
          hide_default_value = true, hide_possible_values = true, value_name = "BOOL", action = ArgAction::Set,
          env = "TIDEMILL_NO_ENABLE_PREFIX_CACHING")]
    pub no_enable_prefix_caching: bool,
    /// Tell what the prefix cache stores and drops through Control.WatchKvEvents, for routers. Whoever may call that can ask for the token
    /// ids of all prompts.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
          hide_default_value = true, hide_possible_values = true, value_name = "BOOL", action = ArgAction::Set,
          env = "TIDEMILL_ENABLE_KV_CACHE_EVENTS")]
    pub enable_kv_cache_events: bool,
    /// Host memory for KV blocks that the prefix cache evicts, with a unit as in --kv-cache-memory. Blocks are kept there if a measurement
    /// at the start shows that copying them back is quicker than computing them again. Default: none.
    #[arg(long, value_name = "SIZE", default_value = "0", hide_default_value = true, env = "TIDEMILL_SWAP_SPACE", value_parser = swap_space)]
    pub swap_space: ByteSize,
    /// Prompts with more tokens to compute than this get no more than this of a step while others want to be read, so that short prompts
    /// pass them. Default: half of --max-num-batched-tokens.
    #[arg(long, value_name = "N", env = "TIDEMILL_LONG_PREFILL_TOKEN_THRESHOLD")]
    pub long_prefill_token_threshold: Option<NonZeroUsize>,
    /// Milliseconds between two tokens of a stream that are to be kept while prompts are read: prompts get as much of a step as that
    /// leaves, and at least a little. Default: prompts get all that --max-num-batched-tokens leaves.
    #[arg(long, value_name = "MS", env = "TIDEMILL_TARGET_ITL_MS", value_parser = milliseconds, allow_negative_numbers = true)]
    pub target_itl_ms: Option<Duration>,
    /// Requests that may wait for a place in the batch; more are refused with RESOURCE_EXHAUSTED and a time to retry.
    #[arg(long, value_name = "N", default_value_t = size(defaults().max_num_queued_reqs), env = "TIDEMILL_MAX_NUM_QUEUED_REQS")]
    pub max_num_queued_reqs: NonZeroUsize,
    /// Prompt tokens of the requests that may wait; more are refused in the same way. An empty queue takes any request. Default: no limit.
    #[arg(long, value_name = "N", env = "TIDEMILL_MAX_NUM_QUEUED_TOKENS")]
    pub max_num_queued_tokens: Option<NonZeroUsize>,
    /// Seconds that a request may wait for its first step. One that would wait longer by the present rate is refused at once, one that has
    /// waited longer is ended, both with RESOURCE_EXHAUSTED and a time to retry. Default: no limit.
    #[arg(long, value_name = "SECONDS", env = "TIDEMILL_MAX_QUEUE_TIME", value_parser = positive_seconds, allow_negative_numbers = true)]
    pub max_queue_time: Option<Duration>,
    /// Tokens that a stream may hold unread before it is parked: it gives its place to others, and gets one again when its client reads.
    #[arg(long, value_name = "TOKENS", default_value_t = size(defaults().max_stream_buffer), env = "TIDEMILL_MAX_STREAM_BUFFER")]
    pub max_stream_buffer: NonZeroUsize,
    /// Seconds that a stream may stay parked before it is ended with RESOURCE_EXHAUSTED.
    #[arg(long, value_name = "SECONDS", default_value_t = Seconds(defaults().slow_reader_timeout), env = "TIDEMILL_SLOW_READER_TIMEOUT", allow_negative_numbers = true)]
    pub slow_reader_timeout: Seconds,
}

/// A tenant and its share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantWeight {
    /// Who.
    pub tenant: TenantId,
    /// 1 to 1000.
    pub weight: u32,
}

impl TenantWeight {
    const MAX: u32 = 1000;
}

impl FromStr for TenantWeight {
    type Err = String;

    /// The last `=` separates: names may hold others.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, weight) = text.rsplit_once('=').ok_or("write NAME=WEIGHT, such as batch=2")?;
        if name.is_empty() || name.len() > TenantId::MAX_BYTES {
            return Err(format!("a tenant's name has 1 to {} bytes", TenantId::MAX_BYTES));
        }
        let weight = weight.parse().ok().filter(|weight| (1..=Self::MAX).contains(weight));
        let weight = weight.ok_or_else(|| format!("a weight is a whole number from 1 to {}", Self::MAX))?;
        Ok(Self { tenant: TenantId::new(name), weight })
    }
}

/// A time above 0, written in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seconds(pub Duration);

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        positive_seconds(text).map(Self)
    }
}

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0.as_secs_f64())
    }
}

fn positive_seconds(text: &str) -> Result<Duration, String> {
    let time = super::seconds(text)?;
    if time.is_zero() { Err("must be above 0".into()) } else { Ok(time) }
}

fn milliseconds(text: &str) -> Result<Duration, String> {
    let milliseconds: f64 = text.parse().map_err(|_| "not a number of milliseconds".to_owned())?;
    let time = Duration::try_from_secs_f64(milliseconds / 1e3).map_err(|error| error.to_string())?;
    if time.is_zero() { Err("must be above 0".into()) } else { Ok(time) }
}

/// Less than any block has: somebody left the unit out.
const LEAST_SWAP_SPACE: usize = 1024;

fn swap_space(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse()?;
    if (1..LEAST_SWAP_SPACE).contains(&size.0) {
        return Err(format!("{size} bytes hold no block; write a unit, such as {size}GiB, or 0 for none"));
    }
    Ok(size)
}

fn defaults() -> SchedulingConfig {
    engine_defaults().scheduling
}
