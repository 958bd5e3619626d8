//! What must hold after every step: I1 to I7 of the project's reliability rules. I8 (streams) and I4, I9 (ends) are checked where
//! results arrive (`sim.rs`), I10 in `fairness.rs`. I11: a prompt that is computed whole is in one step alone, and nobody shares what that gives.

use std::collections::{BTreeMap, BTreeSet};

use tidemill_engine::{
    Pooling,
    adapter::AdapterSlot,
    ids::{BlockId, SeqId},
    kv::{BlockHash, KvEvent},
    scheduler::{PlanRow, Policy, StepPlan, WaitReason},
};

use crate::{
    model::Kv,
    scenario::Config,
    sim::{Live, Sim, Where},
};

/// What a block will hold once all planned steps are done: who wrote it, and what.
#[derive(Debug, Clone)]
struct Content {
    domain: u64,
    slots: Vec<Kv>,
}

/// What all blocks will hold once everything that was planned is done. Steps and copies run in the order of their plans, so this is what
/// the rows of the next plan will find.
#[derive(Debug)]
pub struct Contents {
    block_size: usize,
    blocks: Vec<Content>,
    host: Vec<Content>,
    /// What slots will hold.
    adapters: BTreeMap<AdapterSlot, u64>,
}

impl Contents {
    pub fn new(config: &Config) -> Self {
        let empty = Content { domain: u64::MAX, slots: vec![Kv::RUBBISH; config.block_size] };
        Self {
            block_size: config.block_size,
            blocks: vec![empty.clone(); config.blocks],
            host: vec![empty; config.host_blocks],
            adapters: BTreeMap::new(),
        }
    }

    fn copy(&mut self, plan: &StepPlan) {
        self.adapters.extend(plan.adapters.iter().map(|(slot, adapter)| (*slot, adapter.id.0)));
        for &(block, host) in &plan.saves {
            self.host[host.0 as usize] = self.blocks[block.0 as usize].clone();
        }
        for &(host, block) in &plan.loads {
            self.blocks[block.0 as usize] = self.host[host.0 as usize].clone();
        }
    }

    /// I2: what a row finds before its start is its own beginning, written by one of its own domain.
    fn read(&self, row: &PlanRow, live: &Live) {
        for position in 0..row.start {
            let block = &self.blocks[row.blocks[position / self.block_size].0 as usize];
            let seq = row.seq;
            assert_eq!(block.domain, live.domain, "I2: {seq:?} reads position {position} of another domain");
            let kv = block.slots[position % self.block_size];
            assert_eq!(
                Some(&kv),
                live.script.kv.get(position),
                "I2: {seq:?} reads position {position}, which is not its own"
            );
        }
    }

    fn write(&mut self, row: &PlanRow, live: &Live) {
        for position in row.start..row.end() {
            let block = &mut self.blocks[row.blocks[position / self.block_size].0 as usize];
            // Nobody shares what owes to tokens behind it.
            block.domain = if live.whole { u64::MAX } else { live.domain };
            // Behind the end of a script stands a token that ends its sequence, or one of a row that fails.
            block.slots[position % self.block_size] =
                live.script.kv.get(position).copied().unwrap_or(Kv::RUBBISH);
        }
    }
}

/// What a watcher of the prefix cache knows.
#[derive(Debug, Default)]
pub struct Cache {
    stored: BTreeSet<BlockHash>,
    events: Vec<KvEvent>,
}

