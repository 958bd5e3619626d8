//! The real runner: a plan becomes batch metadata, goes through the decoder, and comes back as tokens.

use std::{collections::VecDeque, sync::Arc};

use tidemill_kernels::{
    Ops,
    ops::{self, BatchMeta, FEEDBACK, StepResults},
    sampling::{Logprobs, RowTask, SampleSpec, Sampled},
};

use super::{BlockCopy, DeviceLost, Runner, RunnerError};
use crate::{
    adapter::{Adapter, AdapterSlot},
    ids::TokenId,
    model::{decoder::Decoder, lora::LoraWeights},
    output::TokenLogprobs,
    scheduler::{PlanRow, RowOutput, RowResult, SamplePlan, StepOutput, StepPlan, TokenInput},
};

/// Runs plans on a [`Decoder`].
pub struct DecoderRunner<O: Ops> {
    // Steps in flight are given up before the decoder is.
    /// Oldest first, each with what its rows asked for.
    in_flight: VecDeque<(O::Pending, Vec<Asked>)>,
    decoder: Decoder<O>,
    block_size: usize,
}

/// What a plan row asked for: so many scored positions, a token or none, and so many hidden states.
struct Asked {
    scores: usize,
    sample: bool,
    states: usize,
}

impl<O: Ops> DecoderRunner<O> {
    /// A runner for a decoder whose KV cache has blocks of `block_size` tokens.
    pub fn new(decoder: Decoder<O>, block_size: usize) -> Self {
        Self { in_flight: VecDeque::new(), decoder, block_size }
    }
}

impl<O: Ops> Runner for DecoderRunner<O> {
    fn launch(&mut self, plan: &StepPlan) -> Result<(), RunnerError> {
        let (meta, tasks) = flatten(plan, self.block_size);
        let pending = self.decoder.launch(Arc::new(meta), tasks.into())?;
        let asked = |row: &PlanRow| Asked {
            scores: row.targets.len(),
            sample: row.sample.is_some(),
            states: row.pool_at.len(),
        };
        self.in_flight.push_back((pending, plan.rows.iter().map(asked).collect()));
        Ok(())
    }

    fn wait(&mut self) -> Result<StepOutput, RunnerError> {
        let (pending, asked) =
            self.in_flight.pop_front().ok_or_else(|| RunnerError::Step("no step is in flight".into()))?;
        let StepResults { sampled, states } = self.decoder.wait(pending)?;
        let width = states.len() / asked.iter().map(|asked| asked.states).sum::<usize>().max(1);
        let (mut sampled, mut states) = (sampled.into_iter(), states.as_slice());
        let row = |asked: &Asked| {
            let own;
            (own, states) = states.split_at(asked.states * width);
            collect(asked, &mut sampled, own)
        };
        Ok(StepOutput { rows: asked.iter().map(row).collect() })
    }

    fn is_done(&mut self) -> bool {
        self.in_flight.front().is_some_and(|(pending, _)| self.decoder.is_done(pending))
    }

    fn set_adapter(&mut self, slot: AdapterSlot, adapter: &Adapter) -> Result<(), RunnerError> {
        let lost = |detail: String| DeviceLost(format!("{adapter:?}: {detail}"));
        let weights = adapter.weights.downcast_ref::<LoraWeights>();
        let weights = weights.ok_or_else(|| lost("is of another model".into()))?;
        let set = self.decoder.set_adapter(slot.0 as usize, weights);
        set.map_err(|error| lost(error.to_string()).into())
    }

    fn copy(&mut self, copies: &[BlockCopy]) -> Result<(), RunnerError> {
        let copies: Vec<_> = copies.iter().map(block_copy).collect();
        self.decoder.copy_blocks(&copies).map_err(|error| DeviceLost(error.to_string()).into())
    }
}

fn block_copy(copy: &BlockCopy) -> ops::BlockCopy {
    match *copy {
        BlockCopy::Save(block, host) => ops::BlockCopy::Save { block: block.0, host: host.0 },
        BlockCopy::Load(host, block) => ops::BlockCopy::Load { host: host.0, block: block.0 },
    }
}

