//! When the step queue copies blocks: on a runner whose blocks hold one number each and whose steps fail as the test says.

#![allow(clippy::unwrap_used)]

use std::{
    cell::{RefCell, RefMut},
    collections::VecDeque,
    rc::Rc,
};

use tidemill_engine::{
    ids::{BlockId, HostBlockId, SeqId, TokenId},
    runner::{BlockCopy, Runner, RunnerError, StepQueue},
    scheduler::{PlanRow, RowOutput, RowResult, StepOutput, StepPlan, TokenInput},
};

/// What a step leaves that fails.
const RUBBISH: u32 = 9999;

/// What the queue asked of the runner.
#[derive(Debug, Clone, PartialEq)]
enum Call {
    Copy(Vec<BlockCopy>),
    /// The numbers of the sequences.
    Launch(Vec<u64>),
    Wait,
}

/// How a step ends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    /// Its launch fails.
    Refused,
    /// It writes rubbish and fails when it is waited for.
    Failed,
}

#[derive(Default)]
struct State {
    blocks: [u32; 8],
    host: [u32; 8],
    calls: Vec<Call>,
    /// By launch, counted from 0.
    ends: Vec<(usize, End)>,
    launches: usize,
    in_flight: VecDeque<Result<StepOutput, RunnerError>>,
    /// How a copy fails, if it does.
    copy_fails: Option<fn() -> RunnerError>,
}

/// A row reads its first block, which its result says, and then writes its token to it. Everything is done when it is queued: the order is
/// what counts.
#[derive(Clone, Default)]
struct Fake(Rc<RefCell<State>>);

impl Fake {
    fn state(&self) -> RefMut<'_, State> {
        self.0.borrow_mut()
    }

    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.state().calls)
    }
}

impl Runner for Fake {
    fn launch(&mut self, plan: &StepPlan) -> Result<(), RunnerError> {
        let mut state = self.state();
        state.calls.push(Call::Launch(plan.rows.iter().map(|row| row.seq.0).collect()));
        let launch = state.launches;
        state.launches += 1;
        let end = state.ends.iter().find(|(at, _)| *at == launch).map(|&(_, end)| end);
        if end == Some(End::Refused) {
            return Err(RunnerError::Step("refused".into()));
        }
        let mut rows = Vec::new();
        for row in &plan.rows {
            let block = row.blocks[0].0 as usize;
            rows.push(result(state.blocks[block]));
            let written = row.input.known()[0].0;
            state.blocks[block] = if end == Some(End::Failed) { RUBBISH } else { written };
        }
        state.in_flight.push_back(match end {
            None => Ok(StepOutput { rows }),
            Some(_) => Err(RunnerError::Step("failed".into())),
        });
        Ok(())
    }

    fn wait(&mut self) -> Result<StepOutput, RunnerError> {
        let mut state = self.state();
        state.calls.push(Call::Wait);
        state.in_flight.pop_front().unwrap()
    }

    fn is_done(&mut self) -> bool {
        false
    }

    fn copy(&mut self, copies: &[BlockCopy]) -> Result<(), RunnerError> {
        let mut state = self.state();
        state.calls.push(Call::Copy(copies.to_vec()));
        if let Some(error) = state.copy_fails {
            return Err(error());
        }
        for copy in copies {
            match *copy {
                BlockCopy::Save(block, host) => state.host[host.0 as usize] = state.blocks[block.0 as usize],
                BlockCopy::Load(host, block) => state.blocks[block.0 as usize] = state.host[host.0 as usize],
            }
        }
        Ok(())
    }
}

fn result(read: u32) -> RowResult {
    RowResult::Done(RowOutput {
        sampled: Some(TokenId(read)),
        logprobs: None,
        prompt_logprobs: Vec::new(),
        states: Vec::new(),
    })
}

/// Sequence `seq` reads `block`, then writes its own number there.
fn row(seq: u64, block: u32) -> PlanRow {
    PlanRow {
        seq: SeqId(seq),
        start: 0,
        input: TokenInput::Known(vec![TokenId(seq as u32)]),
        blocks: vec![BlockId(block)],
        sample: None,
        score_at: 0..0,
        targets: Vec::new(),
        score_top: 0,
        pool_at: 0..0,
        segments: None,
        adapter: None,
    }
}

