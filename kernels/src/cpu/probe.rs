//! What the machine could do at best: the bounds that measured speeds are compared with.

use std::{hint::black_box, time::Instant};

use super::{
    buffer::Arena,
    isa::{Host, Isa, Job},
    simd::Simd,
};
use crate::ops::Result;

/// Memory that the probe reads: several times any cache it should not measure.
const BYTES: usize = 256 << 20;
/// Passes over it; the median counts.
const PASSES: usize = 7;

/// Bytes per second that `threads` threads together read from memory, each a region of its own, front to back. Takes under a second.
///
/// # Errors
/// [`crate::KernelError::OutOfMemory`] when there are no 256 MiB.
pub fn read_bandwidth(threads: usize) -> Result<f64> {
    let mut arena = Arena::new("bandwidth probe", BYTES)?;
    arena.as_mut_f32().fill(1.0);
    let data = arena.as_f32();
    let host = Host::new(Isa::detect()).or(Host::new(Isa::Portable));
    let mut rates: Vec<f64> = (0..PASSES)
        .map(|_| {
            let start = Instant::now();
            std::thread::scope(|scope| {
                for region in data.chunks(data.len().div_ceil(threads.max(1))) {
                    scope.spawn(move || black_box(host.map(|host| host.run(Sum(region)))));
                }
            });
            BYTES as f64 / start.elapsed().as_secs_f64()
        })
        .collect();
    rates.sort_unstable_by(f64::total_cmp);
    Ok(rates[PASSES / 2])
}

struct Sum<'a>(&'a [f32]);

impl Job for Sum<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); 8];
        for chunk in self.0.chunks_exact(8 * S::LANES) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the chunk holds eight vectors.
                *sum = s.add(*sum, unsafe { s.load(chunk.as_ptr().add(i * S::LANES)) });
            }
        }
        sums.into_iter().map(|sum| s.sum(sum)).sum()
    }
}
