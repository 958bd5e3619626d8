//! The simulated device: blocks of keys and values, host memory, and a queue of steps and copies that runs behind the host.

use std::{cell::RefCell, collections::BTreeMap, collections::VecDeque, rc::Rc};

use tidemill_engine::{
    adapter::{Adapter, AdapterId, AdapterSlot},
    ids::{BlockId, SeqId, TokenId},
    output::TokenLogprobs,
    runner::{BlockCopy, Runner, RunnerError},
    scheduler::{PlanRow, RowOutput, RowResult, SamplePlan, StepOutput, StepPlan, TokenInput},
};

use crate::model::{Attention, Fate, How, Kv};

/// What the simulation tells its device, and learns from it.
#[derive(Debug, Default)]
pub struct Wires {
    /// The next step of several rows cannot be launched.
    pub fail_launch: bool,
    /// The next step of several rows that is launched fails.
    pub fail_step: bool,
    /// The device computes what is launched at once, not when it is waited for.
    pub eager: bool,
    /// Sequences with which something goes wrong.
    pub fates: BTreeMap<SeqId, Fate>,
    /// Launches and steps that have failed.
    pub failures: usize,
    /// Blocks copied to the host, and from it.
    pub copies: [usize; 2],
    /// Keys and values, block by block.
    pub slots: Vec<Kv>,
}

/// Something queued on the device.
enum Work {
    Step { plan: StepPlan, fails: bool },
    Copies(Vec<BlockCopy>),
    Adapter(AdapterSlot, AdapterId),
}

/// Simulated keys and values, and a queue of steps.
pub struct Device {
    wires: Rc<RefCell<Wires>>,
    block_size: usize,
    host: Vec<Kv>,
    /// What slots hold.
    adapters: BTreeMap<AdapterSlot, u64>,
    /// What the last step sampled, per row of its logits.
    sampled: Vec<TokenId>,
    queue: VecDeque<Work>,
    done: VecDeque<Result<StepOutput, RunnerError>>,
}

impl Device {
    pub fn new(wires: Rc<RefCell<Wires>>, block_size: usize, blocks: usize, host_blocks: usize) -> Self {
        wires.borrow_mut().slots = vec![Kv::RUBBISH; blocks * block_size];
        Self {
            wires,
            block_size,
            host: vec![Kv::RUBBISH; host_blocks * block_size],
            adapters: BTreeMap::new(),
            sampled: Vec::new(),
            queue: VecDeque::new(),
            done: VecDeque::new(),
        }
    }

    fn slot(&self, blocks: &[BlockId], position: usize) -> usize {
        blocks[position / self.block_size].0 as usize * self.block_size + position % self.block_size
    }

    fn fate(&self, seq: SeqId) -> Fate {
        self.wires.borrow().fates.get(&seq).copied().unwrap_or_default()
    }

    fn execute_next(&mut self) {
        match self.queue.pop_front() {
            Some(Work::Step { plan, fails }) => self.execute(&plan, fails),
            Some(Work::Copies(copies)) => copies.into_iter().for_each(|copy| self.copy_block(copy)),
            Some(Work::Adapter(slot, adapter)) => drop(self.adapters.insert(slot, adapter.0)),
            None => {}
        }
    }

    fn copy_block(&mut self, copy: BlockCopy) {
        let size = self.block_size;
        let slots = &mut self.wires.borrow_mut().slots;
        match copy {
            BlockCopy::Save(block, host) => self.host[host.0 as usize * size..][..size]
                .copy_from_slice(&slots[block.0 as usize * size..][..size]),
            BlockCopy::Load(host, block) => slots[block.0 as usize * size..][..size]
                .copy_from_slice(&self.host[host.0 as usize * size..][..size]),
        }
    }

    fn execute(&mut self, plan: &StepPlan, fails: bool) {
        let poisoned = |row: &PlanRow| matches!(self.fate(row.seq), Fate::Poison(tokens) if row.end() >= usize::from(tokens));
        let fails = fails || plan.rows.iter().any(poisoned);
        self.wires.borrow_mut().failures += usize::from(fails);
        let inputs: Vec<Vec<TokenId>> = plan.rows.iter().map(|row| self.input(row)).collect();
        for (row, tokens) in plan.rows.iter().zip(inputs) {
            self.write(row, &tokens, fails);
        }
        self.sampled.clear();
        let rows = plan.rows.iter().map(|row| self.result(row, fails)).collect();
        self.done.push_back(if fails {
            Err(RunnerError::Step("failed".into()))
        } else {
            Ok(StepOutput { rows })
        });
    }

