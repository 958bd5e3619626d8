//! The products of experts and of heads.
//!
//! The rows that go to one expert are gathered and meet its matrix in one product, so a step reads each chosen expert once. A row's bits do not
//! depend on who else goes there, as those of a product do not.

use std::sync::{Mutex, PoisonError};

use super::{
    CpuBuffer, CpuWeight, activation,
    add::Scaled,
    isa::Host,
    linear::{self, Linear},
    pool::{Pool, Shared},
    routes::CpuRoutes,
};
use crate::{
    error::KernelError,
    ops::{Activation, Epilogue, Result},
    tensor::ExpertParts,
};

/// Elements of a task that copies.
const CHUNK: usize = 16_384;

/// `Ops::experts`.
pub(super) fn new(experts: &[ExpertParts]) -> Result<Vec<CpuWeight>> {
    let weights: Vec<CpuWeight> =
        experts.iter().map(|e| CpuWeight::new(&e.parts, &e.bias)).collect::<Result<_>>()?;
    let shape = |w: &CpuWeight| vec![w.n, w.k];
    for (i, weight) in weights.iter().enumerate() {
        if shape(weight) != shape(&weights[0]) {
            let (what, got, expected) = (format!("expert {i}"), shape(weight), shape(&weights[0]));
            return Err(KernelError::Shape { op: "experts", what, got, expected });
        }
    }
    Ok(weights)
}

/// What the products of experts share: threads, products, and memory for gathered rows.
pub(super) struct Experts<'a> {
    pub(super) host: Host,
    pub(super) pool: &'a Pool,
    pub(super) linear: &'a Linear,
    pub(super) gathered: &'a Mutex<Vec<f32>>,
}

impl Experts<'_> {
    /// `Ops::moe_gated`.
    pub(super) fn gated(
        &self,
        out: &mut CpuBuffer,
        scratch: &mut CpuBuffer,
        x: &CpuBuffer,
        (experts, routes): (&[CpuWeight], &CpuRoutes),
        (rows, activation): (usize, Activation),
    ) -> Result<()> {
        let Some(n) = experts.first().map(|e| e.n) else { return Ok(()) };
        let (k, pairs) = (routes.top_k(), rows * routes.top_k());
        self.products(scratch, x, (experts, routes), pairs, |pair| pair / k)?;
        let place = |at: usize| routes.pair(at);
        activation::gate(self.host, self.pool, out, scratch, [pairs, n / 2], activation, place);
        Ok(())
    }

    /// `Ops::moe_combine`.
    pub(super) fn combine(
        &self,
        out: &mut CpuBuffer,
        scratch: &mut CpuBuffer,
        x: &CpuBuffer,
        (experts, routes): (&[CpuWeight], &CpuRoutes),
        rows: usize,
    ) -> Result<()> {
        let Some(h) = experts.first().map(|e| e.n) else { return Ok(()) };
        let (k, pairs) = (routes.top_k(), rows * routes.top_k());
        self.products(scratch, x, (experts, routes), pairs, |pair| pair)?;
        let y = &scratch.as_slice()[..pairs * h];
        let out = Shared::new(&mut out.as_mut_slice()[..rows * h]);
        self.pool.for_each(rows, pairs * h / 8, |r| {
            for pair in r * k..(r + 1) * k {
                let (place, weight) = routes.of(pair);
                // SAFETY: row `r` of the output is this task's own.
                let out = unsafe { out.slice(r * h, h) };
                let x = &y[place * h..][..h];
                self.host.run(Scaled { out, x, factor: weight });
            }
        });
        Ok(())
    }

    /// The product of each pair's row of `x`, which is row `row(pair)`, with its expert's matrix: to `out`, in the order of experts.
    fn products(
        &self,
        out: &mut CpuBuffer,
        x: &CpuBuffer,
        (experts, routes): (&[CpuWeight], &CpuRoutes),
        pairs: usize,
        row: impl Fn(usize) -> usize + Sync,
    ) -> Result<()> {
        assert!(experts.len() == routes.experts(), "routes to other experts");
        assert!(pairs == routes.pairs(), "routes of {} pairs for {pairs}", routes.pairs());
        let (n, k) = (experts[0].n, experts[0].k);
        let mut gathered = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
        if gathered.len() < pairs * k {
            gathered.resize(pairs * k, 0.0);
        }
        copy_rows(self.pool, &mut gathered, x.as_slice(), [pairs, k], |at| {
            let from = row(routes.pair(at));
            [from * k, at * k]
        });
        for (expert, first, rows) in routes.used() {
            let (out, x) = (&mut out.as_mut_slice()[first * n..], &gathered[first * k..]);
            let (weight, epilogue) = (&experts[expert], Epilogue::Store);
            self.linear.run(self.pool, linear::Call { out, x, weight, rows, epilogue })?;
        }
        Ok(())
    }

    /// `Ops::linear_heads`.
    pub(super) fn heads(
        &self,
        out: &mut CpuBuffer,
        x: &CpuBuffer,
        heads: &[CpuWeight],
        rows: usize,
    ) -> Result<()> {
        let Some((count, n, k)) = heads.first().map(|h| (heads.len(), h.n, h.k)) else { return Ok(()) };
        let (x, out) = (&x.as_slice()[..rows * count * k], &mut out.as_mut_slice()[..rows * count * n]);
        let epilogue = Epilogue::Store;
        if rows == 1 {
            for (i, weight) in heads.iter().enumerate() {
                let (out, x) = (&mut out[i * n..], &x[i * k..]);
                self.linear.run(self.pool, linear::Call { out, x, weight, rows, epilogue })?;
            }
            return Ok(());
        }
        let mut memory = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
        if memory.len() < rows * count * (k + n) {
            memory.resize(rows * count * (k + n), 0.0);
        }
        // Heads outside, rows inside, and back.
        let (xs, ys) = memory.split_at_mut(rows * count * k);
        let at = |i: usize, width: usize| [(i % rows * count + i / rows) * width, i * width];
        copy_rows(self.pool, xs, x, [rows * count, k], |i| at(i, k));
        for (i, weight) in heads.iter().enumerate() {
            let (out, x) = (&mut ys[i * rows * n..], &xs[i * rows * k..]);
            self.linear.run(self.pool, linear::Call { out, x, weight, rows, epilogue })?;
        }
        copy_rows(self.pool, out, ys, [rows * count, n], |i| {
            let [to, from] = at(i, n);
            [from, to]
        });
        Ok(())
    }
}

/// Copies `rows` rows of `width` elements, each `from` one place `to` another: no two to the same.
fn copy_rows(
    pool: &Pool,
    out: &mut [f32],
    x: &[f32],
    [rows, width]: [usize; 2],
    place: impl Fn(usize) -> [usize; 2] + Sync,
) {
    let len = out.len();
    let out = Shared::new(out);
    let chunk = (CHUNK / width.max(1)).max(1);
    pool.for_each(rows.div_ceil(chunk), rows * width / 8, |task| {
        for i in task * chunk..rows.min((task + 1) * chunk) {
            let [from, to] = place(i);
            assert!(to + width <= len, "a row at {to} of {len}");
            // SAFETY: these outputs are there, and no other task's.
            unsafe { out.slice(to, width) }.copy_from_slice(&x[from..from + width]);
        }
    });
}
