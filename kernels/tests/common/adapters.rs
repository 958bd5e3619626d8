//! `Ops::lora_add` and `Ops::lora_gated` on any device.

use std::sync::Arc;

use tidemill_kernels::{
    DType, KernelError, Ops,
    ops::{Activation, BatchMeta, LoraPart, LoraShape},
};

use crate::common::{Rng, assert_close, assert_same, tensor};

#[allow(dead_code)] // the tests of one device alone need it
pub const MAX_TOKENS: usize = 64;
/// Of which the widest leaves no whole vector, and K of the CUDA kernels is a multiple of 8.
const K: usize = 296;
const PARTS: [usize; 3] = [272, 8, 19];
const SLOTS: usize = 3;
const MAX_RANK: usize = 12;

/// A device, and how to fill one of its buffers.
pub struct Bed<'a, O: Ops> {
    pub ops: &'a O,
    pub fill: &'a dyn Fn(&[f32]) -> O::Buffer,
    /// What its activations are rounded to.
    pub round: fn(f32) -> f32,
    /// Relative error of one rounding.
    pub epsilon: f64,
}

/// An adapter of one part, and what it holds.
#[derive(Clone)]
struct Part {
    part: LoraPart,
    a: Vec<f32>,
    b: Vec<f32>,
}

fn part(rng: &mut Rng, dtype: DType, [n, k]: [usize; 2], rank: usize) -> Part {
    let (a, b) = (rng.units(rank * k), rng.units(n * rank));
    // What every device holds exactly.
    let exact = |values: Vec<f32>| -> Vec<f32> {
        values.into_iter().map(|v| half::bf16::from_f32(v).to_f32()).collect()
    };
    let (a, b) = (exact(a), exact(b));
    let tensors = [tensor(dtype, &[rank, k], &a, 1), tensor(dtype, &[n, rank], &b, 3)];
    let [ta, tb] = tensors;
    Part { part: LoraPart { a: ta, b: tb, scale: 0.75 }, a, b }
}

/// Slot 0: every part, of different ranks. Slot 1: the middle part is as it is. Slot 2: f32, of the highest rank.
fn adapters() -> [Vec<Option<Part>>; SLOTS] {
    let mut rng = Rng::new(11);
    let mut part = |dtype, n, rank| Some(part(&mut rng, dtype, [n, K], rank));
    [
        vec![part(DType::Bf16, 272, 8), part(DType::Bf16, 8, 3), part(DType::F16, 19, 1)],
        vec![part(DType::F16, 272, 4), None, part(DType::Bf16, 19, 8)],
        PARTS.iter().map(|&n| part(DType::F32, n, MAX_RANK)).collect(),
    ]
}

fn set<O: Ops>(bed: &Bed<'_, O>, lora: &mut O::Lora, slot: usize, parts: &[Option<Part>]) {
    let parts: Vec<_> = parts.iter().map(|part| part.as_ref().map(|part| part.part.clone())).collect();
    bed.ops.set_lora(lora, slot, &parts).unwrap();
}

/// Rows of these lengths, with these adapters.
fn batch(rows: &[(u32, u32)]) -> BatchMeta {
    let mut meta = BatchMeta { cu_seqlens_q: vec![0], max_blocks: 1, ..BatchMeta::default() };
    for &(len, adapter) in rows {
        meta.token_ids.extend((0..len).map(|_| 0));
        meta.positions.extend(0..len);
        meta.slot_mapping.extend(0..len);
        meta.cu_seqlens_q.push(meta.token_ids.len() as u32);
        meta.context_lens.push(len);
        meta.block_tables.push(0);
        meta.adapters.push(adapter);
    }
    if meta.adapters.iter().all(|&adapter| adapter == 0) {
        meta.adapters.clear();
    }
    meta
}

