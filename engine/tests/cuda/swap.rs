//! A sequence whose blocks leave for the host, are overwritten, and come back elsewhere: it goes on bit for bit, on the CPU and on CUDA
//! kernels, under plans made by hand.

use std::sync::Arc;

use tidemill_engine::{
    ids::{BlockId, HostBlockId, SeqId, TokenId},
    model::{
        checkpoint::Checkpoint,
        decoder::{Decoder, DecoderLimits},
        files::{ModelFiles, ModelSource},
        spec::ModelSpec,
    },
    runner::{DecoderRunner, Runner, StepQueue},
    sampling::Sampling,
    scheduler::{PlanRow, RowResult, SamplePlan, StepPlan, TokenInput},
};
use tidemill_kernels::{
    DType, Ops,
    cpu::{Compute, CpuConfig, CpuOps},
    cuda::{CudaConfig, CudaOps, Device},
};
use tidemill_kernels_emu::Schedule;

use crate::device::driver;

const BLOCK_SIZE: usize = 16;
const NUM_BLOCKS: usize = 10;
const HOST_BLOCKS: usize = 4;
const MAX_LEN: usize = 96;
/// Tokens of the prompts: three blocks, the last one not full.
const PROMPT: usize = 40;
/// Tokens before the blocks leave, and after.
const BEFORE: usize = 2;
const AFTER: usize = 3;

/// A token, and the bits of its log-probabilities.
type Outcome = (TokenId, Vec<u32>);
type Steps = StepQueue<Box<dyn Runner>>;

fn steps<O: Ops + 'static>(ops: impl FnOnce(&ModelSpec) -> O) -> Steps {
    let files = ModelFiles::open(&ModelSource::Builtin).unwrap();
    let spec = ModelSpec::load(&files).unwrap();
    let checkpoint = Checkpoint::open(&files).unwrap();
    let kv = spec.kv_shape(NUM_BLOCKS, BLOCK_SIZE, DType::Bf16);
    let limits = DecoderLimits { max_num_batched_tokens: MAX_LEN, max_model_len: MAX_LEN };
    let mut decoder = Decoder::load(ops(&spec), &spec, &checkpoint, limits, |_| ()).unwrap();
    decoder.allocate_kv(kv).unwrap();
    decoder.allocate_host_kv(HOST_BLOCKS).unwrap();
    StepQueue::new(Box::new(DecoderRunner::new(decoder, BLOCK_SIZE)))
}

fn cpu() -> Steps {
    steps(|_| CpuOps::new(CpuConfig { compute: Compute::Bf16, isa: None, threads: Some(2) }).unwrap())
}

/// Decode steps run from graphs, prompts do not.
fn cuda() -> Steps {
    steps(|spec| {
        let config = CudaConfig {
            max_tokens: MAX_LEN,
            max_rows: 4,
            max_model_len: MAX_LEN,
            block_size: BLOCK_SIZE,
            attention: spec.cuda_attention(),
            vocab: spec.vocab_size,
            graphs: true,
        };
        CudaOps::new(Device::new(driver(Schedule::default())), config).unwrap()
    })
}

/// A sequence, as much of it as is known.
struct Sequence {
    id: u64,
    tokens: Vec<TokenId>,
    blocks: Vec<u32>,
    computed: usize,
    outcomes: Vec<Outcome>,
}

impl Sequence {
    fn new(id: u64, blocks: &[u32]) -> Self {
        let tokens = (0..PROMPT as u32).map(|i| TokenId((i * 37 + id as u32 * 101) % 500 + 10)).collect();
        Self { id, tokens, blocks: blocks.to_vec(), computed: 0, outcomes: Vec::new() }
    }

    /// Everything that is not computed yet, and then a random token.
    fn row(&self) -> PlanRow {
        let sampling = Sampling {
            temperature: 0.8,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: self.id,
            max_tokens: MAX_LEN,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            eos_token_ids: Vec::new(),
            logprobs: Some(3),
            prompt_logprobs: None,
        };
        let blocks = self.tokens.len().div_ceil(BLOCK_SIZE);
        PlanRow {
            seq: SeqId(self.id),
            start: self.computed,
            input: TokenInput::Known(self.tokens[self.computed..].to_vec()),
            blocks: self.blocks[..blocks].iter().map(|&block| BlockId(block)).collect(),
            sample: Some(SamplePlan {
                sampling: Arc::new(sampling),
                seed: self.id,
                position: self.tokens.len(),
                token_counts: Vec::new(),
                forbid_stops: false,
                allowed: None,
            }),
            score_at: 0..0,
            targets: Vec::new(),
            score_top: 0,
            pool_at: 0..0,
            segments: None,
            adapter: None,
        }
    }

