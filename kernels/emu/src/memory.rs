//! Which memory exists, so that a copy out of bounds is an error and not a crash.

use std::{
    alloc::{Layout, alloc, dealloc},
    collections::BTreeMap,
    ops::Range,
};

use tidemill_kernels::cuda::driver::Pinned;

use crate::runtime;

/// A page of the host.
const PAGE: usize = 4096;

/// Device memory, as the queue will see it and as it is now.
pub(crate) struct DeviceMemory {
    /// What the next queued operation may use.
    live: BTreeMap<u64, Allocation>,
    /// Freed by the host while operations queued before may still use it.
    leaving: BTreeMap<u64, Allocation>,
    limit: usize,
    used: usize,
}

#[derive(Clone, Copy)]
struct Allocation {
    bytes: usize,
    what: &'static str,
}

impl DeviceMemory {
    pub(crate) fn new(limit: usize) -> Self {
        Self { live: BTreeMap::new(), leaving: BTreeMap::new(), limit, used: 0 }
    }

    /// Bytes that are not allocated, or allocated and not yet freed by the queue.
    pub(crate) fn free_bytes(&self) -> usize {
        self.limit - self.used
    }

    /// Bytes that the host holds.
    pub(crate) fn live_bytes(&self) -> usize {
        self.live.values().map(|allocation| allocation.bytes).sum()
    }

    /// `None` when it does not fit.
    pub(crate) fn allocate(&mut self, bytes: usize, what: &'static str) -> Option<u64> {
        if bytes > self.free_bytes() {
            return None;
        }
        let address = runtime::alloc(bytes) as u64;
        if address == 0 {
            return None;
        }
        self.used += bytes;
        self.live.insert(address, Allocation { bytes, what });
        Some(address)
    }

    /// Takes an allocation out of the host's reach; [`DeviceMemory::unmap`] follows when the queue has come that far.
    pub(crate) fn leave(&mut self, address: u64) -> Result<(), String> {
        match self.live.remove(&address) {
            Some(allocation) => {
                self.leaving.insert(address, allocation);
                Ok(())
            }
            None => Err(format!("{address:#x} is no live allocation (freed twice?)")),
        }
    }

    /// Gives the memory back, and says when something was written just beyond its end.
    pub(crate) fn unmap(&mut self, address: u64) -> Result<(), String> {
        let Some(allocation) = self.leaving.remove(&address) else { return Ok(()) };
        self.used -= allocation.bytes;
        // SAFETY: it came from `runtime::alloc`, and the maps hold it once.
        if unsafe { runtime::free(address as *mut u8) } {
            return Ok(());
        }
        Err(format!(
            "bytes beyond the end of \"{}\" ({} bytes) were overwritten",
            allocation.what, allocation.bytes
        ))
    }

    /// Refuses a range that does not lie inside one live allocation.
    pub(crate) fn check(&self, address: u64, bytes: usize) -> Result<(), String> {
        match self.live.range(..=address).next_back() {
            Some((&start, allocation)) if address < start + allocation.bytes as u64 || address == start => {
                let offset = (address - start) as usize;
                if bytes <= allocation.bytes - offset {
                    return Ok(());
                }
                let Allocation { bytes: size, what } = allocation;
                Err(format!("bytes {offset}..{} of \"{what}\", which has {size} bytes", offset + bytes))
            }
            _ => Err(format!("{address:#x} (+{bytes}) lies in no live device memory")),
        }
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        for &address in self.live.keys().chain(self.leaving.keys()) {
            // SAFETY: it came from `runtime::alloc`, is in one map only, and nothing is queued on a driver that is dropped.
            unsafe { runtime::free(address as *mut u8) };
        }
    }
}

/// Page-locked host memory.
#[derive(Default)]
pub(crate) struct PinnedMemory {
    live: BTreeMap<usize, (Layout, Pinned)>,
}

/// Where host memory lies.
pub(crate) enum Place {
    Pinned(Pinned),
    Pageable,
}

impl PinnedMemory {
    /// `None` when the host has no more.
    pub(crate) fn allocate(&mut self, bytes: usize, usage: Pinned) -> Option<*mut u8> {
        let layout = Layout::from_size_align(bytes.max(1), PAGE).ok()?;
        // SAFETY: the layout has at least one byte.
        let ptr = unsafe { alloc(layout) };
        if ptr.is_null() {
            return None;
        }
        // SAFETY: freshly allocated with this size. Nothing promises zeros, and 0xff shows in any result.
        unsafe { ptr.write_bytes(0xff, layout.size()) };
        self.live.insert(ptr as usize, (layout, usage));
        Some(ptr)
    }

    pub(crate) fn free(&mut self, ptr: *mut u8) -> Result<(), String> {
        let Some((layout, _)) = self.live.remove(&(ptr as usize)) else {
            return Err(format!("{ptr:p} is no live page-locked memory (freed twice?)"));
        };
        // SAFETY: allocated above with this layout, removed from the map once.
        unsafe { dealloc(ptr, layout) };
        Ok(())
    }

    pub(crate) fn live_bytes(&self) -> usize {
        self.live.values().map(|(layout, _)| layout.size()).sum()
    }

    /// The range of the allocation that begins at `ptr`.
    pub(crate) fn range(&self, ptr: *mut u8) -> Option<Range<usize>> {
        let (layout, _) = self.live.get(&(ptr as usize))?;
        Some(ptr as usize..ptr as usize + layout.size())
    }

    /// What kind of memory a host range is; a range that leaves a page-locked allocation is an error.
    pub(crate) fn place(&self, address: usize, bytes: usize) -> Result<Place, String> {
        match self.live.range(..=address).next_back() {
            Some((&start, &(layout, usage))) if address < start + layout.size() => {
                if address + bytes <= start + layout.size() {
                    return Ok(Place::Pinned(usage));
                }
                let offset = address - start;
                let size = layout.size();
                Err(format!("bytes {offset}..{} of page-locked memory of {size} bytes", offset + bytes))
            }
            _ => Ok(Place::Pageable),
        }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        for (&address, &(layout, _)) in &self.live {
            // SAFETY: allocated above with this layout, and only once in the map.
            unsafe { dealloc(address as *mut u8, layout) };
        }
    }
}
