//! Scenarios that failed once, as the simulator shrank them.