    fn take(&mut self, result: &RowResult) {
        let RowResult::Done(output) = result else { panic!("sequence {}: {result:?}", self.id) };
        self.computed = self.tokens.len();
        let (token, logprobs) = (output.sampled.unwrap(), output.logprobs.as_ref().unwrap());
        let bits = logprobs.top.iter().map(|(_, logprob)| logprob.to_bits());
        self.outcomes.push((token, bits.chain([logprobs.logprob.to_bits()]).collect()));
        self.tokens.push(token);
    }
}

fn plan(rows: &[&Sequence]) -> StepPlan {
    StepPlan { rows: rows.iter().map(|sequence| sequence.row()).collect(), ..StepPlan::default() }
}

fn advance(steps: &mut Steps, sequence: &mut Sequence, times: usize) {
    for _ in 0..times {
        steps.launch(plan(&[sequence])).unwrap();
        sequence.take(&steps.finish().unwrap().1.rows[0]);
    }
}

/// Nobody disturbs it.
fn alone(steps: &mut Steps, id: u64, blocks: &[u32]) -> Vec<Outcome> {
    let mut sequence = Sequence::new(id, blocks);
    advance(steps, &mut sequence, BEFORE + AFTER);
    sequence.outcomes
}

fn check(steps: &mut Steps) {
    // They share no block, so neither reads what the other has left.
    let expected = [alone(steps, 1, &[0, 1, 2, 3]), alone(steps, 2, &[4, 5, 6, 7])];
    let mut first = Sequence::new(1, &[3, 9, 7, 1]);
    advance(steps, &mut first, BEFORE);
    // The second gets the first's blocks in the very step in which they leave, in another order.
    let mut second = Sequence::new(2, &[9, 7, 3, 2]);
    let ids = |blocks: &[u32]| blocks.iter().map(|&block| BlockId(block)).collect::<Vec<_>>();
    let host = [2, 0, 3].map(HostBlockId);
    let leave =
        StepPlan { saves: ids(&first.blocks[..3]).into_iter().zip(host).collect(), ..plan(&[&second]) };
    // They come back elsewhere, behind that step, in a step of the first alone.
    first.blocks = vec![5, 6, 0, 8];
    let back = StepPlan { loads: host.into_iter().zip(ids(&first.blocks[..3])).collect(), ..plan(&[&first]) };
    steps.launch(leave).unwrap();
    steps.launch(back).unwrap();
    second.take(&steps.finish().unwrap().1.rows[0]);
    first.take(&steps.finish().unwrap().1.rows[0]);
    for _ in 1..AFTER {
        steps.launch(plan(&[&first, &second])).unwrap();
        let rows = steps.finish().unwrap().1.rows;
        first.take(&rows[0]);
        second.take(&rows[1]);
    }
    assert!(first.outcomes == expected[0], "{:?} {:?}", first.outcomes, expected[0]);
    assert!(second.outcomes == expected[1][..AFTER], "{:?} {:?}", second.outcomes, expected[1]);
}

#[test]
fn a_sequence_goes_on_bit_for_bit_after_its_blocks_were_away() {
    check(&mut cpu());
    check(&mut cuda());
}

#[test]
fn copies_that_cannot_be_made_lose_the_device() {
    for mut steps in [cpu(), cuda()] {
        let sequence = Sequence::new(1, &[0, 1, 2]);
        let beyond = (BlockId(0), HostBlockId(HOST_BLOCKS as u32));
        let lost = steps.launch(StepPlan { saves: vec![beyond], ..plan(&[&sequence]) }).unwrap_err();
        assert!(lost.0.contains("there are 10 blocks, and 4 on the host"), "{lost}");
    }
}
