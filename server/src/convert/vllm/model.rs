//! What is loaded, for a gateway.

use serde::{Deserialize, Serialize};
use tidemill_engine::{EngineStats, ModelInfo, model::generation_config::GenerationDefaults};
use tidemill_proto::vllm::grpc::engine::{GetModelInfoResponse, GetServerInfoResponse};

use super::int32;

/// What a gateway wants of `config.json` and the engine has no use for.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct ConfigFacts {
    model_type: String,
    pad_token_id: serde_json::Value,
}

/// A model's sampling defaults as the gateway reads them.
#[derive(Serialize)]
struct Defaults {
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_k: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    repetition_penalty: Option<f32>,
}

/// The loaded model.
pub fn model_info(info: &ModelInfo, config: &ConfigFacts) -> GetModelInfoResponse {
    let id = |id: u32| int32(id as usize);
    let pad = config.pad_token_id.as_u64().and_then(|pad| u32::try_from(pad).ok());
    GetModelInfoResponse {
        model_path: info.served_model_name.clone(),
        is_generation: !info.embedding.is_only_output,
        max_context_length: info.max_model_len as u32,
        vocab_size: info.vocab_size as u32,
        served_model_name: info.served_model_name.clone(),
        model_type: config.model_type.clone(),
        architectures: vec![info.architecture.clone()],
        eos_token_ids: info.eos_token_ids.iter().map(|eos| id(eos.0)).collect(),
        pad_token_id: pad.map_or(0, id),
        bos_token_id: info.defaults.bos.map_or(0, |bos| id(bos.0)),
        max_req_input_len: int32(info.max_model_len.saturating_sub(1)),
        default_sampling_params_json: defaults_json(&info.defaults),
    }
}

fn defaults_json(defaults: &GenerationDefaults) -> String {
    let defaults = Defaults {
        temperature: defaults.temperature,
        top_p: defaults.top_p,
        top_k: defaults.top_k,
        min_p: defaults.min_p,
        repetition_penalty: defaults.repetition_penalty,
    };
    match serde_json::to_string(&defaults) {
        Ok(json) if json != "{}" => json,
        _ => String::new(),
    }
}

/// The server and its limits; `last_receive` is in seconds since 1970.
pub fn server_info(info: &ModelInfo, stats: &EngineStats, last_receive: f64) -> GetServerInfoResponse {
    let active = stats.num_requests_running + stats.num_requests_waiting + stats.num_requests_parked;
    GetServerInfoResponse {
        active_requests: active as u32,
        is_paused: stats.draining,
        last_receive_timestamp: last_receive,
        uptime_seconds: stats.uptime.as_secs_f64(),
        // What the protocol calls a server that speaks it.
        server_type: "vllm-grpc".into(),
        data_parallel_size: 1,
        kv_cache_dtype: info.kv_cache_dtype.to_owned(),
        block_size: int32(info.block_size),
        model_dtype: info.dtype.to_owned(),
        max_num_seqs: int32(info.max_num_seqs),
        constrained_decoding_start: "first_token".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_written_as_the_model_has_them() {
        let some =
            GenerationDefaults { temperature: Some(0.7), top_k: Some(40), ..GenerationDefaults::default() };
        assert_eq!(defaults_json(&some), r#"{"temperature":0.7,"top_k":40}"#);
        assert_eq!(defaults_json(&GenerationDefaults::default()), "", "nothing to say");
    }

    #[test]
    fn configs_of_all_sorts_are_read() {
        let read = |json: &str| serde_json::from_str::<ConfigFacts>(json).unwrap();
        assert_eq!(read(r#"{"model_type": "llama", "pad_token_id": 3, "other": []}"#).pad_token_id, 3);
        assert!(read(r#"{"pad_token_id": null}"#).pad_token_id.is_null());
    }
}