impl Sim {
    /// I2, I7: a plan stays within its budgets, continues each sequence where it was left, and writes to no block that others see.
    pub fn check_plan(&mut self, plan: &StepPlan, decode_rows: usize, prefill: usize) {
        assert!(plan.rows.len() <= self.config.max_num_seqs, "I7: more rows than max_num_seqs");
        assert!(
            plan.num_tokens() <= self.config.max_num_batched_tokens,
            "I7: more tokens than max_num_batched_tokens"
        );
        let (decode, prompts) = plan.rows.split_at(decode_rows);
        let forced = |row: &PlanRow| {
            let live = &self.live[&row.seq];
            live.formed && row.start >= live.script.prompt_len && row.end() <= live.known
        };
        assert!(
            decode.iter().all(|row| row.input.num_tokens() == 1 || forced(row)),
            "I7: a decode row of several tokens that were not forced"
        );
        let decoded: usize = decode.iter().map(|row| row.input.num_tokens()).sum();
        let read: usize = prompts.iter().map(|row| row.input.num_tokens()).sum();
        let share = prefill.saturating_sub(decoded - decode_rows).max(prefill.min(1));
        let budget = share.max(usize::from(decode_rows == 0));
        let is_whole = |row: &PlanRow| self.live.get(&row.seq).is_some_and(|live| live.whole);
        // What must be read at once may exceed the wish, not the step: were it not for that it would never be read.
        let exceeds = prompts.len() == 1 && is_whole(&prompts[0]) && budget > 0;
        assert!(read <= budget || exceeds, "I7: {read} tokens for prompts, of {budget}");
        assert!(
            self.num_adapters(None) <= self.config.max_loras,
            "I12: more adapters than slots in the batch"
        );
        self.seen.adapters += plan.adapters.len() as u64;
        self.contents.copy(plan);
        for (at, row) in plan.rows.iter().enumerate() {
            let live = self.live.get(&row.seq).expect("I3: a plan for a sequence that is gone");
            assert!(!live.unread, "{:?} is to be parked, and was planned", row.seq);
            assert!(row.input.num_tokens() > 0 && !plan.rows[..at].iter().any(|other| other.seq == row.seq));
            assert!(
                row.end() < live.script.prompt_len + live.sampling.max_tokens,
                "computed past its last token"
            );
            let slots = row.blocks.len() * self.config.block_size;
            assert!(slots >= row.end(), "I7: a token without a slot");
            let all = (0, live.script.prompt_len);
            assert!(
                !live.whole || (row.start, row.end()) == all,
                "I11: the whole prompt of {:?} is split",
                row.seq
            );
            let adapter = row.adapter.map_or(Some(&0), |slot| self.contents.adapters.get(&slot));
            assert_eq!(adapter, Some(&live.adapter), "I12: {:?} is computed with another adapter", row.seq);
            self.contents.read(row, live);
            for &block in &row.blocks[row.start / self.config.block_size..] {
                assert_eq!(
                    self.pool.references(block),
                    1,
                    "I2: {:?} writes to {block:?}, which is shared",
                    row.seq
                );
                assert!(
                    self.pool.tokens_of(block).is_none(),
                    "I2: {:?} writes to {block:?}, which can be found",
                    row.seq
                );
            }
        }
        for row in &plan.rows {
            self.contents.write(row, &self.live[&row.seq]);
        }
    }

    /// Different adapters in the batch, with that of a sequence which is to come into it.
    fn num_adapters(&self, with: Option<&Live>) -> usize {
        let running = self.live.values().filter(|live| live.place == Where::Running);
        let adapters: BTreeSet<u64> =
            running.chain(with).map(|live| live.adapter).filter(|id| *id > 0).collect();
        adapters.len()
    }

    /// I6 within the batch: the first of it gets its row, and so advances.
    pub fn check_first(&mut self, plan: &StepPlan) {
        let running = self.live.iter().filter(|(_, live)| live.place == Where::Running && !live.unread);
        let first = running.map(|(&id, live)| self.rank(id, live)).min().map(|(_, id)| id);
        let has_row = plan.rows.iter().any(|row| Some(row.seq) == first);
        let (before, times) = self.left_out;
        let again = first == before && !has_row && !plan.rows.is_empty();
        self.left_out = (first, if again { times + 1 } else { usize::from(!has_row) });
        // Once for a token that the host must see, once more for want of a block.
        assert!(
            self.left_out.1 <= 2 || first.is_none(),
            "I6: {first:?}, the first of the batch, does not advance"
        );
    }

    /// Who comes first: by priority where it counts, then by age.
    fn rank(&self, id: SeqId, live: &Live) -> (i32, SeqId) {
        (if self.config.policy == Policy::Priority { live.priority } else { 0 }, id)
    }

    /// I6: the youngest of the lowest priority is preempted.
    pub fn check_victim(&self, victim: SeqId) {
        let own = self.rank(victim, &self.live[&victim]);
        for (&id, live) in self.live.iter().filter(|(_, live)| live.place == Where::Running) {
            assert!(self.rank(id, live) <= own, "I6: {victim:?} was preempted before {id:?}");
        }
        assert_eq!(self.live[&victim].in_flight, 0, "{victim:?} was preempted in flight");
    }

