//! In which order a launch runs its threads and asynchronous copies.

/// Which of the threads that can run is taken next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Order {
    /// In order of their index.
    #[default]
    Forward,
    /// In reverse.
    Reverse,
    /// At random; atomics are points of preemption too.
    Random,
    /// Warps have random priorities, and the one of highest priority runs as far as it can: one warp races ahead of all others.
    Priority,
}

/// When an asynchronous operation (`cp.async`, TMA, wgmma) takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Asynchronous {
    /// When it is issued.
    #[default]
    AtOnce,
    /// When it is waited for.
    Late,
    /// Either, at random.
    Random,
}

/// In which order threads and asynchronous operations of a launch run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Schedule {
    /// Order of threads.
    pub order: Order,
    /// For random choices.
    pub seed: u64,
    /// Completion of asynchronous operations.
    pub asynchronous: Asynchronous,
    /// Host threads that run blocks; 0: one per core.
    pub threads: u32,
}

impl Schedule {
    /// The four that every kernel test runs under.
    pub fn all() -> [Schedule; 4] {
        let schedule = |order, seed, asynchronous| Schedule { order, seed, asynchronous, threads: 0 };
        [
            schedule(Order::Forward, 0, Asynchronous::AtOnce),
            schedule(Order::Reverse, 0, Asynchronous::Late),
            schedule(Order::Random, 1, Asynchronous::Random),
            schedule(Order::Random, 2, Asynchronous::Late),
        ]
    }

    /// The four of [`Schedule::all`] and `extra` random ones: where a fault is searched for.
    pub fn many(extra: u64) -> Vec<Schedule> {
        let random = (1..=extra).map(|n| Schedule {
            order: if n % 2 == 0 { Order::Random } else { Order::Priority },
            seed: 100 + n,
            asynchronous: if n % 4 < 2 { Asynchronous::Late } else { Asynchronous::Random },
            threads: 0,
        });
        Schedule::all().into_iter().chain(random).collect()
    }
}
