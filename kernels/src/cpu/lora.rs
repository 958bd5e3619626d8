//! Low-rank adapters: two small products for each adapter of a step.

use super::{
    CpuBuffer,
    isa::{Host, Job},
    pool::{Pool, Shared},
    simd::Simd,
};
use crate::{
    ops::{BatchMeta, LoraGroup, LoraPart, LoraShape, Result},
    tensor::{DType, HostTensor},
};

/// Rows of A in one task.
const RANKS: usize = 4;
/// Columns of B in one task: with a rank of 16 in f32 they fill half of a first-level cache.
const COLUMNS: usize = 256;

/// Adapters of one matrix.
pub struct CpuLora {
    shape: LoraShape,
    /// `[slots, parts]`.
    slots: Vec<Vec<Option<Adapter>>>,
}

/// An adapter of one part.
struct Adapter {
    rank: usize,
    /// `[r, K]`.
    a: Matrix,
    /// `[r, N_i]`.
    b: Matrix,
    scale: f32,
}

/// f16 is widened: its vectors load in whole registers only.
enum Matrix {
    Bf16(Vec<u8>),
    F32(Vec<u8>),
}

impl Matrix {
    fn new(tensor: &HostTensor) -> Self {
        match tensor.dtype {
            DType::Bf16 => Self::Bf16(tensor.data.to_vec()),
            _ => Self::F32(tensor.to_f32().into_iter().flat_map(f32::to_ne_bytes).collect()),
        }
    }
}

impl CpuLora {
    pub(super) fn new(shape: &LoraShape) -> Self {
        let slots = (0..shape.slots).map(|_| shape.parts.iter().map(|_| None).collect()).collect();
        Self { shape: shape.clone(), slots }
    }

    pub(super) fn set(&mut self, slot: usize, parts: &[Option<LoraPart>]) -> Result<()> {
        self.shape.check(slot, parts)?;
        let adapter = |part: &LoraPart| Adapter {
            rank: part.rank(),
            a: Matrix::new(&part.a),
            b: Matrix::new(&part.transposed_b()),
            scale: part.scale,
        };
        self.slots[slot] = parts.iter().map(|part| part.as_ref().map(adapter)).collect();
        Ok(())
    }
}

/// The tokens of one adapter, in one part.
struct Product<'a> {
    adapter: &'a Adapter,
    tokens: &'a [u32],
    /// Rows of the part, and the first of them in the matrix.
    rows: usize,
    first_row: usize,
    /// Where `[tokens, r]`, the result of the first product, begins.
    at: usize,
}

/// `Ops::lora_add`.
pub(super) fn add(
    host: Host,
    pool: &Pool,
    out: &mut CpuBuffer,
    x: &CpuBuffer,
    lora: &CpuLora,
    meta: &BatchMeta,
) {
    let LoraShape { k, parts, .. } = &lora.shape;
    let groups = LoraGroup::of(meta);
    let mut products = Vec::new();
    let (mut at, mut work) = (0, 0);
    for group in &groups {
        let mut first_row = 0;
        for (adapter, &rows) in lora.slots[group.slot].iter().zip(parts) {
            if let Some(adapter) = adapter {
                products.push(Product { adapter, tokens: &group.tokens, rows, first_row, at });
                at += group.tokens.len() * adapter.rank;
                work += group.tokens.len() * adapter.rank * (k + rows);
            }
            first_row += rows;
        }
    }
    let (k, n, tokens) = (*k, lora.shape.n(), meta.num_tokens());
    let x = &x.as_slice()[..tokens * k];
    let mut low = vec![0.0; at];
    let shared = Shared::new(&mut low);
    let tasks = tasks(&products, |product| product.adapter.rank.div_ceil(RANKS));
    pool.for_each(tasks.len(), work / 16, |task| {
        let (product, piece) = (&products[tasks[task].0], tasks[task].1);
        host.run(Shrink { product, piece, x, k, low: shared });
    });
    let out = Shared::new(&mut out.as_mut_slice()[..tokens * n]);
    let tasks = self::tasks(&products, |product| product.rows.div_ceil(COLUMNS));
    pool.for_each(tasks.len(), work / 16, |task| {
        let (product, piece) = (&products[tasks[task].0], tasks[task].1);
        host.run(Expand { product, piece, low: &low, n, out });
    });
}

/// Each product with each of its pieces.
fn tasks(products: &[Product<'_>], pieces: impl Fn(&Product<'_>) -> usize) -> Vec<(usize, usize)> {
    let of = |(i, product)| (0..pieces(product)).map(move |piece| (i, piece));
    products.iter().enumerate().flat_map(of).collect()
}

/// Storage of a matrix.
trait Element {
    const SIZE: usize;
    /// # Safety
    /// `p` is valid for `LANES` elements.
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::F;
    /// # Safety
    /// `p` is valid for `n < LANES` elements.
    unsafe fn load_first<S: Simd>(s: S, p: *const u8, n: usize) -> S::F;
}

struct Bf16;
struct F32;