/// One step of one op; what it left in `out`.
fn step<O: Ops>(
    bed: &Bed<'_, O>,
    meta: &BatchMeta,
    out: &[f32],
    mut op: impl FnMut(&mut O::Buffer, &O::Batch) -> Result<(), KernelError> + Send,
) -> Vec<f32> {
    let mut buffer = (bed.fill)(out);
    let batch = bed.ops.upload(Arc::new(meta.clone()), Arc::new([])).unwrap();
    assert_eq!(bed.ops.has_adapters(&batch), !meta.adapters.is_empty());
    bed.ops.run(&batch, || op(&mut buffer, &batch)).unwrap();
    let pending = bed.ops.results(batch).unwrap();
    bed.ops.wait(pending).unwrap();
    bed.ops.download(&buffer, out.len()).unwrap()
}

/// What each adapter adds to one token's product.
fn delta(parts: &[Option<Part>], x: &[f32]) -> Vec<f64> {
    let of = |part: &Option<Part>, n: usize| match part {
        None => vec![0.0; n],
        Some(Part { part, a, b }) => {
            let rank = part.rank();
            let dot = |w: &[f32]| w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum::<f64>();
            let low: Vec<f64> = a.chunks(K).map(dot).collect();
            let sum = |b: &[f32]| b.iter().zip(&low).map(|(&b, low)| f64::from(b) * low).sum::<f64>();
            b.chunks(rank).map(|b| f64::from(part.scale) * sum(b)).collect()
        }
    };
    parts.iter().zip(PARTS).flat_map(|(part, n)| of(part, n)).collect()
}

/// Rows of three adapters and of none, prompts and single tokens.
const ROWS: [(u32, u32); 9] = [(1, 2), (9, 1), (1, 0), (1, 2), (3, 3), (17, 0), (11, 1), (1, 3), (5, 2)];

/// Every token gets what its adapter adds and nothing else, the same bits as alone, and a slot holds what was put there last.
pub fn rows_of_many_adapters_get_what_each_gets_alone<O: Ops>(bed: &Bed<'_, O>) {
    let n: usize = PARTS.iter().sum();
    let shape = LoraShape { slots: SLOTS, max_rank: MAX_RANK, k: K, parts: PARTS.to_vec() };
    let mut lora = bed.ops.lora(&shape).unwrap();
    let adapters = adapters();
    // Whatever was there before leaves nothing behind.
    set(bed, &mut lora, 1, &adapters[2]);
    for (slot, parts) in adapters.iter().enumerate() {
        set(bed, &mut lora, slot, parts);
    }
    let meta = batch(&ROWS);
    let tokens = meta.num_tokens();
    let mut rng = Rng::new(5);
    let x: Vec<f32> = rng.units(tokens * K).into_iter().map(bed.round).collect();
    let base: Vec<f32> = rng.units(tokens * n).into_iter().map(bed.round).collect();
    let add = |meta: &BatchMeta, x: &[f32], base: &[f32]| {
        let (ops, lora, x) = (bed.ops, &lora, (bed.fill)(x));
        step(bed, meta, base, move |out, batch| ops.lora_add(out, &x, lora, batch))
    };
    let got = add(&meta, &x, &base);
    for (row, &(len, adapter)) in ROWS.iter().enumerate() {
        let first = meta.cu_seqlens_q[row] as usize;
        for t in first..first + len as usize {
            let (x, base) = (&x[t * K..][..K], &base[t * n..][..n]);
            let got = &got[t * n..][..n];
            let what = format!("token {t} of adapter {adapter}");
            if adapter == 0 {
                assert_same(got, base, &what);
                continue;
            }
            let delta = delta(&adapters[adapter as usize - 1], x);
            let want: Vec<f64> =
                base.iter().zip(&delta).map(|(&base, delta)| f64::from(base) + delta).collect();
            let most = want.iter().fold(1.0_f64, |most, w| most.max(w.abs()));
            assert_close(got, &want, most * (bed.epsilon + 2e-5), &what);
            assert!(delta.iter().any(|d| d.abs() > 0.1), "{what}: the adapter changes something");
            assert_same(&add(&batch(&[(1, adapter)]), x, base), got, &what);
        }
    }
}