/// The plan as flat metadata, and one task per row of logits, in the order of [`StepPlan::samples`].
fn flatten(plan: &StepPlan, block_size: usize) -> (BatchMeta, Vec<RowTask>) {
    let max_blocks = plan.rows.iter().map(|row| row.blocks.len()).max().unwrap_or(0);
    let mut meta = BatchMeta { max_blocks, cu_seqlens_q: vec![0], ..BatchMeta::default() };
    let mut tasks = Vec::new();
    for row in &plan.rows {
        let first = meta.token_ids.len();
        match &row.input {
            TokenInput::Known(tokens) => meta.token_ids.extend(tokens.iter().map(|token| token.0)),
            TokenInput::Sampled(logits_row) => meta.token_ids.push(FEEDBACK | logits_row),
        }
        for position in row.start..row.end() {
            let block = row.blocks[position / block_size].0 as usize;
            meta.positions.push(position as u32);
            meta.slot_mapping.push((block * block_size + position % block_size) as u32);
        }
        meta.cu_seqlens_q.push(meta.token_ids.len() as u32);
        meta.context_lens.push(row.end() as u32);
        meta.adapters.push(row.adapter.map_or(0, |slot| slot.0 + 1));
        meta.block_tables.extend(row.blocks.iter().map(|block| block.0));
        meta.block_tables.resize(meta.context_lens.len() * max_blocks, 0);
        for (position, target) in row.score_at.clone().zip(&row.targets) {
            meta.logits_indices.push((first + position - row.start) as u32);
            tasks.push(RowTask::Score(target.0, row.score_top));
        }
        if let Some(segments) = &row.segments {
            // Rows before without any are of segment 0.
            meta.segments.resize(first, 0);
            meta.segments.extend_from_slice(&segments[row.start..row.end()]);
        }
        meta.state_indices.extend(row.pool_at.clone().map(|position| (first + position - row.start) as u32));
        if let Some(sample) = &row.sample {
            meta.logits_indices.push((meta.token_ids.len() - 1) as u32);
            tasks.push(RowTask::Sample(spec(sample), sample.sampling.logprobs));
        }
    }
    if meta.adapters.iter().all(|&adapter| adapter == 0) {
        meta.adapters.clear();
    }
    if !meta.segments.is_empty() {
        meta.segments.resize(meta.token_ids.len(), 0);
    }
    (meta, tasks)
}

fn spec(plan: &SamplePlan) -> SampleSpec {
    let sampling = &plan.sampling;
    let stops = || sampling.eos_token_ids.iter().chain(&sampling.stop_token_ids).map(|token| token.0);
    SampleSpec {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        seed: plan.seed,
        position: plan.position as u32,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        token_counts: plan.token_counts.iter().map(|&(token, count)| (token.0, count)).collect(),
        logit_bias: sampling.logit_bias.iter().map(|&(token, bias)| (token.0, bias)).collect(),
        forbidden: if plan.forbid_stops { stops().collect() } else { Vec::new() },
        allowed: plan.allowed.clone(),
    }
}

/// Takes the results of one plan row off the front of `sampled`; `states` are its hidden states.
fn collect(asked: &Asked, sampled: &mut impl Iterator<Item = Sampled>, states: &[f32]) -> RowResult {
    let count = asked.scores + usize::from(asked.sample);
    let results: Vec<Sampled> = sampled.take(count).collect();
    if results.iter().any(|result| !result.finite) || states.iter().any(|x| !x.is_finite()) {
        return RowResult::NotFinite;
    }
    let mut results = results.into_iter();
    let prompt_logprobs = results
        .by_ref()
        .take(asked.scores)
        .filter_map(|result| result.logprobs.map(|l| token_logprobs(result.token, l)))
        .collect();
    let sampled = results.next();
    RowResult::Done(RowOutput {
        sampled: sampled.as_ref().map(|result| TokenId(result.token)),
        logprobs: sampled.and_then(|result| result.logprobs.map(|l| token_logprobs(result.token, l))),
        prompt_logprobs,
        states: states.to_vec(),
    })
}

fn token_logprobs(token: u32, logprobs: Logprobs) -> TokenLogprobs {
    TokenLogprobs {
        token: TokenId(token),
        logprob: logprobs.logprob,
        rank: logprobs.rank,
        top: logprobs.top.into_iter().map(|(token, logprob)| (TokenId(token), logprob)).collect(),
    }
}
