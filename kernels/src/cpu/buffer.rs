//! Memory of the CPU device: aligned for the widest loads, in huge pages when large.

use bytes::Bytes;
use memmap2::MmapMut;

use crate::{error::KernelError, ops::Result};

/// Memory of this size or more is mapped on its own and asks for huge pages: a page fault per 4 KiB costs more than reading it.
const HUGE: usize = 4 << 20;

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

enum Memory {
    Heap(Vec<Line>),
    Map(MmapMut),
}

/// Zeroed memory, 64-byte aligned, of a fixed size.
pub(crate) struct Arena {
    memory: Memory,
    bytes: usize,
}

impl Arena {
    pub(crate) fn new(what: &'static str, bytes: usize) -> Result<Arena> {
        let refused = KernelError::OutOfMemory { what, bytes };
        let memory = if bytes >= HUGE {
            let Ok(map) = MmapMut::map_anon(bytes) else { return Err(refused) };
            // Advice: where it is refused the pages are small, and everything still works.
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage);
            Memory::Map(map)
        } else {
            let lines = bytes.div_ceil(size_of::<Line>());
            let mut heap = Vec::new();
            if heap.try_reserve_exact(lines).is_err() {
                return Err(refused);
            }
            heap.resize(lines, Line([0.0; 16]));
            Memory::Heap(heap)
        };
        Ok(Arena { memory, bytes })
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        match &self.memory {
            Memory::Heap(heap) => heap.as_ptr().cast(),
            Memory::Map(map) => map.as_ptr(),
        }
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        match &mut self.memory {
            Memory::Heap(heap) => heap.as_mut_ptr().cast(),
            Memory::Map(map) => map.as_mut_ptr(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn as_mut_bytes(&mut self) -> &mut [u8] {
        // SAFETY: both kinds of memory hold at least `bytes` initialised bytes, and `self` is borrowed for as long.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), self.bytes) }
    }

    /// The memory as f32.
    pub(crate) fn as_f32(&self) -> &[f32] {
        // SAFETY: as in `as_mut_bytes`; any bits are an f32, and the alignment is 64.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), self.bytes / 4) }
    }

    /// The memory as f32.
    pub(crate) fn as_mut_f32(&mut self) -> &mut [f32] {
        // SAFETY: as in `as_f32`.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), self.bytes / 4) }
    }
}

/// A copy of checkpoint bytes in huge pages, to be cut into [`crate::HostTensor`]s.
///
/// A memory-mapped file comes in pages of 4 KiB, and translating their addresses takes a third of the memory bandwidth that decoding lives from
/// (on Zen 4: 43 instead of 59 GB/s). Where there is memory for it, a loader does well to copy.
///
/// # Errors
/// [`KernelError::OutOfMemory`].
pub fn resident(bytes: &[u8]) -> Result<Bytes> {
    resident_with(bytes.len(), |copy| copy.copy_from_slice(bytes))
}

/// Bytes in huge pages that `fill` makes; they are zero before.
///
/// # Errors
/// [`KernelError::OutOfMemory`].
pub fn resident_with(bytes: usize, fill: impl FnOnce(&mut [u8])) -> Result<Bytes> {
    let mut arena = Arena::new("weights", bytes)?;
    fill(arena.as_mut_bytes());
    Ok(Bytes::from_owner(arena))
}

impl AsRef<[u8]> for Arena {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: as in `as_mut_bytes`.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.bytes) }
    }
}

/// Activations: f32, 64-byte aligned.
pub struct CpuBuffer(Arena);

impl CpuBuffer {
    pub(crate) fn new(elems: usize) -> Result<CpuBuffer> {
        Ok(CpuBuffer(Arena::new("activation buffer", elems * size_of::<f32>())?))
    }

    /// All elements.
    pub fn as_slice(&self) -> &[f32] {
        self.0.as_f32()
    }

    /// All elements.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        self.0.as_mut_f32()
    }
}