/// Tokens without an adapter get the bits of a step without any; others do not depend on who shares the step.
pub fn gates_of_neighbours_keep_their_bits<O: Ops>(bed: &Bed<'_, O>) {
    let width = 72;
    let mut rng = Rng::new(23);
    let shape = LoraShape { slots: 2, max_rank: 8, k: K, parts: vec![width; 2] };
    let mut lora = bed.ops.lora(&shape).unwrap();
    let own = |rng: &mut Rng| part(rng, DType::Bf16, [width, K], 8);
    let parts = [vec![Some(own(&mut rng)), Some(own(&mut rng))], vec![None, Some(own(&mut rng))]];
    for (slot, parts) in parts.iter().enumerate() {
        set(bed, &mut lora, slot, parts);
    }
    let values = rng.units(2 * width * K);
    let weight = bed.ops.weight(&[tensor(DType::Bf16, &[2 * width, K], &values, 0).into()], &[]).unwrap();
    let rows = [(3, 0), (1, 1), (2, 2), (1, 0), (9, 1)];
    let meta = batch(&rows);
    let tokens = meta.num_tokens();
    let x: Vec<f32> = rng.units(tokens * K).into_iter().map(bed.round).collect();
    let gated = |meta: &BatchMeta, x: &[f32]| {
        let (ops, tokens, weight, lora) = (bed.ops, meta.num_tokens(), &weight, &lora);
        let (x, mut scratch) = ((bed.fill)(x), ops.buffer(tokens * 2 * width).unwrap());
        let mut fused = ops.scratch_buffer(tokens * 2 * width).unwrap();
        step(bed, meta, &vec![f32::NAN; tokens * width], move |out, batch| {
            if ops.has_adapters(batch) {
                ops.lora_gated(out, &mut scratch, &x, weight, lora, batch, Activation::Silu)
            } else {
                ops.linear_gated(out, &mut fused, &x, weight, tokens, Activation::Silu)
            }
        })
    };
    let (got, plain) = (gated(&meta, &x), gated(&batch(&rows.map(|(len, _)| (len, 0))), &x));
    for (row, &(len, adapter)) in rows.iter().enumerate() {
        let range = meta.cu_seqlens_q[row] as usize..meta.cu_seqlens_q[row + 1] as usize;
        let (own, at) =
            (&got[range.start * width..range.end * width], range.start * width..range.end * width);
        let alone = gated(&batch(&[(len, adapter)]), &x[range.start * K..range.end * K]);
        assert_same(own, &alone, &format!("row {row} alone"));
        assert_eq!(own == &plain[at], adapter == 0, "row {row}: an adapter changes its own rows alone");
    }
}

/// What does not fit is refused, and the slot keeps what it holds.
pub fn what_does_not_fit_a_slot_is_refused<O: Ops>(bed: &Bed<'_, O>) {
    let shape = LoraShape { slots: 2, max_rank: 4, k: K, parts: vec![16, 24] };
    let mut lora = bed.ops.lora(&shape).unwrap();
    let mut rng = Rng::new(1);
    let mut one = |n, k, rank| Some(part(&mut rng, DType::Bf16, [n, k], rank).part);
    let mut set = |slot, parts: [Option<LoraPart>; 2]| bed.ops.set_lora(&mut lora, slot, &parts);
    assert!(set(0, [one(16, K, 4), one(24, K, 1)]).is_ok());
    let wrong = [
        set(2, [None, None]),
        set(0, [one(16, K, 5), None]),
        set(0, [one(24, K, 4), None]),
        set(0, [None, one(24, K + 8, 4)]),
        set(0, [one(16, K, 4).map(|part| LoraPart { b: one(16, K, 3).unwrap().b, ..part }), None]),
    ];
    for (case, result) in wrong.into_iter().enumerate() {
        assert!(matches!(result, Err(KernelError::Shape { op: "set_lora", .. })), "case {case}: {result:?}");
    }
}
