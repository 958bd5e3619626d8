//! Whose turn it is.

/// Order of the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// First come, first served.
    #[default]
    Fcfs,
    /// The lowest value of a request's priority first; first come, first served among equals. A request takes the place of running ones of
    /// lower priority when there is no other.
    Priority,
    /// Tenants share by their weights: the one that has been given the least is served next.
    Fair,
}

/// Why a sequence has no row of the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitReason {
    /// All rows of the batch are taken.
    Rows {
        /// So many there are.
        max_num_seqs: usize,
    },
    /// Too few KV blocks are free.
    Blocks {
        /// What its prompt needs.
        needed: usize,
        /// What could be had.
        available: usize,
    },
    /// The batch has rows of other adapters in all slots.
    Adapter {
        /// So many there are.
        max_loras: usize,
    },
    /// The tokens of the step went to others.
    Budget {
        /// Tokens of a step.
        max_num_batched_tokens: usize,
    },
    /// Others came first or have a better priority, and wait too.
    Turn {
        /// How many.
        ahead: usize,
    },
    /// Its tenant has been given more than others that wait.
    Fairness {
        /// How much more than the one that was given least, in tokens of service by weight.
        surplus: u64,
    },
    /// Another completion of the same request reads the prompt for it.
    Prompt,
    /// Its client does not read.
    Reader,
}
