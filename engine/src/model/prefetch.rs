//! Brings mapped weights into memory before they are asked for, by several threads.
//!
//! On a CPU the memory map is the weight: nothing is copied, and what nobody has touched is read from the disk at the first request. One thread that
//! computes cannot keep a fast disk busy, several that do nothing but touch pages can.

use std::{
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use bytes::Bytes;

/// Bytes that a thread takes at once.
const PIECE: usize = 8 << 20;
/// The smallest page of any system that this runs on: a byte of each is touched.
const PAGE: usize = 4096;
/// How often somebody who waits is told how far it is.
const TELL: Duration = Duration::from_millis(50);
/// More threads than this bring no more of a disk, and take the cores from whoever loads.
const MAX_THREADS: usize = 4;

/// What was read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loaded {
    /// Bytes of the tensors that the model is made of.
    pub bytes: u64,
    /// Bytes of all tensors in the files.
    pub file_bytes: u64,
    /// What it took.
    pub time: Duration,
}

impl Loaded {
    /// 10^9 bytes per second.
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / 1e9 / self.time.as_secs_f64().max(1e-9)
    }
}

/// Reading under way. Dropping it ends the threads at their next piece.
#[derive(Debug)]
pub struct Prefetch {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    started: Instant,
    file_bytes: u64,
}

#[derive(Debug)]
struct Shared {
    pieces: Vec<Bytes>,
    next: AtomicUsize,
    done: AtomicU64,
    total: u64,
}

impl Prefetch {
    /// Starts to read these slices of maps, in this order. `file_bytes` is what the files hold in all.
    pub fn start(slices: Vec<Bytes>, file_bytes: u64) -> Self {
        let total = slices.iter().map(|slice| slice.len() as u64).sum();
        let cut = |slice: Bytes| {
            (0..slice.len()).step_by(PIECE).map(move |at| slice.slice(at..slice.len().min(at + PIECE)))
        };
        let pieces: Vec<Bytes> = slices.into_iter().flat_map(cut).collect();
        let cores = thread::available_parallelism().map_or(1, Into::into);
        let count = cores.min(MAX_THREADS).min(pieces.len());
        let shared = Arc::new(Shared { pieces, next: AtomicUsize::new(0), done: AtomicU64::new(0), total });
        let spawn = |number| {
            let shared = shared.clone();
            let builder = thread::Builder::new().name(format!("tidemill-read-{number}"));
            // With fewer threads, or none, it is slower and no more.
            builder.spawn(move || shared.work()).ok()
        };
        let threads = (0..count).filter_map(spawn).collect();
        Self { shared, threads, started: Instant::now(), file_bytes }
    }

    /// Bytes that are read, and bytes that will be.
    pub fn progress(&self) -> (u64, u64) {
        (self.shared.done.load(Relaxed), self.shared.total)
    }

    /// Waits until all is read, and says how far it is meanwhile.
    pub fn finish(mut self, mut tell: impl FnMut(u64, u64)) -> Loaded {
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            let (done, total) = self.progress();
            tell(done, total);
            thread::sleep(TELL.min(self.started.elapsed() / 8));
        }
        // What no thread could be started for.
        self.shared.work();
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
        let (done, total) = self.progress();
        tell(done, total);
        Loaded { bytes: done, file_bytes: self.file_bytes, time: self.started.elapsed() }
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.shared.next.store(self.shared.pieces.len(), Relaxed);
    }
}

impl Shared {
    fn work(&self) {
        while let Some(piece) = self.pieces.get(self.next.fetch_add(1, Relaxed)) {
            piece.iter().step_by(PAGE).for_each(|byte| {
                black_box(*byte);
            });
            self.done.fetch_add(piece.len() as u64, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_read_once() {
        let slices = vec![Bytes::from(vec![1; 3 * PIECE + 5]), Bytes::new(), Bytes::from(vec![2; 7])];
        let mut told = Vec::new();
        let loaded = Prefetch::start(slices, 1 << 30).finish(|done, total| told.push((done, total)));
        let all = 3 * PIECE as u64 + 12;
        assert_eq!((loaded.bytes, loaded.file_bytes, told.last()), (all, 1 << 30, Some(&(all, all))));
        assert!(told.is_sorted());
        assert_eq!(Prefetch::start(Vec::new(), 0).finish(|_, _| ()).bytes, 0);
    }
}
