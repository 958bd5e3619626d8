//! The queue of a driver: what waits to be run, in order.

use std::{collections::VecDeque, ffi::c_void, ops::Range, ptr, sync::Arc};

use tidemill_kernels::cuda::driver::{Kernel, LaunchConfig};

use crate::runtime::{self, How, Outcome};

/// The bytes of a copy to the device.
#[derive(Clone)]
pub(crate) enum Source {
    /// Read when the copy runs.
    Pinned(usize),
    /// Pageable memory, read when the copy was queued.
    Taken(Arc<[u8]>),
}

/// One queued operation.
#[derive(Clone)]
pub(crate) enum Op {
    Upload {
        dst: u64,
        src: Source,
        bytes: usize,
    },
    Readback {
        dst: usize,
        src: u64,
        bytes: usize,
    },
    Fill {
        dst: u64,
        value: u8,
        bytes: usize,
    },
    Launch(Arc<Launch>),
    Graph(Arc<[Op]>),
    /// An event's recording.
    Record(u64),
    /// The end of a device allocation.
    Free(u64),
    /// A kernel that faults because a test said so.
    Fault,
}

/// A launch with the values of its arguments.
pub(crate) struct Launch {
    pub(crate) kernel: &'static Kernel,
    pub(crate) config: LaunchConfig,
    /// One value per parameter.
    pub(crate) arguments: Vec<Argument>,
}

/// The value of a kernel's parameter.
pub(crate) type Argument = Vec<Line>;

/// A piece of one, aligned as the strictest parameter is: a tensor map.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

/// A copy of an argument.
pub(crate) fn argument(bytes: &[u8]) -> Argument {
    let piece = |chunk: &[u8]| {
        let mut line = Line([0; 64]);
        line.0[..chunk.len()].copy_from_slice(chunk);
        line
    };
    bytes.chunks(64).map(piece).collect()
}

impl Launch {
    pub(crate) fn run(&self, how: How<'_>) -> Outcome {
        let mut values = self.arguments.clone();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| value.as_mut_ptr().cast()).collect();
        // SAFETY: one value per parameter; the addresses among them are the promise of whoever queued it.
        unsafe { runtime::launch(self.kernel.name, self.config, &mut pointers, how) }
    }
}

impl Op {
    /// Device ranges that it names. What a kernel uses is known to the kernel alone.
    pub(crate) fn device_range(&self) -> Option<(u64, usize)> {
        match *self {
            Op::Upload { dst, bytes, .. } | Op::Fill { dst, bytes, .. } => Some((dst, bytes)),
            Op::Readback { src, bytes, .. } => Some((src, bytes)),
            _ => None,
        }
    }

    /// The page-locked range that it reads or writes when it runs.
    pub(crate) fn host_range(&self) -> Option<(usize, usize)> {
        match *self {
            Op::Upload { src: Source::Pinned(address), bytes, .. }
            | Op::Readback { dst: address, bytes, .. } => Some((address, bytes)),
            _ => None,
        }
    }

    /// Whether it reads or writes host memory in `range` when it runs.
    pub(crate) fn touches_host(&self, range: &Range<usize>) -> bool {
        match self {
            Op::Graph(ops) => ops.iter().any(|op| op.touches_host(range)),
            _ => self.host_range().is_some_and(|(address, _)| range.contains(&address)),
        }
    }

    /// Runs a copy or a fill.
    ///
    /// # Safety
    /// Its ranges were checked, and whoever queued it kept the promises of the driver's trait.
    pub(crate) unsafe fn transfer(&self) {
        // SAFETY: the caller's promise; the taken bytes are as many as the copy's.
        unsafe {
            match self {
                Op::Upload { dst, src: Source::Pinned(src), bytes } => {
                    ptr::copy_nonoverlapping(*src as *const u8, *dst as *mut u8, *bytes);
                }
                Op::Upload { dst, src: Source::Taken(src), bytes } => {
                    ptr::copy_nonoverlapping(src.as_ptr(), *dst as *mut u8, *bytes);
                }
                Op::Readback { dst, src, bytes } => {
                    ptr::copy_nonoverlapping(*src as *const u8, *dst as *mut u8, *bytes);
                }
                Op::Fill { dst, value, bytes } => ptr::write_bytes(*dst as *mut u8, *value, *bytes),
                Op::Launch(_) | Op::Graph(_) | Op::Record(_) | Op::Free(_) | Op::Fault => {}
            }
        }
    }
}

/// Operations in the order of their numbers, the oldest first.
#[derive(Default)]
pub(crate) struct Queue {
    ops: VecDeque<Op>,
    /// The number of the oldest.
    first: u64,
}

impl Queue {
    /// Appends, and returns the operation's number.
    pub(crate) fn push(&mut self, op: Op) -> u64 {
        self.ops.push_back(op);
        self.end() - 1
    }

    /// Takes the oldest if its number is at most `last`.
    pub(crate) fn pop_until(&mut self, last: u64) -> Option<Op> {
        if self.first > last {
            return None;
        }
        let op = self.ops.pop_front()?;
        self.first += 1;
        Some(op)
    }

    /// The number that the next operation gets.
    pub(crate) fn end(&self) -> u64 {
        self.first + self.ops.len() as u64
    }

    pub(crate) fn len(&self) -> usize {
        self.ops.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Op> {
        self.ops.iter()
    }
}
