//! What the tests of paged keys and values share: a device with its driver, index tensors, and steps over sequences whose data follow from
//! their position alone.

use std::sync::Arc;

use tidemill_kernels::{
    DType,
    cuda::{
        Device,
        driver::Driver,
        memory::{DeviceBuffer, DeviceMemory},
        ops::kv_cache_elems,
    },
    ops::{BatchMeta, HeadShape, KvShape},
};
use tidemill_kernels_emu::Schedule;

use crate::{
    common::Rng,
    harness::{self, bf16s, f8s, rounded},
};

/// A device, and its driver for what the device does not show.
pub struct Bed {
    pub driver: Arc<dyn Driver>,
    pub device: Device,
}

impl Bed {
    pub fn new(schedule: Schedule) -> Bed {
        Bed::over(harness::driver(schedule))
    }

    pub fn over(driver: Arc<dyn Driver>) -> Bed {
        Bed { device: Device::new(driver.clone()), driver }
    }

    /// Device memory that holds `words`.
    pub fn words(&self, words: &[u32]) -> DeviceMemory {
        let memory = DeviceMemory::new(self.driver.clone(), 4 * words.len(), "test").unwrap();
        self.rewrite(&memory, words);
        memory
    }

    /// Replaces the first words of `memory`.
    pub fn rewrite(&self, memory: &DeviceMemory, words: &[u32]) {
        assert!(4 * words.len() <= memory.bytes());
        let driver = self.device.driver();
        // SAFETY: the memory holds as many words; the source lives until the synchronisation.
        unsafe { driver.copy_to_device(memory.ptr(), words.as_ptr().cast(), 4 * words.len()) }.unwrap();
        driver.synchronize().unwrap();
    }
}

/// The same random bf16 values for the same names.
pub fn vector(seed: u64, position: usize, head: usize, len: usize) -> Vec<f32> {
    let mut rng = Rng::new((seed << 40) ^ ((position as u64) << 12) ^ head as u64 ^ 0x9E37);
    for _ in 0..4 {
        rng.next();
    }
    rounded(&rng.units(len))
}

/// A row of a step: `new` tokens at the end of `context` tokens of sequence `id`.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub id: u64,
    pub new: usize,
    pub context: usize,
}

pub fn row(id: u64, new: usize, context: usize) -> Row {
    Row { id, new, context }
}

/// A step: rows, their paged cache and their queries, keys and values.
pub struct Step {
    pub rows: Vec<Row>,
    pub heads: HeadShape,
    pub meta: BatchMeta,
    pub shape: KvShape,
    pub cache: Vec<f32>,
    pub qkv: Vec<f32>,
}

/// The layer in use: not the first, and not the last.
pub const LAYER: usize = 1;

