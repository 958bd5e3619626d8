//! A life as OpenTelemetry spans: one for the request, and one per stage under it.
//!
//! Attributes follow the semantic conventions for generative AI where there is one (`gen_ai.*`); the others are `tidemill.*`.

use std::{collections::HashMap, time::SystemTime};

use opentelemetry::{
    InstrumentationScope, KeyValue,
    propagation::TextMapPropagator,
    trace::{Event, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState},
};
use opentelemetry_sdk::{
    propagation::TraceContextPropagator,
    trace::{IdGenerator, RandomIdGenerator, SpanData, SpanEvents, SpanLinks},
};
use tidemill_engine::explain::{EndedLife, Life};

use super::{
    duration, outcome,
    stages::{Stage, stages},
    submitted,
};
use crate::convert::{code, code_name};

/// Name of the span of a request.
const REQUEST: &str = "llm_request";

/// The spans of a life, the request's own first. None when the client's trace is not recorded.
pub fn spans(life: &EndedLife) -> Vec<SpanData> {
    let parent = life.trace_parent.as_deref().and_then(parse);
    if parent.as_ref().is_some_and(|parent| !parent.is_sampled()) {
        return Vec::new();
    }
    let ids = RandomIdGenerator::default();
    let trace = Trace {
        id: parent.as_ref().map_or_else(|| ids.new_trace_id(), SpanContext::trace_id),
        start: submitted(life),
        ids,
    };
    let root = trace.request(life, parent.as_ref());
    let under = root.span_context.span_id();
    let stages = stages(&life.explanation.life);
    let stages = stages.iter().map(|stage| trace.stage(stage, under));
    std::iter::once(root.clone()).chain(stages).collect()
}

/// The caller's span, from a W3C `traceparent`; nothing for one that is malformed.
fn parse(trace_parent: &str) -> Option<SpanContext> {
    let headers = HashMap::from([("traceparent".to_owned(), trace_parent.to_owned())]);
    let context =
        TraceContextPropagator::new().extract_with_context(&opentelemetry::Context::new(), &headers);
    let parent = context.span().span_context().clone();
    parent.is_valid().then_some(parent)
}

/// What the spans of one life have in common.
struct Trace {
    id: TraceId,
    /// When the request was submitted.
    start: SystemTime,
    ids: RandomIdGenerator,
}

impl Trace {
    fn request(&self, life: &EndedLife, parent: Option<&SpanContext>) -> SpanData {
        let explanation = &life.explanation;
        let attributes = vec![
            KeyValue::new("gen_ai.usage.input_tokens", explanation.prompt_tokens as i64),
            KeyValue::new("gen_ai.usage.output_tokens", explanation.completion_tokens as i64),
            KeyValue::new("tidemill.request_id", explanation.id.as_str().to_owned()),
            KeyValue::new("tidemill.tenant", explanation.tenant.as_str().to_owned()),
            KeyValue::new("tidemill.priority", i64::from(explanation.priority)),
            KeyValue::new("tidemill.cached_tokens", explanation.cached_tokens as i64),
            KeyValue::new("tidemill.num_preemptions", explanation.num_preemptions as i64),
            KeyValue::new("tidemill.outcome", outcome(life)),
            KeyValue::new("tidemill.events_left_out", explanation.events_left_out as i64),
        ];
        let failed = explanation.life.iter().find_map(|event| match event.what {
            Life::Failed(error) => Some(Status::error(code_name(code(error)))),
            _ => None,
        });
        SpanData {
            parent_span_id: parent.map_or(SpanId::INVALID, SpanContext::span_id),
            parent_span_is_remote: parent.is_some(),
            span_kind: SpanKind::Server,
            end_time: self.start + duration(life),
            status: failed.unwrap_or_default(),
            ..self.span(REQUEST, attributes)
        }
    }

    fn stage(&self, stage: &Stage, parent: SpanId) -> SpanData {
        let mut attributes = vec![KeyValue::new("tidemill.index", i64::from(stage.index))];
        if let Some(cached) = stage.cached_tokens {
            attributes.push(KeyValue::new("tidemill.cached_tokens", cached as i64));
        }
        let mut events = SpanEvents::default();
        events.events = stage
            .chunks
            .iter()
            .map(|chunk| {
                let attributes = vec![
                    KeyValue::new("tidemill.tokens", chunk.tokens as i64),
                    KeyValue::new("tidemill.computed", chunk.computed as i64),
                ];
                Event::new("chunk", self.start + chunk.at, attributes, 0)
            })
            .collect();
        SpanData {
            parent_span_id: parent,
            start_time: self.start + stage.from,
            end_time: self.start + stage.to,
            events,
            ..self.span(stage.kind.name(), attributes)
        }
    }

    /// A span of this trace with an id of its own.
    fn span(&self, name: &'static str, attributes: Vec<KeyValue>) -> SpanData {
        let id = self.ids.new_span_id();
        SpanData {
            span_context: SpanContext::new(self.id, id, TraceFlags::SAMPLED, false, TraceState::NONE),
            parent_span_id: SpanId::INVALID,
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: name.into(),
            start_time: self.start,
            end_time: self.start,
            attributes,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: InstrumentationScope::builder("tidemill")
                .with_version(env!("CARGO_PKG_VERSION"))
                .build(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_w3c_traceparent_is_read_and_a_malformed_one_starts_a_trace_anew() {
        let parent = parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").unwrap();
        assert_eq!(parent.trace_id().to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(parent.span_id().to_string(), "b7ad6b7169203331");
        assert!(parent.is_sampled());
        let quiet = parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00").unwrap();
        assert!(!quiet.is_sampled());
        for text in ["", "garbage", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"] {
            assert!(parse(text).is_none(), "{text:?}");
        }
        let nobody = "00-00000000000000000000000000000000-0000000000000000-01";
        assert!(parse(nobody).is_none(), "ids of zeros are none");
    }
}