fn plan(rows: &[PlanRow], saves: &[(u32, u32)], loads: &[(u32, u32)]) -> StepPlan {
    StepPlan {
        rows: rows.to_vec(),
        saves: saves.iter().map(|&(block, host)| (BlockId(block), HostBlockId(host))).collect(),
        loads: loads.iter().map(|&(host, block)| (HostBlockId(host), BlockId(block))).collect(),
        adapters: Vec::new(),
    }
}

fn save(block: u32, host: u32) -> BlockCopy {
    BlockCopy::Save(BlockId(block), HostBlockId(host))
}

fn load(host: u32, block: u32) -> BlockCopy {
    BlockCopy::Load(HostBlockId(host), BlockId(block))
}

fn launch(seqs: &[u64]) -> Call {
    Call::Launch(seqs.to_vec())
}

/// Block `i` holds `10 + i`, host block `i` `20 + i`.
fn start(ends: &[(usize, End)]) -> (Fake, StepQueue<Fake>) {
    let fake = Fake::default();
    let mut state = fake.state();
    state.blocks = std::array::from_fn(|i| 10 + i as u32);
    state.host = std::array::from_fn(|i| 20 + i as u32);
    state.ends = ends.to_vec();
    drop(state);
    (fake.clone(), StepQueue::new(fake))
}

fn finish(steps: &mut StepQueue<Fake>) -> Vec<RowResult> {
    steps.finish().unwrap().1.rows
}

#[test]
fn saves_come_before_loads_and_both_right_before_the_launch() {
    let (fake, mut steps) = start(&[]);
    steps.launch(plan(&[row(1, 0)], &[], &[])).unwrap();
    // Block 3 is saved, and then loaded with something else.
    steps.launch(plan(&[row(2, 3)], &[(0, 1), (3, 2)], &[(5, 3)])).unwrap();
    assert_eq!(finish(&mut steps), [result(10)]);
    assert_eq!(finish(&mut steps), [result(25)]);
    let calls = [
        launch(&[1]),
        Call::Copy(vec![save(0, 1), save(3, 2), load(5, 3)]),
        launch(&[2]),
        Call::Wait,
        Call::Wait,
    ];
    assert_eq!(fake.calls(), calls, "a plan without copies asks for none");
    assert_eq!(fake.state().host[1..3], [1, 13], "block 0 after the step before, block 3 before the load");
}

#[test]
fn a_step_that_is_launched_again_is_loaded_again_but_not_saved_again() {
    let (fake, mut steps) = start(&[(0, End::Failed)]);
    // Sequence 2 is gone when the second step is planned: its block is loaded for sequence 4.
    steps.launch(plan(&[row(1, 0), row(2, 3)], &[], &[])).unwrap();
    steps.launch(plan(&[row(4, 3), row(5, 6)], &[(6, 1)], &[(5, 3)])).unwrap();
    assert_eq!(finish(&mut steps).len(), 2);
    assert_eq!(finish(&mut steps)[0], result(25), "not what sequence 2 wrote when it was repeated");
    assert_eq!(fake.state().host[1], 16, "not what the step itself wrote when it was launched first");
    let calls = [
        launch(&[1, 2]),
        Call::Copy(vec![save(6, 1), load(5, 3)]),
        launch(&[4, 5]),
        // The failure, and the step behind it.
        Call::Wait,
        Call::Wait,
        launch(&[1]),
        Call::Wait,
        launch(&[2]),
        Call::Wait,
        Call::Copy(vec![load(5, 3)]),
        launch(&[4, 5]),
        Call::Wait,
    ];
    assert_eq!(fake.calls(), calls);
}

