//! What `tidemill run` needs.

use tidemill_engine::{EngineConfig, sampling::SamplingParams};

use super::engine_config;
use crate::{args::RunArgs, exit::Failure};

/// A prompt to complete.
#[derive(Debug)]
pub struct RunConfig {
    /// The engine to do it.
    pub engine: EngineConfig,
    /// The prompt.
    pub prompt: PromptSource,
    /// Without the chat template.
    pub raw: bool,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// Report tokens and times.
    pub verbose: bool,
}

/// Where a prompt comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptSource {
    /// The command line.
    Text(String),
    /// All of stdin.
    Stdin,
}

impl RunConfig {
    /// Checks the arguments; sampling values are the engine's to judge.
    ///
    /// # Errors
    /// What is wrong and what to do, as wrong usage.
    pub fn from_args(args: RunArgs) -> Result<Self, Failure> {
        let mut engine = engine_config(args.model)?;
        // One prompt is one row of the batch.
        engine.max_num_seqs = Some(1);
        let prompt = if args.prompt == "-" { PromptSource::Stdin } else { PromptSource::Text(args.prompt) };
        let sampling = SamplingParams {
            temperature: args.sampling.temperature,
            top_p: args.sampling.top_p,
            top_k: args.sampling.top_k,
            max_tokens: args.sampling.max_tokens,
            seed: args.sampling.seed,
            stop: args.sampling.stop,
            ..SamplingParams::default()
        };
        Ok(Self { engine, prompt, raw: args.raw, sampling, verbose: args.verbose })
    }
}
