//! The engine's statistics as Prometheus reads them, under vLLM's names where it has one.

use std::fmt::Error;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet, text::encode},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};
use tidemill_engine::{EngineStats, Histogram};

use crate::client::ModelCard;

/// OpenMetrics, which every Prometheus of the last years reads.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All metrics.
pub fn text(model: &ModelCard, stats: EngineStats) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Reading { card: model.clone(), stats }));
    let mut text = String::new();
    let written = encode(&mut text, &registry);
    debug_assert!(written.is_ok(), "a String takes everything");
    text
}

/// One reading.
#[derive(Debug)]
struct Reading {
    card: ModelCard,
    stats: EngineStats,
}

/// The labels of a metric beside its model.
type Labels<'a> = &'a [(&'static str, String)];

struct Writer<'a, 'b> {
    encoder: DescriptorEncoder<'b>,
    model: &'a str,
}

impl Collector for Reading {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut writer = Writer { encoder, model: &self.card.served_model_name };
        self.gauges(&mut writer)?;
        self.counters(&mut writer)?;
        self.histograms(&mut writer)
    }
}

impl Reading {
    fn gauges(&self, to: &mut Writer<'_, '_>) -> Result<(), Error> {
        let (stats, card) = (&self.stats, &self.card);
        let blocks = &stats.kv_blocks;
        // What is cached can be had at any time: it is not in use.
        let usage = blocks.owned as f64 / (blocks.total.max(1)) as f64;
        to.gauge("vllm:num_requests_running", "Sequences in the batch", stats.num_requests_running as f64)?;
        to.gauge("vllm:num_requests_waiting", "Sequences that wait", stats.num_requests_waiting as f64)?;
        to.gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks that requests hold, 0 to 1", usage)?;
        let config =
            [("block_size", card.block_size.to_string()), ("num_gpu_blocks", card.num_kv_blocks.to_string())];
        to.family(
            "vllm:cache_config_info",
            "The KV cache",
            MetricType::Gauge,
            &[(&config, &ConstGauge::new(1.0))],
        )?;
        to.gauge(
            "tidemill:num_requests_parked",
            "Sequences whose client does not read",
            stats.num_requests_parked as f64,
        )?;
        to.gauge(
            "tidemill:kv_blocks_cached",
            "KV blocks that hold prefixes and nobody uses",
            blocks.cached as f64,
        )?;
        to.gauge(
            "tidemill:kv_host_blocks_used",
            "KV blocks in host memory",
            stats.num_host_blocks_used as f64,
        )?;
        to.gauge(
            "tidemill:engine_heartbeat_age_seconds",
            "Since a step was last launched or done; 0 when none is in flight",
            stats.heartbeat_age.as_secs_f64(),
        )?;
        to.gauge("tidemill:uptime_seconds", "Since the engine's start", stats.uptime.as_secs_f64())
    }

    fn counters(&self, to: &mut Writer<'_, '_>) -> Result<(), Error> {
        let counters = &self.stats.counters;
        to.counter("vllm:prompt_tokens", "Prompt tokens", counters.prompt_tokens)?;
        to.counter("vllm:generation_tokens", "Tokens generated", counters.generation_tokens)?;
        to.counter(
            "vllm:prefix_cache_queries",
            "Tokens looked up in the prefix cache",
            counters.prefix_cache_queries,
        )?;
        to.counter("vllm:prefix_cache_hits", "Of these, found", counters.prefix_cache_hits)?;
        to.counter("vllm:num_preemptions", "Preemptions", counters.preemptions)?;
        let by_length = counters.finished_by_length;
        let reasons = [
            ("stop", counters.finished.saturating_sub(by_length)),
            ("length", by_length),
            ("abort", counters.aborted),
            ("error", counters.failed),
        ];
        let reasons = reasons
            .map(|(reason, count)| ([("finished_reason", reason.to_owned())], ConstCounter::new(count)));
        let reasons =
            reasons.each_ref().map(|(labels, count)| (labels as Labels<'_>, count as &dyn EncodeMetric));
        to.family("vllm:request_success", "Requests that ended", MetricType::Counter, &reasons)?;
        to.counter("tidemill:requests_refused", "Requests refused instead of queued", counters.refused)?;
        to.counter("tidemill:requests_parked", "Times that a request was parked", counters.parked)?;
        to.counter("tidemill:steps", "Steps", counters.steps)?;
        to.counter("tidemill:kv_blocks_saved", "KV blocks copied to host memory", counters.blocks_saved)?;
        to.counter("tidemill:kv_blocks_loaded", "KV blocks copied back", counters.blocks_loaded)
    }

    fn histograms(&self, to: &mut Writer<'_, '_>) -> Result<(), Error> {
        let histograms = &self.stats.histograms;
        for (name, help, histogram) in [
            (
                "vllm:time_to_first_token_seconds",
                "From submission to the first token",
                &histograms.time_to_first_token,
            ),
            ("vllm:inter_token_latency_seconds", "Between two tokens", &histograms.inter_token_latency),
            (
                "vllm:e2e_request_latency_seconds",
                "From submission to the end",
                &histograms.e2e_request_latency,
            ),
            (
                "vllm:request_queue_time_seconds",
                "From submission to the first step",
                &histograms.request_queue_time,
            ),
            (
                "vllm:request_prefill_time_seconds",
                "From there to the first token",
                &histograms.request_prefill_time,
            ),
            ("vllm:request_decode_time_seconds", "From there to the end", &histograms.request_decode_time),
            ("vllm:iteration_tokens_total", "Tokens of a step", &histograms.iteration_tokens),
            ("tidemill:abort_to_free_seconds", "From an abort until all was free", &histograms.abort_to_free),
        ] {
            to.family(name, help, MetricType::Histogram, &[(&[], &Distribution(histogram))])?;
        }
        let phase = |name: &str| [("phase", name.to_owned())];
        let phases = [phase("plan"), phase("execute"), phase("resolve")];
        let steps =
            [&histograms.step_plan, &histograms.step_execute, &histograms.step_resolve].map(Distribution);
        let member = |(labels, steps)| (labels as Labels<'_>, steps as &dyn EncodeMetric);
        let steps: Vec<_> =
            phases.iter().zip(&steps).map(|(labels, steps)| member((&labels[..], steps))).collect();
        to.family("tidemill:step_seconds", "A step by what is done", MetricType::Histogram, &steps)
    }
}

impl Writer<'_, '_> {
    fn gauge(&mut self, name: &str, help: &str, value: f64) -> Result<(), Error> {
        self.family(name, help, MetricType::Gauge, &[(&[], &ConstGauge::new(value))])
    }

    /// `name` is without the `_total` that every counter gets.
    fn counter(&mut self, name: &str, help: &str, value: u64) -> Result<(), Error> {
        self.family(name, help, MetricType::Counter, &[(&[], &ConstCounter::new(value))])
    }

    /// One metric with each of these labels; the model's name is always one.
    fn family(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        members: &[(Labels<'_>, &dyn EncodeMetric)],
    ) -> Result<(), Error> {
        let mut encoder = self.encoder.encode_descriptor(name, help, None, kind)?;
        for (labels, value) in members {
            let mut all: Vec<(&str, &str)> = vec![("model_name", self.model)];
            all.extend(labels.iter().map(|(name, value)| (*name, value.as_str())));
            value.encode(encoder.encode_family(&all)?)?;
        }
        Ok(())
    }
}

/// A histogram of the engine.
#[derive(Debug)]
struct Distribution<'a>(&'a Histogram);

impl EncodeMetric for Distribution<'_> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), Error> {
        let Histogram { bounds, counts, sum } = self.0;
        // The largest number stands for what is over the last bound.
        let bounds = bounds.iter().copied().chain([f64::MAX]);
        let buckets: Vec<(f64, u64)> = bounds.zip(counts.iter().copied()).collect();
        encoder.encode_histogram::<NoLabelSet>(*sum, counts.iter().sum(), &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}