#[test]
fn a_step_behind_one_that_was_not_launched_is_copied_when_its_turn_comes() {
    let (fake, mut steps) = start(&[(0, End::Refused)]);
    steps.launch(plan(&[row(1, 0), row(2, 3)], &[(0, 0)], &[])).unwrap();
    steps.launch(plan(&[row(4, 3)], &[(3, 1)], &[(5, 3)])).unwrap();
    let refused = [Call::Copy(vec![save(0, 0)]), launch(&[1, 2])];
    assert_eq!(fake.calls(), refused, "nothing of the second step");
    assert_eq!(finish(&mut steps), [result(10), result(13)]);
    let calls = [
        launch(&[1]),
        Call::Wait,
        launch(&[2]),
        Call::Wait,
        Call::Copy(vec![save(3, 1), load(5, 3)]),
        launch(&[4]),
    ];
    assert_eq!(fake.calls(), calls);
    assert_eq!(finish(&mut steps), [result(25)]);
    assert_eq!(fake.state().host[..2], [10, 2], "saved before and after the first step, in order");
}

#[test]
fn rows_that_are_repeated_alone_find_the_copies_made_and_none_is_made_twice() {
    for end in [End::Refused, End::Failed] {
        let (fake, mut steps) = start(&[(0, end)]);
        // The first row reads what was loaded; the second writes over a block that was saved.
        let copies = Call::Copy(vec![save(4, 1), load(5, 3)]);
        steps.launch(plan(&[row(1, 3), row(2, 4)], &[(4, 1)], &[(5, 3)])).unwrap();
        let rows = finish(&mut steps);
        if end == End::Refused {
            assert_eq!(rows[0], result(25));
        }
        assert_eq!(fake.state().host[1], 14);
        let mut calls = vec![copies, launch(&[1, 2])];
        calls.extend((end == End::Failed).then_some(Call::Wait));
        calls.extend([launch(&[1]), Call::Wait, launch(&[2]), Call::Wait]);
        assert_eq!(fake.calls(), calls, "{end:?}");
    }
}

#[test]
fn a_launch_that_fails_behind_a_step_that_fails_is_loaded_for_each_of_its_launches() {
    let (fake, mut steps) = start(&[(0, End::Failed), (1, End::Refused)]);
    steps.launch(plan(&[row(1, 0), row(2, 3)], &[], &[])).unwrap();
    steps.launch(plan(&[row(4, 3)], &[(6, 1)], &[(5, 3)])).unwrap();
    finish(&mut steps);
    assert_eq!(finish(&mut steps), [result(25)]);
    let copies: Vec<_> = fake.calls().into_iter().filter(|call| matches!(call, Call::Copy(_))).collect();
    assert_eq!(copies, [Call::Copy(vec![save(6, 1), load(5, 3)]), Call::Copy(vec![load(5, 3)])]);
}

#[test]
fn a_copy_that_fails_loses_the_device() {
    let failures: [fn() -> RunnerError; 2] =
        [|| RunnerError::Step("one copy failed".into()), || panic!("one copy panicked")];
    for failure in failures {
        let (fake, mut steps) = start(&[]);
        fake.state().copy_fails = Some(failure);
        let lost = steps.launch(plan(&[row(1, 0)], &[(0, 0)], &[])).unwrap_err();
        assert!(lost.0.contains("blocks could not be copied: one copy"), "{lost}");
    }
}

#[test]
fn a_runner_without_host_blocks_refuses_copies() {
    struct Plain;
    impl Runner for Plain {
        fn launch(&mut self, _: &StepPlan) -> Result<(), RunnerError> {
            Ok(())
        }

        fn wait(&mut self) -> Result<StepOutput, RunnerError> {
            Ok(StepOutput { rows: vec![result(1)] })
        }

        fn is_done(&mut self) -> bool {
            true
        }
    }
    let mut steps = StepQueue::new(Plain);
    steps.launch(plan(&[row(1, 0)], &[], &[])).unwrap();
    steps.finish().unwrap();
    let lost = steps.launch(plan(&[row(1, 0)], &[], &[(3, 2)])).unwrap_err();
    assert!(lost.0.contains("Load(HostBlockId(3), BlockId(2)) on a runner without host blocks"), "{lost}");
}
