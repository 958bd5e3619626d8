//! Matrix products: with weights in bf16, and with quantised ones.

use tidemill_kernels::{
    KernelError, Ops,
    ops::{Activation, Epilogue},
    tensor::QuantFormat,
};

use super::{
    kernels::{BF16, Bench, F32, Plan, Weight},
    machine::Machine,
    table::Cost,
};

/// A matrix product.
#[derive(Clone, Copy)]
struct Product {
    rows: usize,
    n: usize,
    k: usize,
    kind: Kind,
    /// Of the weight; nothing: bf16.
    format: Option<QuantFormat>,
}

/// Formats of quantised weights, and the bits of a weight on a GPU, scales and all.
const FORMATS: [(&str, QuantFormat, f64); 4] = [
    ("fp8", QuantFormat::Fp8 { rows: 128, columns: 128 }, 8.25),
    ("int8", QuantFormat::Int8 { group: 128 }, 8.25),
    ("int4", QuantFormat::Int4 { group: 128 }, 4.5),
    ("mxfp4", QuantFormat::Mxfp4, 4.25),
];

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Plain,
    /// With f32 outputs.
    Logits,
    /// N outputs from 2 N weight rows.
    Gated,
}

impl Product {
    fn weight_rows(&self) -> usize {
        if self.kind == Kind::Gated { 2 * self.n } else { self.n }
    }

    fn cost(&self) -> Cost {
        let (rows, n, k) = (self.rows as f64, self.n as f64, self.k as f64);
        let weights = self.weight_rows() as f64 * k;
        let out = rows * n * if self.kind == Kind::Logits { F32 } else { BF16 };
        let bits = FORMATS.iter().find(|(_, format, _)| Some(*format) == self.format).map_or(16.0, |f| f.2);
        Cost { bytes: BF16 * rows * k + bits / 8.0 * weights + out, flops: 2.0 * rows * weights }
    }
}

impl<M: Machine> Bench<'_, M> {
    /// A random weight, in a format.
    fn weight_in(
        &self,
        format: Option<QuantFormat>,
        rows: usize,
        columns: usize,
    ) -> Result<Weight<M>, KernelError> {
        let Some(format) = format else { return self.weight(rows, columns) };
        self.ops.weight(&[self.random.quantized(format, [rows, columns]).into()], &[])
    }

    /// The rate of the largest square product: the bound that all others are compared with.
    pub(super) fn peak_product(&self) -> Result<f64, KernelError> {
        let n = self.options.shapes.square.iter().map(|s| s.1).max().unwrap_or(1);
        let product = Product { rows: n, n, k: n, kind: Kind::Plain, format: None };
        Ok(product.cost().flops / self.product(product, self.plan(product.cost()))?)
    }

    fn product(&self, product: Product, plan: Plan) -> Result<f64, KernelError> {
        let Product { rows, n, k, kind, format } = product;
        let x: Vec<_> = (0..plan.sets).map(|_| self.activations(rows, k)).collect::<Result<_, _>>()?;
        let w: Vec<_> = (0..plan.sets)
            .map(|_| self.weight_in(format, product.weight_rows(), k))
            .collect::<Result<_, _>>()?;
        let mut out = match kind {
            Kind::Logits => self.ops.logits_buffer(rows * n)?,
            _ => self.ops.buffer(rows * n)?,
        };
        let mut scratch = self.ops.scratch_buffer(if kind == Kind::Gated { rows * 2 * n } else { 1 })?;
        let mut work = || -> Result<(), KernelError> {
            for _ in 0..plan.passes {
                for (x, w) in x.iter().zip(&w) {
                    match kind {
                        Kind::Gated => {
                            self.ops.linear_gated(&mut out, &mut scratch, x, w, rows, Activation::Silu)?;
                        }
                        _ => self.ops.linear(&mut out, x, w, rows, Epilogue::Store)?,
                    }
                }
            }
            Ok(())
        };
        self.seconds(plan, &mut work)
    }

    pub(super) fn products(&mut self) {
        let shapes = self.options.shapes.clone();
        let (h, q) = (shapes.hidden, shapes.heads.num_heads * shapes.heads.head_dim);
        for &(name, n) in &shapes.square {
            let product = Product { rows: n, n, k: n, kind: Kind::Plain, format: None };
            self.case(name, product.cost(), |bench, plan| bench.product(product, plan));
        }
        let projections = [
            ("qkv", shapes.heads.qkv_width(), h, Kind::Plain),
            ("o", h, q, Kind::Plain),
            ("gate_up", shapes.inter, h, Kind::Gated),
            ("down", h, shapes.inter, Kind::Plain),
            ("lm_head", shapes.vocab, h, Kind::Logits),
        ];
        for (projection, n, k, kind) in projections {
            for &(name, rows) in &shapes.rows {
                // Nobody wants so many rows of logits at once.
                if kind == Kind::Logits && rows > 256 {
                    continue;
                }
                let product = Product { rows, n, k, kind, format: None };
                self.case(&format!("{projection} {name}"), product.cost(), |bench, plan| {
                    bench.product(product, plan)
                });
            }
        }
    }

    pub(super) fn quantized_products(&mut self) {
        let shapes = self.options.shapes.clone();
        for (format_name, format, _) in FORMATS {
            for (projection, n, k, kind) in [
                ("gate_up", shapes.inter, shapes.hidden, Kind::Gated),
                ("down", shapes.hidden, shapes.inter, Kind::Plain),
            ] {
                for &(name, rows) in &shapes.rows {
                    let product = Product { rows, n, k, kind, format: Some(format) };
                    self.case(
                        &format!("{projection} {format_name} {name}"),
                        product.cost(),
                        |bench, plan| bench.product(product, plan),
                    );
                }
            }
        }
    }
}
