//! `Ops::copy_blocks` on any device: what is copied, and when.

use std::sync::Arc;

use tidemill_kernels::{
    DType, Ops,
    ops::{BatchMeta, BlockCopy, HeadShape, KvShape, Lookup},
};

use crate::common::{Rng, causal, rotation, tensor};

pub const HEADS: HeadShape = HeadShape { num_heads: 2, num_kv_heads: 2, head_dim: 64 };
pub const SHAPE: KvShape = KvShape {
    num_layers: 2,
    num_blocks: 8,
    block_size: 16,
    num_kv_heads: HEADS.num_kv_heads,
    head_dim: HEADS.head_dim,
    value_dim: HEADS.head_dim,
    dtype: DType::Bf16,
};
pub const HOST_BLOCKS: usize = 5;
pub const VOCAB: usize = 64;

pub fn save(block: u32, host: u32) -> BlockCopy {
    BlockCopy::Save { block, host }
}

pub fn load(host: u32, block: u32) -> BlockCopy {
    BlockCopy::Load { host, block }
}

/// Every byte of a block goes to the host and into another block, and none else changes. The storage is `planes` planes of
/// all blocks, one after the other; `put` and `get` replace and read it.
pub fn bytes_come_back<O: Ops>(
    ops: &O,
    planes: usize,
    put: impl Fn(&mut O::KvCache, &[u8]),
    get: impl Fn(&mut O::KvCache) -> Vec<u8>,
) {
    let mut kv = ops.kv_cache(SHAPE).unwrap();
    let mut host = ops.host_kv(KvShape { num_blocks: HOST_BLOCKS, ..SHAPE }).unwrap();
    let mut rng = Rng::new(17);
    let mut random = || (0..SHAPE.num_blocks * SHAPE.block_bytes()).map(|_| rng.next() as u8).collect();
    let (before, after): (Vec<u8>, Vec<u8>) = (random(), random());
    put(&mut kv, &before);
    // The first two are neighbours. The host is full, so that no block has room to lie wrong.
    let saves = [save(1, 3), save(2, 4), save(7, 0), save(0, 1), save(6, 2)];
    ops.copy_blocks(&mut kv, &mut host, &saves).unwrap();
    ops.synchronize().unwrap();
    put(&mut kv, &after);
    let loads = [load(0, 5), load(3, 3), load(4, 4), load(1, 6), load(2, 0)];
    ops.copy_blocks(&mut kv, &mut host, &loads).unwrap();
    let got = get(&mut kv);
    let plane = before.len() / planes;
    let block = plane / SHAPE.num_blocks;
    let mut expected = after;
    for (from, to) in [(7, 5), (1, 3), (2, 4), (0, 6), (6, 0)] {
        for at in (0..planes).map(|i| i * plane) {
            expected[at + to * block..][..block].copy_from_slice(&before[at + from * block..][..block]);
        }
    }
    assert!(got == expected, "a block is not what was saved, or another has changed");
}

/// A sequence of 16 tokens in a block, written and read by steps.
struct Bed<'a, O: Ops> {
    ops: &'a O,
    kv: O::KvCache,
    host: O::HostKv,
    table: O::Weight,
    rope: O::Vector,
    qkv: O::Buffer,
    out: O::Buffer,
}

impl<'a, O: Ops> Bed<'a, O> {
    fn new(ops: &'a O) -> Self {
        let width = HEADS.qkv_width();
        let table = tensor(DType::Bf16, &[VOCAB, width], &Rng::new(5).units(VOCAB * width), 0);
        let half = HEADS.head_dim / 2;
        let unturned = [vec![1.0; half], vec![0.0; half]].concat().repeat(SHAPE.block_size);
        Self {
            kv: ops.kv_cache(SHAPE).unwrap(),
            host: ops.host_kv(KvShape { num_blocks: HOST_BLOCKS, ..SHAPE }).unwrap(),
            table: ops.weight(&[table.into()], &[]).unwrap(),
            rope: ops.vector(&unturned).unwrap(),
            qkv: ops.buffer(SHAPE.block_size * width).unwrap(),
            out: ops.buffer(HEADS.num_heads * HEADS.head_dim).unwrap(),
            ops,
        }
    }

