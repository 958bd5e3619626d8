//! Bugs that tests plant, to see that they are found (`tests/scheduler_sim/planted.rs`).
//!
//! With the feature `planted`, which only this crate's own tests ask for, a thread can be told to behave wrongly in one way. Without it
//! [`planted`] is `false` at compile time and nothing of this is in the binary.

/// A way to go wrong. The places that ask for one are one line each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// An abort while the prompt is read gives no blocks back.
    LeakOnAbortInPrefill,
    /// A block that nobody references any more is freed twice.
    DoubleFree,
    /// A result for a sequence that is gone is handed out.
    LateToken,
    /// A block that is given up can still be found.
    StaleEntry,
    /// A block can be found before all of it is computed.
    PartialBlock,
    /// A block can be found as soon as it is planned.
    UnresolvedBlock,
    /// Sequences of different salts share blocks.
    SaltIgnored,
    /// Hashes have two bits. Harmless: what is found is compared.
    WeakHash,
    /// The same, and the tokens of what is found are not compared.
    TokensNotCompared,
    /// The same, and the beginning of what is found is not compared.
    BeginningNotCompared,
    /// A cached block that is referenced again can still be given up.
    EvictsReferenced,
    /// What is given up on the device is not copied to the host.
    SaveForgotten,
    /// A place in host memory is free before the copy from it is done.
    HostFreedEarly,
    /// A place in host memory is freed twice.
    HostFreedTwice,
    /// Blocks are saved again when a step is launched again.
    SavesRepeated,
    /// Blocks are not loaded again when a step is launched again.
    LoadsNotRepeated,
    /// A step has one token too many.
    BudgetByOne,
    /// The first of the batch is preempted.
    PreemptsOldest,
    /// Blocks are taken from sequences in flight.
    PreemptsInFlight,
    /// Whoever was preempted is not the first of its class again.
    PreemptedLosesTurn,
    /// Whoever is admitted is not the first of its class.
    Overtaking,
    /// A tenant that comes back keeps the service that it left unused.
    IdlingSavesUp,
    /// Tenants are charged for prompts alone.
    GenerationIsFree,
    /// A parked sequence goes on.
    ParkedGoesOn,
    /// A parked sequence is forgotten when it is read again.
    UnparkForgotten,
    /// A token is chosen with the counts of the step before it.
    StalePenalties,
    /// A token is chosen among those that were allowed before the one in front of it.
    StaleForm,
    /// Tokens that were forced find no slot of their own.
    ForcedWithoutRoom,
    /// Prompt positions that are found in the prefix cache are not scored.
    ScoresSkipped,
    /// The same for those whose hidden states count.
    StatesSkipped,
    /// A hidden state that is computed again counts again.
    StatesTwice,
    /// A slot is given away although somebody in the batch has the adapter that it holds.
    SlotTakenInUse,
    /// A slot is given to an adapter and keeps what it held.
    AdapterNotLoaded,
    /// A prompt that must be computed in one step is cut as others are.
    WholeCut,
    /// What such a prompt computes can be found by others.
    WholeShared,
}

#[cfg(feature = "planted")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Makes this thread go wrong from now on, or right again.
#[cfg(feature = "planted")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether this thread is to go wrong in this way.
#[cfg(feature = "planted")]
pub(crate) fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Nobody goes wrong on purpose.
#[cfg(not(feature = "planted"))]
#[inline(always)]
pub(crate) const fn planted(_: Bug) -> bool {
    false
}