    /// I6: whoever was admitted was the first of its class to wait. Called with everybody where they were before.
    pub fn check_turn(&mut self, admitted: SeqId) {
        let class = |sim: &Self, id: SeqId| {
            let live = &sim.live[&id];
            let tenant = if sim.config.policy == Policy::Fair && !live.admitted { live.tenant } else { 0 };
            let (priority, id) = sim.rank(id, live);
            ((priority, !live.admitted), tenant, id)
        };
        let own = class(self, admitted);
        let ready = self.live.iter().filter(|(_, live)| live.place == Where::Waiting && !live.unread);
        let others: Vec<SeqId> = ready.map(|(&id, _)| id).filter(|&id| id != admitted).collect();
        let finds_none = |id: &SeqId| self.num_adapters(Some(&self.live[id])) > self.config.max_loras;
        let place = |id: &SeqId| {
            let (before, _, age) = class(self, *id);
            (before, age)
        };
        let without_slot: Vec<_> = others.iter().filter(|id| finds_none(id)).map(place).collect();
        for id in others {
            let (before, tenant, age) = class(self, id);
            let comes_first = before < own.0 || (before == own.0 && tenant == own.1 && age < own.2);
            // The other completions of a request wait for its prompt.
            // Those that need no slot overtake whoever finds none, and those with adapters behind it.
            let adapted = self.live[&id].adapter > 0 && self.live[&admitted].adapter == 0;
            if comes_first && adapted && without_slot.iter().any(|other| *other <= (before, age)) {
                self.seen.overtaken += 1;
                continue;
            }
            let waits = |sim: &mut Self| sim.scheduler.explain(id).and_then(|standing| standing.waits_for);
            assert!(
                !comes_first || waits(self) == Some(WaitReason::Prompt),
                "I6: {admitted:?} was admitted before {id:?}"
            );
        }
    }

    /// Whoever is admitted finds the first block of its chain if the prefix cache has it. (Later blocks may be there and out of reach: their
    /// beginning was given up and computed anew.)
    pub fn check_hit(&self, admitted: SeqId, cached_tokens: usize) {
        let (live, size) = (&self.live[&admitted], self.config.block_size);
        assert_eq!(cached_tokens % size, 0, "I2: only full blocks are shared");
        let scores = live.sampling.prompt_logprobs.is_some() && live.scored + 1 < live.script.prompt_len;
        let reusable = match live.pooling {
            _ if live.whole => 0,
            Some(Pooling::Cls) if live.pooled == 0 => 0,
            None if scores => live.scored,
            Some(Pooling::Last | Pooling::Cls) | None => live.known - 1,
            Some(_) => live.pooled.min(live.known - 1),
        };
        assert!(
            cached_tokens <= reusable,
            "{admitted:?} has nothing left to compute, or skips what is to be given"
        );
        if cached_tokens > 0 || reusable < size {
            return;
        }
        let first = &live.script.kv[..size];
        let has_it = |block: &BlockId| {
            let content = &self.contents.blocks[block.0 as usize];
            content.domain == live.domain && content.slots == first && self.pool.tokens_of(*block).is_some()
        };
        let missed = (0..self.config.blocks as u32).map(BlockId).find(has_it);
        assert_eq!(missed, None, "{admitted:?} did not find the block that it could have had");
    }

    /// What the scheduler says about sequences: all that are live, and no other.
    fn check_explanations(&mut self) {
        for (&id, live) in &self.live {
            let standing = self.scheduler.explain(id).expect("I3: it is live");
            assert_eq!(standing.is_parked, live.place == Where::Parked);
            assert_eq!(standing.completion_tokens, live.known - live.script.prompt_len);
            assert!(standing.num_computed <= live.script.tokens.len() && standing.ahead < self.live.len());
            match live.place {
                Where::Parked => assert_eq!(standing.waits_for, Some(WaitReason::Reader)),
                Where::Waiting => assert_eq!(standing.kv_blocks, 0, "I3: it waits and holds blocks"),
                Where::Running => assert!(
                    live.in_flight == 0 || standing.waits_for.is_none(),
                    "{id:?} is in flight and waits for {:?}",
                    standing.waits_for
                ),
            }
        }
    }

