//! Copies of whole blocks between the KV cache and page-locked host memory.
//!
//! No kernel: per layer a block is one range on both sides, so each is a copy of the driver's. The host has the cache's layout with
//! its own number of blocks, `[num_layers, host_blocks, 2, K, block_size, D]`: neighbours on both sides are one copy.

use super::paged_kv::{kv_cache_elems, layer_elems};
use crate::{
    KernelError,
    cuda::{
        Device,
        driver::Result,
        memory::{DeviceBuffer, PinnedMemory},
    },
    ops::{BlockCopy, KvShape},
};

const OP: &str = "copy_blocks";

/// One call.
pub struct CopyBlocks<'a> {
    /// The whole cache: [`kv_cache_elems`] of its type.
    pub cache: &'a DeviceBuffer,
    /// Its extents.
    pub shape: KvShape,
    /// As many bytes as a cache of `host_shape` has. Its owner waits for the stream before it frees or touches them.
    pub host: &'a PinnedMemory,
    /// `shape` but for the number of blocks.
    pub host_shape: KvShape,
    /// In order.
    pub copies: &'a [BlockCopy],
}

/// Blocks that lie side by side in the cache and on the host and go the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    save: bool,
    block: usize,
    host: usize,
    len: usize,
}

/// `Ops::copy_blocks`: queues the copies. Ids out of range are a bug of the caller.
///
/// # Errors
/// [`KernelError::Shape`] for memory smaller than its extents say; what the driver reports.
pub fn copy_blocks(device: &Device, call: CopyBlocks<'_>) -> Result<()> {
    let CopyBlocks { cache, shape, host, host_shape, copies } = call;
    BlockCopy::check(copies, shape, host_shape);
    let base = cache.at_least(OP, "kv", shape.dtype, kv_cache_elems(&shape))?;
    let host_bytes = kv_cache_elems(&host_shape) * shape.dtype.size();
    if host.bytes() < host_bytes {
        let (got, expected) = (vec![host.bytes()], vec![host_bytes]);
        return Err(KernelError::Shape { op: OP, what: "host".into(), got, expected });
    }
    let layer_bytes = |shape: &KvShape| layer_elems(shape) * shape.dtype.size();
    let block_bytes = layer_bytes(&KvShape { num_blocks: 1, ..shape });
    for run in runs(copies) {
        for layer in 0..shape.num_layers {
            let on_device = base.offset(layer * layer_bytes(&shape) + run.block * block_bytes);
            let at = layer * layer_bytes(&host_shape) + run.host * block_bytes;
            let bytes = run.len * block_bytes;
            // SAFETY: the ids were checked, so both ranges lie in memory that was found large enough; nothing but queued copies touches
            // the host's side, as its owner promised.
            unsafe {
                let on_host = host.ptr().add(at);
                if run.save {
                    device.driver().copy_to_host(on_host, on_device, bytes)?;
                } else {
                    device.driver().copy_to_device(on_device, on_host, bytes)?;
                }
            }
        }
    }
    Ok(())
}

/// The copies, neighbours together, in their order.
fn runs(copies: &[BlockCopy]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for copy in copies {
        let ((block, host), save) = (copy.ids(), matches!(copy, BlockCopy::Save { .. }));
        match runs.last_mut() {
            Some(run) if run.save == save && (run.block + run.len, run.host + run.len) == (block, host) => {
                run.len += 1;
            }
            _ => runs.push(Run { save, block, host, len: 1 }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_on_both_sides_that_go_the_same_way_are_one_copy() {
        let save = |block, host| BlockCopy::Save { block, host };
        let load = |host, block| BlockCopy::Load { host, block };
        let copies = [
            save(4, 1),
            save(5, 2),
            save(6, 3),
            load(4, 7),
            load(5, 8),
            save(9, 6),
            save(10, 8),
            save(11, 8),
        ];
        let run = |save, block, host, len| Run { save, block, host, len };
        let expected = [
            run(true, 4, 1, 3),
            run(false, 7, 4, 2),
            run(true, 9, 6, 1),
            run(true, 10, 8, 1),
            run(true, 11, 8, 1),
        ];
        assert_eq!(runs(&copies), expected);
        assert_eq!(runs(&[]), []);
    }
}