    fn batch(&self, positions: std::ops::Range<u32>, first_token: u32, block: u32) -> O::Batch {
        let meta = BatchMeta {
            token_ids: positions.clone().map(|p| first_token + p).collect(),
            slot_mapping: positions.clone().map(|p| block * SHAPE.block_size as u32 + p).collect(),
            cu_seqlens_q: vec![0, positions.len() as u32],
            context_lens: vec![positions.end],
            block_tables: vec![block],
            max_blocks: 1,
            logits_indices: Vec::new(),
            state_indices: Vec::new(),
            segments: Vec::new(),
            adapters: Vec::new(),
            positions: positions.collect(),
        };
        self.ops.upload(Arc::new(meta), Arc::new([])).unwrap()
    }

    /// Queues a step that fills a block, in all layers.
    fn write(&mut self, block: u32, first_token: u32) {
        let batch = self.batch(0..SHAPE.block_size as u32, first_token, block);
        let Self { ops, kv, table, rope, qkv, .. } = self;
        let queue = || {
            ops.embedding(qkv, table, &batch, Lookup::Tokens { scale: 1.0 })?;
            (0..SHAPE.num_layers).try_for_each(|layer| {
                ops.rope_kv_write(qkv, kv, rotation(rope, HEADS.head_dim), &batch, HEADS, layer)
            })
        };
        ops.run(&batch, queue).unwrap();
    }

    /// What a token sees that looks at a block in the last layer.
    fn read(&mut self, block: u32) -> Vec<f32> {
        let last = SHAPE.block_size as u32 - 1;
        let batch = self.batch(last..last + 1, 3, block);
        let Self { ops, kv, table, qkv, out, .. } = self;
        let (ops, in_batch, table) = (*ops, &batch, &*table);
        // The cache is not shared between threads, so it is moved there.
        let queue = move || {
            ops.embedding(qkv, table, in_batch, Lookup::Tokens { scale: 1.0 })?;
            ops.paged_attention(out, qkv, kv, in_batch, HEADS, causal(1.0), SHAPE.num_layers - 1)
        };
        ops.run(&batch, queue).unwrap();
        ops.download(&self.out, HEADS.num_heads * HEADS.head_dim).unwrap()
    }

    fn copy(&mut self, copies: &[BlockCopy]) {
        self.ops.copy_blocks(&mut self.kv, &mut self.host, copies).unwrap();
    }
}

/// Copies run in order with the steps before and after them, without anybody waiting in between.
pub fn copies_are_ordered_with_steps<O: Ops>(ops: &O) {
    const A: u32 = 0;
    const B: u32 = 40;
    let mut bed = Bed::new(ops);
    bed.write(5, A);
    bed.write(6, B);
    let (a, b) = (bed.read(5), bed.read(6));
    assert_ne!(a, b);
    // Saved before it is overwritten, and after it was written.
    bed.write(0, A);
    bed.copy(&[save(0, 2)]);
    bed.write(0, B);
    bed.copy(&[load(2, 3)]);
    assert_eq!(bed.read(3), a, "the bytes from before the step that overwrote them");
    assert_eq!(bed.read(0), b);
    // Loaded over what a step has written, before a step reads it.
    bed.write(1, B);
    bed.copy(&[load(2, 1)]);
    assert_eq!(bed.read(1), a);
    // Loaded before a step overwrites it.
    bed.copy(&[load(2, 1)]);
    bed.write(1, B);
    assert_eq!(bed.read(1), b);
    // In the order of the list.
    bed.copy(&[save(6, 0), load(0, 7), save(5, 0), load(0, 6)]);
    assert_eq!((bed.read(7), bed.read(6)), (b, a));
}