    /// I1, I2, I3, and what watchers of the prefix cache are told.
    pub fn check_state(&mut self, turn: u64) {
        // I1: free + cached + referenced = total; I2: as many references as tables hold. From the scheduler's own tables.
        self.scheduler.check();
        let counts = self.pool.counts();
        assert_eq!(counts.free + counts.cached + counts.owned, self.config.blocks, "I1");
        let place = |place| self.live.values().filter(|live| live.place == place).count();
        let (running, waiting, parked) = (place(Where::Running), place(Where::Waiting), place(Where::Parked));
        let told = (self.scheduler.num_running(), self.scheduler.num_waiting(), self.scheduler.num_parked());
        assert_eq!(told, (running, waiting, parked), "I3: running, waiting and parked");
        assert!(running <= self.config.max_num_seqs, "I7: rows of the batch");
        let halfway = |live: &Live| live.whole && live.place == Where::Running && live.in_flight == 0;
        assert!(!self.live.values().any(halfway), "I11: a whole prompt is in the batch and in no step");
        self.check_events();
        if turn.is_multiple_of(16) {
            self.check_index();
            self.check_explanations();
        }
    }

    fn check_events(&mut self) {
        let Cache { stored, events } = &mut self.cache;
        self.pool.take_events(events);
        for event in events.drain(..) {
            match event {
                KvEvent::Stored { hash, tokens, .. } => {
                    assert!(stored.insert(hash), "stored twice");
                    assert_eq!(tokens.len(), self.config.block_size, "only full blocks are stored");
                }
                KvEvent::Removed { hash } => assert!(stored.remove(&hash), "removed, but never stored"),
                KvEvent::Cleared => stored.clear(),
            }
        }
    }

    /// I2: what the prefix cache says of a block is what the device has in it.
    fn check_index(&self) {
        let is_due =
            |block| self.flights.iter().any(|plan| plan.loads.iter().any(|&(_, target)| target == block));
        let wires = self.wires.borrow();
        let size = self.config.block_size;
        let mut cached = 0;
        for block in (0..self.config.blocks as u32).map(BlockId) {
            let Some(tokens) = self.pool.tokens_of(block) else { continue };
            cached += usize::from(self.pool.references(block) == 0);
            let slots = &wires.slots[block.0 as usize * size..][..size];
            if is_due(block) {
                continue;
            }
            let kv: Vec<_> = slots.iter().map(|kv| kv.token).collect();
            assert_eq!(kv, tokens, "I2: {block:?} holds other tokens than the prefix cache says");
            assert_eq!(
                slots, self.contents.blocks[block.0 as usize].slots,
                "I2: {block:?} was written to since"
            );
        }
        assert_eq!(cached, self.pool.counts().cached, "I1: what is cached can be found");
        let told: BTreeSet<BlockHash> = self
            .pool
            .snapshot()
            .into_iter()
            .filter_map(|event| match event {
                KvEvent::Stored { hash, .. } => Some(hash),
                KvEvent::Removed { .. } | KvEvent::Cleared => None,
            })
            .collect();
        assert!(!self.config.caching || told == self.cache.stored, "events tell what the index holds");
    }

    /// I1, I3: at the end every block is free or cached, and a reset frees all.
    pub fn check_nothing_is_left(&mut self) {
        self.scheduler.check();
        self.check_index();
        let counts = self.pool.counts();
        assert_eq!(counts.owned, 0, "I3: blocks leaked");
        assert!(self.config.caching || counts.cached == 0, "I1: kept without a prefix cache");
        assert_eq!(self.pool.clear_cache(), counts.cached, "a reset frees what is cached");
        assert_eq!(
            (self.pool.counts().free, self.pool.num_host_blocks_used()),
            (counts.total, 0),
            "I1: blocks lost"
        );
        self.check_events();
        assert!(self.cache.stored.is_empty(), "events tell of a reset");
        let left = (self.scheduler.num_running(), self.scheduler.num_waiting(), self.scheduler.num_parked());
        assert_eq!(left, (0, 0, 0), "I3: somebody is left");
    }
}
