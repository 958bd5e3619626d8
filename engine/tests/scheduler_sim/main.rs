//! The scheduler in a simulator: no kernels, no threads, no clock.
//!
//! A simulation is data: a machine and a list of events (`scenario.rs`), made from a seed. Running it (`sim.rs`) is deterministic. The
//! simulated model (`model.rs`) chooses its next token by all keys and values before it, which the simulated device (`device.rs`) reads back
//! through the block table from simulated blocks, so those that are lost, stale, duplicated or shared by mistake change the output. The device
//! runs up to two steps behind the host, copies blocks to and from host memory, and puts in the tokens that the host did not know. Steps fail,
//! alone and in company, and leave rubbish behind. After every event everything that must hold is checked: the invariants I1 to I12, which are
//! named where they are checked (`check.rs`, `sim.rs`, `results.rs`, `fairness.rs`).
//!
//! Some sequences are constrained by chance (`forms.rs`): tokens are masked, forced, promised to be free; sequences are complete, or cannot go on.
//!
//! A seed that fails is printed with the line that replays it, and then shrunk (`shrink.rs`): the smallest scenario found is printed as a
//! test function's body, for `regressions.rs`.
//!
//! That the simulator finds bugs is tested by planting some (`planted.rs`).
//!
//! More seeds, or longer ones:
//!
//! ```text
//! SIM_SEEDS=100000 SIM_EVENTS=10000 SIM_FIRST_SEED=1000 \
//!     cargo test -p tidemill-engine --test scheduler_sim -- --ignored soak --nocapture
//! ```
//!
//! `SIM_SEEDS` is 10,000 unless it is given, `SIM_EVENTS` 10,000, `SIM_FIRST_SEED` 1,000: the first seeds are run by every `cargo test`.

#![allow(clippy::unwrap_used)]

mod arrivals;
mod campaign;
mod check;
mod device;
mod fairness;
mod forms;
mod model;
mod planted;
mod policies;
mod regressions;
mod results;
mod rig;
mod scenario;
mod seen;
mod shrink;
mod sim;
mod standing;
mod steps;

use std::env;

use seen::Seen;
use tidemill_engine::sampling::Sampling;

fn sampling(max_tokens: usize, min_tokens: usize) -> Sampling {
    Sampling {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: Vec::new(),
        seed: 0,
        max_tokens,
        min_tokens,
        stop_token_ids: Vec::new(),
        eos_token_ids: vec![model::EOS],
        logprobs: None,
        prompt_logprobs: None,
    }
}

#[test]
fn invariants_hold_over_ten_million_events() {
    let seen = campaign::must_pass(0..1000, 10_000);
    // The simulation is worth nothing when it does not reach the interesting states.
    let Seen { finished, embedded, broken, refused, expired, preemptions, resumed, parked, .. } = seen;
    let Seen { fed_back, aborts_over_two_steps, failed_steps, shortages, late_rows, .. } = seen;
    let Seen {
        cached_tokens,
        saves,
        loads,
        compared,
        forced,
        complete,
        unformed,
        whole,
        adapters,
        overtaken,
        ..
    } = seen;
    let ends = finished > 500_000
        && embedded > 50_000
        && whole > 10_000
        && broken > 20_000
        && refused > 20_000
        && expired > 10_000;
    let moves = preemptions > 50_000 && resumed > 50_000 && parked > 50_000 && shortages > 100_000;
    let overlap = fed_back > 1_000_000 && aborts_over_two_steps > 10_000 && late_rows > 50_000;
    let faults = failed_steps > 50_000;
    let cache = cached_tokens > 2_000_000 && saves > 500_000 && loads > 20_000;
    let formed = forced > 200_000 && complete > 20_000 && unformed > 2_000;
    let adapted = adapters > 50_000 && overtaken > 10_000;
    assert!(
        ends && moves && overlap && faults && cache && formed && adapted && compared > 1_000_000,
        "{seen:?}"
    );
}

/// A number from the environment, for longer runs.
fn asked(name: &str, otherwise: u64) -> u64 {
    match env::var(name) {
        Ok(value) => value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")),
        Err(_) => otherwise,
    }
}

#[test]
#[ignore = "a soak of any length, see the header; every test run does the first 1,000 seeds"]
fn soak() {
    let first = asked("SIM_FIRST_SEED", 1000);
    let seeds = asked("SIM_SEEDS", 10_000);
    let events = asked("SIM_EVENTS", 10_000) as usize;
    let seen: Seen = campaign::must_pass(first..first + seeds, events);
    println!("{seeds} seeds of {events} events from {first} on: {seen:?}");
}