    fn input(&self, row: &PlanRow) -> Vec<TokenId> {
        match &row.input {
            TokenInput::Known(tokens) => tokens.clone(),
            // Behind a step that failed to launch there may be none.
            &TokenInput::Sampled(row) => {
                vec![self.sampled.get(row as usize).copied().unwrap_or(Kv::RUBBISH.token)]
            }
        }
    }

    /// Writes keys and values, which owe to those before them: these are read through the block table.
    fn write(&self, row: &PlanRow, tokens: &[TokenId], fails: bool) {
        let slots = &mut self.wires.borrow_mut().slots;
        let adapter = row.adapter.map_or(0, |slot| self.adapters[&slot]);
        let mut previous = row.start.checked_sub(1).map(|before| slots[self.slot(&row.blocks, before)]);
        for (position, &token) in (row.start..).zip(tokens) {
            let kv = if fails { Kv::RUBBISH } else { Kv::after(previous, token, adapter) };
            slots[self.slot(&row.blocks, position)] = kv;
            previous = Some(kv);
        }
    }

    fn result(&mut self, row: &PlanRow, fails: bool) -> RowResult {
        let mut attention = Attention::default();
        let (mut scored, mut states) = (Vec::new(), Vec::new());
        if row.sample.is_some() || !row.targets.is_empty() || !row.pool_at.is_empty() {
            let slots = &self.wires.borrow().slots;
            for position in 0..row.end() {
                attention.read(slots[self.slot(&row.blocks, position)]);
                if row.pool_at.contains(&position) {
                    states.extend(attention.state());
                }
                if row.score_at.contains(&position) {
                    let token = row.targets[position - row.score_at.start];
                    scored.push(TokenLogprobs {
                        token,
                        logprob: attention.score(token),
                        rank: 1,
                        top: Vec::new(),
                    });
                }
            }
        }
        self.sampled.extend(row.targets.iter().map(|_| Kv::RUBBISH.token));
        let reaches = if row.pool_at.is_empty() { row.end() } else { row.pool_at.end };
        let broken = matches!(self.fate(row.seq), Fate::NotFinite(tokens) if reaches >= usize::from(tokens));
        if !row.pool_at.is_empty() && (fails || broken) {
            return RowResult::NotFinite;
        }
        let mut output = RowOutput { sampled: None, logprobs: None, prompt_logprobs: scored, states };
        let Some(sample) = &row.sample else { return RowResult::Done(output) };
        if fails || broken {
            self.sampled.push(Kv::RUBBISH.token);
            return RowResult::NotFinite;
        }
        let token = Self::choose(attention, sample);
        self.sampled.push(token);
        output.sampled = Some(token);
        RowResult::Done(output)
    }

    fn choose(attention: Attention, sample: &SamplePlan) -> TokenId {
        let how = How {
            counts: &sample.token_counts,
            forbid_stops: sample.forbid_stops,
            allowed: sample.allowed.as_deref(),
        };
        attention.choose(sample.seed, how)
    }
}

impl Runner for Device {
    fn launch(&mut self, plan: &StepPlan) -> Result<(), RunnerError> {
        let mut wires = self.wires.borrow_mut();
        // A row alone fails only by its own fault: what fails again when it is tried alone is lost.
        let several = plan.rows.len() > 1;
        if several && std::mem::take(&mut wires.fail_launch) {
            wires.failures += 1;
            return Err(RunnerError::Step("no launch".into()));
        }
        let fails = several && std::mem::take(&mut wires.fail_step);
        let eager = wires.eager;
        drop(wires);
        self.queue.push_back(Work::Step { plan: plan.clone(), fails });
        while eager && !self.queue.is_empty() {
            self.execute_next();
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<StepOutput, RunnerError> {
        while self.done.is_empty() {
            self.execute_next();
        }
        self.done.pop_front().unwrap()
    }

    fn is_done(&mut self) -> bool {
        !self.done.is_empty()
    }

    fn set_adapter(&mut self, slot: AdapterSlot, adapter: &Adapter) -> Result<(), RunnerError> {
        self.queue.push_back(Work::Adapter(slot, adapter.id));
        Ok(())
    }

    fn copy(&mut self, copies: &[BlockCopy]) -> Result<(), RunnerError> {
        for copy in copies {
            self.wires.borrow_mut().copies[usize::from(matches!(copy, BlockCopy::Load(..)))] += 1;
        }
        self.queue.push_back(Work::Copies(copies.to_vec()));
        Ok(())
    }
}
