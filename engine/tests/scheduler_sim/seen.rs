//! What a simulation came by.

/// How often the simulation came by the states that matter.
#[derive(Debug, Default, Clone, Copy)]
pub struct Seen {
    pub finished: u64,
    pub embedded: u64,
    /// Of these, prompts that were read in one step.
    pub whole: u64,
    pub broken: u64,
    pub refused: u64,
    pub expired: u64,
    pub preemptions: u64,
    pub resumed: u64,
    pub parked: u64,
    pub fed_back: u64,
    pub aborts_over_two_steps: u64,
    pub failed_steps: u64,
    /// Plans that left a row out for want of a block, behind a step in flight.
    pub shortages: u64,
    /// Rows that came too late: their sequence had ended.
    pub late_rows: u64,
    /// Tokens found in the prefix cache.
    pub cached_tokens: u64,
    pub saves: u64,
    pub loads: u64,
    /// Tokens that a constraint forced.
    pub forced: u64,
    /// Sequences whose constraint said that they were complete.
    pub complete: u64,
    /// Sequences that could not keep their form.
    pub unformed: u64,
    /// Adapters that came into a slot.
    pub adapters: u64,
    /// Sequences without an adapter that overtook one which found no slot.
    pub overtaken: u64,
    /// Comparisons of two tenants' service while both waited.
    pub compared: u64,
}

impl Seen {
    pub fn add(&mut self, other: &Self) {
        let Self {
            finished, embedded, broken, refused, expired, preemptions, resumed, parked, fed_back, ..
        } = other;
        let Self { aborts_over_two_steps, failed_steps, shortages, late_rows, cached_tokens, .. } = other;
        let Self { saves, loads, compared, forced, complete, unformed, whole, adapters, overtaken, .. } =
            other;
        self.finished += finished;
        self.embedded += embedded;
        self.whole += whole;
        self.broken += broken;
        self.refused += refused;
        self.expired += expired;
        self.preemptions += preemptions;
        self.resumed += resumed;
        self.parked += parked;
        self.fed_back += fed_back;
        self.aborts_over_two_steps += aborts_over_two_steps;
        self.failed_steps += failed_steps;
        self.shortages += shortages;
        self.late_rows += late_rows;
        self.cached_tokens += cached_tokens;
        self.saves += saves;
        self.loads += loads;
        self.compared += compared;
        self.forced += forced;
        self.complete += complete;
        self.unformed += unformed;
        self.adapters += adapters;
        self.overtaken += overtaken;
    }
}