impl Step {
    /// Lays the rows out over shuffled blocks. What the row's last token does not see is NaN: slots past its context, those before the
    /// oldest position that a `window` shows (whose table entries lead nowhere), and all other layers.
    pub fn new(heads: HeadShape, rows: &[Row], window: Option<usize>, block_size: usize) -> Step {
        let HeadShape { num_heads, num_kv_heads, head_dim } = heads;
        let max_blocks = rows.iter().map(|r| r.context.div_ceil(block_size)).max().unwrap_or(0) + 2;
        let used: usize = rows.iter().map(|r| r.context.div_ceil(block_size)).sum();
        let num_blocks = used + 3;
        let mut free: Vec<u32> = (0..num_blocks as u32).collect();
        let mut rng = Rng::new(used as u64 + 77);
        for i in (1..free.len()).rev() {
            free.swap(i, rng.below(i + 1));
        }
        let shape = KvShape {
            num_layers: LAYER + 2,
            num_blocks,
            block_size,
            num_kv_heads,
            head_dim,
            value_dim: head_dim,
            dtype: DType::Bf16,
        };
        let mut step = Step {
            rows: rows.to_vec(),
            heads,
            meta: BatchMeta { max_blocks, cu_seqlens_q: vec![0], ..BatchMeta::default() },
            shape,
            cache: vec![f32::NAN; kv_cache_elems(&shape)],
            qkv: Vec::new(),
        };
        for r in rows {
            let oldest = window.map_or(0, |w| (r.context.saturating_sub(r.new) + 1).saturating_sub(w));
            let mut table = vec![u32::MAX; max_blocks];
            for position in oldest..r.context {
                let entry = &mut table[position / block_size];
                if *entry == u32::MAX {
                    *entry = free.pop().unwrap();
                }
                let slot = *entry as usize * block_size + position % block_size;
                for head in 0..num_kv_heads {
                    for which in 0..2 {
                        let at = step.place(slot, which, head);
                        step.cache[at..at + head_dim]
                            .copy_from_slice(&kv(r.id, position, which, head, head_dim));
                    }
                }
            }
            for i in 0..r.new {
                let position = (r.context + i).saturating_sub(r.new);
                step.qkv.extend((0..num_heads).flat_map(|head| query(r.id, position, head, head_dim)));
                for which in 0..2 {
                    step.qkv.extend((0..num_kv_heads).flat_map(|h| kv(r.id, position, which, h, head_dim)));
                }
                step.meta.positions.push(position as u32);
                let entry = table[position / block_size];
                let slot = if entry == u32::MAX {
                    u32::MAX
                } else {
                    entry * block_size as u32 + (position % block_size) as u32
                };
                step.meta.slot_mapping.push(slot);
            }
            step.meta.block_tables.extend(table);
            step.meta.cu_seqlens_q.push(step.meta.positions.len() as u32);
            step.meta.context_lens.push(r.context as u32);
        }
        step
    }

    /// T.
    pub fn tokens(&self) -> usize {
        self.meta.positions.len()
    }

    /// First element of a key (`which` 0) or value (1) in the cache.
    pub fn place(&self, slot: usize, which: usize, head: usize) -> usize {
        let (block, offset) = (slot / self.shape.block_size, slot % self.shape.block_size);
        let HeadShape { num_kv_heads: k, head_dim: d, .. } = self.heads;
        ((((LAYER * self.shape.num_blocks + block) * 2 + which) * k + head) * self.shape.block_size + offset)
            * d
    }

    pub fn upload(&self, bed: &Bed) -> (DeviceBuffer, DeviceBuffer) {
        (self.upload_cache(bed), bf16s(&bed.device, &self.qkv))
    }

    /// The cache in its type.
    pub fn upload_cache(&self, bed: &Bed) -> DeviceBuffer {
        match self.shape.dtype {
            DType::F8E4M3 => f8s(&bed.device, &self.cache),
            _ => bf16s(&bed.device, &self.cache),
        }
    }
}

/// The sequence whose values at positions 5 and 261 are huge and cancel, at scores that are equal and met in three tiles of which the second has
/// the greatest: from position 261 on, a result is little more than the rounding errors of the tiles' merges, and shows each of them.
pub const CANCELLING: u64 = 99;

/// A query: larger than unit, so that weights differ.
pub fn query(id: u64, position: usize, head: usize, len: usize) -> Vec<f32> {
    if id == CANCELLING {
        return first_only(1.0 + head as f32 / 4.0, len);
    }
    vector(id + 100, position, head, len).into_iter().map(|x| 2.0 * x).collect()
}

/// A key (`which` 0) or value (1).
pub fn kv(id: u64, position: usize, which: usize, head: usize, len: usize) -> Vec<f32> {
    if id == CANCELLING {
        match (which, position) {
            (0, 5 | 261) => return first_only(6.0, len),
            (0, 140) => return first_only(9.25, len),
            (0, _) => return first_only(vector(id, position, head, 1)[0], len),
            (_, 5) => return vector(id, 5, head, len).into_iter().map(|x| 4194304.0 * x).collect(),
            (_, 261) => return kv(id, 5, 1, head, len).into_iter().map(|x| -x).collect(),
            _ => {}
        }
    }
    vector(id + 1000 * (which as u64 + 1), position, head, len)
}

fn first_only(x: f32, len: usize) -> Vec<f32> {
    (0..len).map(|i| if i == 0 { x } else { 0.0 }).collect()
}
