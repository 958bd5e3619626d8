//! The test of the test: bugs that are planted in the scheduler and the pool must be found.
//!
//! Each must be found within a thousand seeds of ten thousand events, which is what every `cargo test` runs on the scheduler as it is. The
//! search stops at the first seed that fails: mostly one of the first four.

use tidemill_engine::planted::{Bug, plant};

use crate::campaign::{self, Found};

const EVENTS: usize = 10_000;

/// The first seed that finds a bug, and of what it dies.
fn hunt(bug: Bug) -> Found {
    campaign::run(0..1000, EVENTS, || plant(Some(bug)))
        .err()
        .unwrap_or_else(|| panic!("{bug:?} was planted and is not found"))
}

/// A bug is found, by a check whose message contains one of these.
fn is_found(bug: Bug, by: &[&str]) {
    let Found { seed, failure } = hunt(bug);
    println!("{bug:?}: seed {seed}, {failure}");
    assert!(by.iter().any(|name| failure.message.contains(name)), "{bug:?}: seed {seed}, {failure}");
}

#[test]
fn a_weak_hash_alone_is_harmless() {
    let seen = campaign::run(0..200, EVENTS, || plant(Some(Bug::WeakHash)));
    let seen = seen.unwrap_or_else(|Found { seed, failure }| panic!("seed {seed} fails at {failure}"));
    assert!(seen.cached_tokens > 10_000, "what is found by four hashes is still found: {seen:?}");
}

#[test]
fn leak_on_abort_in_prefill() {
    is_found(Bug::LeakOnAbortInPrefill, &["I3", "owned by nobody"]);
}

#[test]
fn double_free() {
    is_found(Bug::DoubleFree, &["I1", "I2", "I3", "overflow", "two states"]);
}

#[test]
fn late_token() {
    is_found(Bug::LateToken, &["I3"]);
}

#[test]
fn stale_entry() {
    is_found(Bug::StaleEntry, &["I2", "registered once", "two states", "found by other tokens"]);
}

#[test]
fn partial_block() {
    is_found(Bug::PartialBlock, &["I2", "before it is computed"]);
}

#[test]
fn unresolved_block() {
    is_found(Bug::UnresolvedBlock, &["I2", "before it is computed"]);
}

#[test]
fn salt_ignored() {
    is_found(Bug::SaltIgnored, &["I2"]);
}

#[test]
fn tokens_not_compared() {
    is_found(Bug::TokensNotCompared, &["I2"]);
}

#[test]
fn beginning_not_compared() {
    is_found(Bug::BeginningNotCompared, &["I2"]);
}

#[test]
fn evicts_referenced() {
    is_found(Bug::EvictsReferenced, &["two states", "in the list once", "has no references"]);
}

#[test]
fn save_forgotten() {
    is_found(Bug::SaveForgotten, &["I2"]);
}

#[test]
fn host_freed_early() {
    is_found(Bug::HostFreedEarly, &["I2"]);
}

#[test]
fn host_freed_twice() {
    is_found(Bug::HostFreedTwice, &["in the list once", "I2"]);
}

#[test]
fn saves_repeated() {
    is_found(Bug::SavesRepeated, &["I2", "I8"]);
}

#[test]
fn loads_not_repeated() {
    is_found(Bug::LoadsNotRepeated, &["I2", "I8"]);
}

#[test]
fn budget_by_one() {
    is_found(Bug::BudgetByOne, &["I7"]);
}

#[test]
fn preempts_oldest() {
    is_found(Bug::PreemptsOldest, &["I6", "I2"]);
}

#[test]
fn preempts_in_flight() {
    is_found(Bug::PreemptsInFlight, &["in flight"]);
}

#[test]
fn preempted_loses_turn() {
    is_found(Bug::PreemptedLosesTurn, &["I6"]);
}

#[test]
fn overtaking() {
    is_found(Bug::Overtaking, &["I6"]);
}

#[test]
fn idling_saves_up() {
    is_found(Bug::IdlingSavesUp, &["I10"]);
}

#[test]
fn generation_is_free() {
    is_found(Bug::GenerationIsFree, &["I10"]);
}

#[test]
fn parked_goes_on() {
    is_found(Bug::ParkedGoesOn, &["parked"]);
}

#[test]
fn unpark_forgotten() {
    is_found(Bug::UnparkForgotten, &["I3", "I5", "parked"]);
}

#[test]
fn stale_penalties() {
    is_found(Bug::StalePenalties, &["I8"]);
}

#[test]
fn stale_form() {
    is_found(Bug::StaleForm, &["I8", "was free when it was planned"]);
}

#[test]
fn forced_without_room() {
    is_found(Bug::ForcedWithoutRoom, &["I7", "no slot"]);
}

#[test]
fn scores_skipped() {
    is_found(Bug::ScoresSkipped, &["I8", "skips"]);
}

#[test]
fn states_skipped() {
    is_found(Bug::StatesSkipped, &["I8", "skips"]);
}

#[test]
fn states_twice() {
    is_found(Bug::StatesTwice, &["I8"]);
}

#[test]
fn whole_cut() {
    is_found(Bug::WholeCut, &["I11", "I2"]);
}

#[test]
fn whole_shared() {
    is_found(Bug::WholeShared, &["I2", "I11"]);
}

#[test]
fn slot_taken_in_use() {
    is_found(Bug::SlotTakenInUse, &["I12"]);
}

#[test]
fn adapter_not_loaded() {
    is_found(Bug::AdapterNotLoaded, &["I12"]);
}
