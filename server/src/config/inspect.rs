//! What `tidemill inspect` needs.

use tidemill_engine::EngineConfig;

use crate::args::InspectArgs;

/// A model to look at.
#[derive(Debug)]
pub struct InspectConfig {
    /// As it would be served.
    pub engine: EngineConfig,
    /// For programs.
    pub json: bool,
}

impl InspectConfig {
    /// Takes the arguments over; what the model makes impossible is found by inspecting it.
    pub fn from_args(args: InspectArgs) -> Self {
        let mut engine = EngineConfig::new(args.model);
        engine.chat_template = args.chat_template;
        engine.skip_tokenizer_init = args.skip_tokenizer_init;
        engine.max_model_len = args.max_model_len.map(Into::into);
        engine.gpu_memory_utilization = args.gpu_memory_utilization;
        Self { engine, json: args.json }
    }
}