impl Element for Bf16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::F {
        // SAFETY: by the caller's word.
        unsafe { s.load_bf16(p) }
    }
    #[inline(always)]
    unsafe fn load_first<S: Simd>(s: S, p: *const u8, n: usize) -> S::F {
        // SAFETY: by the caller's word.
        unsafe { s.load_bf16_first(p, n) }
    }
}

impl Element for F32 {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::F {
        // SAFETY: by the caller's word; loads need no alignment.
        unsafe { s.load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_first<S: Simd>(s: S, p: *const u8, n: usize) -> S::F {
        // SAFETY: as above.
        unsafe { s.load_first(p.cast(), n) }
    }
}

/// `low[i, j] = A[j, :] · x[tokens[i], :]` for the rows j of one piece.
struct Shrink<'a> {
    product: &'a Product<'a>,
    piece: usize,
    x: &'a [f32],
    k: usize,
    low: Shared<f32>,
}

impl Job for Shrink<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match &self.product.adapter.a {
            Matrix::Bf16(a) => self.rows::<S, Bf16>(s, a),
            Matrix::F32(a) => self.rows::<S, F32>(s, a),
        }
    }
}

impl Shrink<'_> {
    #[inline(always)]
    fn rows<S: Simd, E: Element>(&self, s: S, a: &[u8]) {
        let (rank, k) = (self.product.adapter.rank, self.k);
        for j in self.piece * RANKS..rank.min((self.piece + 1) * RANKS) {
            let row = &a[j * k * E::SIZE..][..k * E::SIZE];
            for (i, &token) in self.product.tokens.iter().enumerate() {
                let x = &self.x[token as usize * k..][..k];
                let sum = dot::<S, E>(s, row, x);
                // SAFETY: inside `low`, and row j of the product is this task's own.
                unsafe { self.low.at(self.product.at + i * rank + j).write(sum) };
            }
        }
    }
}

/// In one order for each length: four sums of whole registers, then their sum, then that of the lanes.
#[inline(always)]
fn dot<S: Simd, E: Element>(s: S, row: &[u8], x: &[f32]) -> f32 {
    let (k, zero) = (x.len(), s.splat(0.0));
    let mut acc = [zero; 4];
    let mut at = 0;
    // SAFETY: `row` holds as many elements as `x`, and all loads stay below.
    unsafe {
        while at + 4 * S::LANES <= k {
            for (i, acc) in acc.iter_mut().enumerate() {
                let p = at + i * S::LANES;
                *acc = s.fma(E::load(s, row.as_ptr().add(p * E::SIZE)), s.load(x.as_ptr().add(p)), *acc);
            }
            at += 4 * S::LANES;
        }
        while at + S::LANES <= k {
            acc[0] = s.fma(E::load(s, row.as_ptr().add(at * E::SIZE)), s.load(x.as_ptr().add(at)), acc[0]);
            at += S::LANES;
        }
        if at < k {
            let w = E::load_first(s, row.as_ptr().add(at * E::SIZE), k - at);
            acc[1] = s.fma(w, s.load_first(x.as_ptr().add(at), k - at), acc[1]);
        }
    }
    s.sum(s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3])))
}

/// `out[tokens[i], n] += scale * Σ_j low[i, j] * B[j, n]`, j in order, for the columns n of one piece.
struct Expand<'a> {
    product: &'a Product<'a>,
    piece: usize,
    low: &'a [f32],
    n: usize,
    out: Shared<f32>,
}

impl Job for Expand<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match &self.product.adapter.b {
            Matrix::Bf16(b) => self.columns::<S, Bf16>(s, b),
            Matrix::F32(b) => self.columns::<S, F32>(s, b),
        }
    }
}

impl Expand<'_> {
    #[inline(always)]
    fn columns<S: Simd, E: Element>(&self, s: S, b: &[u8]) {
        let Product { adapter, tokens, rows, first_row, at } = self.product;
        let (first, end) = (self.piece * COLUMNS, (*rows).min((self.piece + 1) * COLUMNS));
        let scale = s.splat(adapter.scale);
        for (i, &token) in tokens.iter().enumerate() {
            let low = &self.low[at + i * adapter.rank..][..adapter.rank];
            let mut column = first;
            while column < end {
                let width = (end - column).min(S::LANES);
                let whole = width == S::LANES;
                let mut acc = s.splat(0.0);
                // SAFETY: B is `[r, rows]`; the columns are inside the part and this task's own; the token's row is inside `out`.
                unsafe {
                    for (j, &low) in low.iter().enumerate() {
                        let p = b.as_ptr().add((j * rows + column) * E::SIZE);
                        let w = if whole { E::load(s, p) } else { E::load_first(s, p, width) };
                        acc = s.fma(s.splat(low), w, acc);
                    }
                    let out = self.out.at(token as usize * self.n + first_row + column);
                    if whole {
                        s.store(out, s.fma(scale, acc, s.load(out)));
                    } else {
                        s.store_first(out, s.fma(scale, acc, s.load_first(out, width)), width);
                    }
                }
                column += width;
            }
        }
    }
}
