//! Scenarios that failed once, as the simulator shrank them, and what tests the simulator itself.

use std::time::Duration;

use tidemill_engine::{
    planted::{Bug, plant},
    scheduler::Policy,
};

use crate::{
    campaign::attempt,
    scenario::{Arrival, Config, Event, Scenario, Whom},
    shrink::shrink,
};

/// Runs what a failing simulation prints.
fn replay<const N: usize>(config: Config, events: [Event; N]) {
    let scenario = Scenario { config, events: events.into() };
    attempt(&scenario).unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn the_same_seed_gives_the_same_simulation() {
    let scenario = Scenario::from_seed(7, 2000);
    assert_eq!(scenario, Scenario::from_seed(7, 2000));
    assert_eq!(
        scenario.events[..500],
        Scenario::from_seed(7, 500).events,
        "a longer one begins like a shorter one"
    );
    let [first, second] = [(); 2].map(|()| format!("{:?}", attempt(&scenario).unwrap()));
    assert_eq!(first, second);
}

#[test]
fn a_failing_scenario_is_made_small_and_still_fails() {
    plant(Some(Bug::SaltIgnored));
    let (scenario, failure) = (0..100)
        .find_map(|seed| {
            let scenario = Scenario::from_seed(seed, 2000);
            let failure = attempt(&scenario).err()?;
            Some((scenario, failure))
        })
        .expect("the bug is found");
    let (smallest, smaller) = shrink(scenario, &failure, Duration::from_secs(20));
    assert!(
        smallest.events.len() <= 12,
        "two prompts that begin alike, and steps to compute them:\n{smallest}"
    );
    assert_eq!(smaller.place, failure.place);
    assert_eq!(attempt(&smallest).unwrap_err().place, failure.place, "it replays");
    plant(None);
    attempt(&smallest).expect("without the bug it passes");
}

#[test]
fn blocks_of_a_chain_on_the_host_are_not_given_up_for_one_another() {
    let config = Config {
        key: 0,
        block_size: 1,
        blocks: 9,
        host_blocks: 9,
        max_num_seqs: 3,
        max_num_batched_tokens: 40,
        long_prefill_token_threshold: 40,
        policy: Policy::Fcfs,
        weights: [1, 1, 1, 1],
        caching: true,
        depth: 2,
        max_live: 13,
        max_loras: 0,
    };
    let plan = || Event::Plan { prefill: 40, eager: false };
    replay(
        config,
        [
            Event::Arrive(Arrival { id: 25, n: 2, max_tokens: 4, ..Arrival::default() }),
            plan(),
            plan(),
            Event::Resolve,
            Event::Resolve,
            plan(),
            plan(),
            Event::Resolve,
            Event::Resolve,
            Event::Arrive(Arrival {
                id: 28,
                tail: 0,
                follows: Some(Whom::Request(25)),
                ..Arrival::default()
            }),
            Event::Arrive(Arrival { id: 29, max_tokens: 2, ..Arrival::default() }),
            plan(),
            Event::Resolve,
            plan(),
            plan(),
            Event::Resolve,
            Event::Resolve,
            Event::Arrive(Arrival {
                id: 31,
                tail: 0,
                follows: Some(Whom::Request(29)),
                max_tokens: 3,
                salt: 1,
                ..Arrival::default()
            }),
            Event::Arrive(Arrival {
                id: 32,
                tail: 0,
                follows: Some(Whom::Request(28)),
                ..Arrival::default()
            }),
        ],
    );
}
