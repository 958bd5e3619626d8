//! Taking the time of what is queued on a device.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tidemill_kernels::{
    KernelError,
    cuda::{
        driver::Driver,
        memory::{Event, Graph},
    },
};

use crate::summary::median;

/// Fewest and most repetitions of a case.
const REPETITIONS: [usize; 2] = [7, 200];

/// What is timed.
pub trait Work {
    /// Queues what must happen before every repetition and is not timed.
    ///
    /// # Errors
    /// What an op returned.
    fn prepare(&mut self) -> Result<(), KernelError> {
        Ok(())
    }

    /// Queues the work: the same ops with the same arguments in every call. No allocation, no wait.
    ///
    /// # Errors
    /// What an op returned.
    fn queue(&mut self) -> Result<(), KernelError>;
}

impl<F: FnMut() -> Result<(), KernelError>> Work for F {
    fn queue(&mut self) -> Result<(), KernelError> {
        self()
    }
}

/// Takes the time.
pub trait Clock {
    /// Seconds of one repetition of `work`: the median of as many as fit into `budget`.
    ///
    /// # Errors
    /// What an op or the device returned.
    fn seconds(&self, work: &mut dyn Work, budget: Duration) -> Result<f64, KernelError>;

    /// Seconds that the device was busy with what `queue` queues, from its first op to its last, once.
    ///
    /// # Errors
    /// What an op or the device returned.
    fn once(&self, queue: &mut dyn FnMut() -> Result<(), KernelError>) -> Result<f64, KernelError>;
}

fn repeat(budget: Duration, mut one: impl FnMut() -> Result<f64, KernelError>) -> Result<f64, KernelError> {
    let [least, most] = REPETITIONS;
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.len() < least || (start.elapsed() < budget && times.len() < most) {
        times.push(one()?);
    }
    Ok(median(&times))
}

/// For ops that have run when their call returns.
pub struct WallClock;

impl Clock for WallClock {
    fn seconds(&self, work: &mut dyn Work, budget: Duration) -> Result<f64, KernelError> {
        repeat(budget, || {
            work.prepare()?;
            self.once(&mut || work.queue())
        })
    }

    fn once(&self, queue: &mut dyn FnMut() -> Result<(), KernelError>) -> Result<f64, KernelError> {
        let start = Instant::now();
        queue()?;
        Ok(start.elapsed().as_secs_f64())
    }
}

/// For a device that runs behind its caller: the work is recorded as a graph, and the graph is launched between two events, so
/// that what a launch costs the host is not in the figure.
pub struct DeviceClock {
    driver: Arc<dyn Driver>,
    start: Event,
    end: Event,
}

impl DeviceClock {
    /// A clock on a device.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn new(driver: Arc<dyn Driver>) -> Result<Self, KernelError> {
        let (start, end) = (Event::new(driver.clone())?, Event::new(driver.clone())?);
        Ok(Self { driver, start, end })
    }
}

impl Clock for DeviceClock {
    fn seconds(&self, work: &mut dyn Work, budget: Duration) -> Result<f64, KernelError> {
        work.prepare()?;
        // Once without a graph: whatever is allocated or looked up late is there now, and errors name their op.
        work.queue()?;
        self.driver.synchronize()?;
        let graph = Graph::capture(self.driver.clone(), || work.queue())?;
        repeat(budget, || {
            work.prepare()?;
            // SAFETY: `work` owns or borrows what it queued, and outlives the graph.
            self.once(&mut || unsafe { graph.launch() })
        })
    }

    fn once(&self, queue: &mut dyn FnMut() -> Result<(), KernelError>) -> Result<f64, KernelError> {
        self.start.record()?;
        queue()?;
        self.end.record()?;
        self.end.wait()?;
        self.start.wait()?;
        Ok(f64::from(self.end.elapsed_ms(&self.start)?) / 1e3)
    }
}
