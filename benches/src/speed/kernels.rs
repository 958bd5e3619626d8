//! One op at a time, at the shapes of Mistral-7B.
//!
//! Every case runs over several sets of inputs, together larger than the last cache, so that weights come from memory as they do
//! in a model. Bytes are those of reading each input once and writing each output once.

use std::{f32::consts::PI, time::Duration};

use tidemill_kernels::{
    DType, KernelError, Ops,
    ops::{Epilogue, Extent, HeadShape, KvShape, Lookup, Norm, QkTransform, Rotary, Scoring},
    sampling::SampleSpec,
};

use super::{
    Error,
    clock::Work,
    experts,
    limits::Limits,
    machine::Machine,
    random::RandomTensors,
    shapes::{LOGITS_DEPTH, Options, Shapes, TABLE_ROWS},
    steps::{BLOCK_SIZE, Layout, Step, tasks},
    table::{Cost, Table},
};

/// Input sets are this many times larger than the last cache, all together.
const CACHE_MULTIPLE: usize = 4;
/// At most so many sets.
const MAX_SETS: usize = 64;
/// Calls that a repetition of a small case makes at least.
const MIN_CALLS: usize = 32;
/// Smaller cases are repeated.
const SMALL_BYTES: f64 = 16e6;
/// The plain look-up.
const TOKENS: Lookup = Lookup::Tokens { scale: 1.0 };
pub(super) const BF16: f64 = 2.0;
pub(super) const F32: f64 = 4.0;

/// Measures and prints every case that is wanted.
///
/// # Errors
/// When the machine cannot be used at all; cases that fail are in the table.
pub fn run<M: Machine>(machine: &M, options: &Options, table: &mut Table) -> Result<(), Error> {
    let bandwidth = machine.bandwidth(options.budget)?;
    let gb = |rate: f64| format!("{:.0} GB/s", rate / 1e9);
    println!("memory: {} read, {} copied", gb(bandwidth.read), bandwidth.copy.map_or("?".into(), gb));
    table.fact("read_bytes_per_second", bandwidth.read.into());
    table.fact("copy_bytes_per_second", bandwidth.copy.into());
    let shapes = &options.shapes;
    let mut bench = Bench {
        machine,
        options,
        ops: machine.ops(shapes.sizes())?,
        random: RandomTensors::new(shapes.largest(), 1.0),
        table,
    };
    let product = bench.peak_product()?;
    let flops = product.max(options.peak_flops.unwrap_or(0.0));
    bench.table.fact("own_gemm_flops", product.into());
    bench.table.set_limits(Limits { bandwidth: bandwidth.best(), flops });
    bench.products();
    bench.quantized_products();
    bench.attention();
    bench.pointwise();
    bench.sampling();
    bench.experts();
    Ok(())
}

/// Floating-point operations per second of the best matrix product.
///
/// # Errors
/// What the device returned.
pub fn best_product<M: Machine>(machine: &M, budget: Duration) -> Result<f64, Error> {
    let shapes = if machine.is_real() { Shapes::full() } else { Shapes::tiny() };
    let options = Options { shapes, only: String::new(), budget, peak_flops: None };
    let bench = Bench {
        machine,
        options: &options,
        ops: machine.ops(options.shapes.sizes())?,
        random: RandomTensors::new(options.shapes.largest(), 1.0),
        table: &mut Table::new(serde_json::json!({})),
    };
    Ok(bench.peak_product()?)
}

pub(super) struct Bench<'a, M: Machine> {
    machine: &'a M,
    pub(super) options: &'a Options,
    pub(super) ops: M::Ops,
    pub(super) random: RandomTensors,
    table: &'a mut Table,
}

type Buffer<M> = <<M as Machine>::Ops as Ops>::Buffer;
pub(super) type Weight<M> = <<M as Machine>::Ops as Ops>::Weight;
type Batch<M> = <<M as Machine>::Ops as Ops>::Batch;

impl<M: Machine> Bench<'_, M> {
    /// Times a case: `build` makes the inputs for a number of sets, and work that goes over them `passes` times.
    pub(super) fn case(
        &mut self,
        name: &str,
        cost: Cost,
        measure: impl FnOnce(&Self, Plan) -> Result<f64, KernelError>,
    ) {
        if !name.contains(&self.options.only) {
            return;
        }
        match measure(self, self.plan(cost)) {
            Ok(seconds) => self.table.kernel(name, seconds, cost),
            Err(KernelError::Unsupported { op, detail }) => {
                self.table.skipped(name, &format!("{op}: {detail}"));
            }
            Err(error) => self.table.failed(name, &error.to_string()),
        }
    }

    pub(super) fn plan(&self, cost: Cost) -> Plan {
        if !self.machine.is_real() {
            return Plan { sets: 2, passes: 1 };
        }
        let sets = (CACHE_MULTIPLE * self.machine.cache_bytes())
            .div_ceil(cost.bytes as usize + 1)
            .clamp(2, MAX_SETS);
        let passes = if cost.bytes < SMALL_BYTES { MIN_CALLS.div_ceil(sets) } else { 1 };
        Plan { sets, passes }
    }

    /// Seconds of one call of `work`, which makes `plan.calls()`.
    pub(super) fn seconds(&self, plan: Plan, work: &mut dyn Work) -> Result<f64, KernelError> {
        Ok(self.machine.clock().seconds(work, self.options.budget)? / plan.calls() as f64)
    }

    /// A step on the device. A device may keep the metadata of the last one alone, so whatever else a case uploads comes before.
    fn batch(&self, step: Step, layout: Layout, spec: &SampleSpec) -> Result<Batch<M>, KernelError> {
        let meta = step.meta(layout, self.options.shapes.sampled_vocab);
        self.ops.upload(meta.into(), tasks(step.rows, spec))
    }

    /// What the device makes of a step's extents.
    fn extent(&self, step: Step, layout: Layout) -> Result<Extent, KernelError> {
        Ok(self.ops.extent(&self.batch(step, layout, &SampleSpec::greedy())?))
    }

    /// A random weight.
    pub(super) fn weight(&self, rows: usize, columns: usize) -> Result<Weight<M>, KernelError> {
        self.ops.weight(&[self.random.matrix(rows, columns).into()], &[])
    }

    /// Random activations: rows of a random embedding table.
    pub(super) fn activations(&self, rows: usize, width: usize) -> Result<Buffer<M>, KernelError> {
        let meta = Step::of(1, rows, rows).meta(Layout::new(1, rows), TABLE_ROWS);
        let batch = self.ops.upload(meta.into(), tasks(1, &SampleSpec::greedy()))?;
        let mut out = self.ops.buffer(self.ops.extent(&batch).tokens.max(rows) * width)?;
        let table = self.weight(TABLE_ROWS, width)?;
        self.ops.embedding(&mut out, &table, &batch, TOKENS)?;
        // The table must live until it has been read.
        self.ops.download(&out, 1)?;
        Ok(out)
    }

    fn attention(&mut self) {
        let shapes = self.options.shapes.clone();
        let HeadShape { num_heads, num_kv_heads, head_dim } = shapes.heads;
        for &(name, rows, context, new) in &shapes.attention {
            let step = Step::of(rows, new, context);
            // Each new token sees itself and what is before it.
            let pairs: usize = (context - new..context).map(|position| rows * (position + 1)).sum();
            let kv = 2 * rows * context * num_kv_heads * head_dim;
            let io = 2 * rows * new * num_heads * head_dim;
            let flops = 4.0 * pairs as f64 * (num_heads * head_dim) as f64;
            let cost = Cost { bytes: BF16 * (kv + io) as f64, flops };
            self.case(name, cost, |bench, plan| bench.attention_case(step, plan));
        }
    }

    fn kv_cache(&self, layout: Layout, layers: usize) -> Result<<M::Ops as Ops>::KvCache, KernelError> {
        let HeadShape { num_kv_heads, head_dim, .. } = self.options.shapes.heads;
        self.ops.kv_cache(KvShape {
            num_layers: layers,
            num_blocks: layout.num_blocks(),
            block_size: BLOCK_SIZE,
            num_kv_heads,
            head_dim,
            value_dim: head_dim,
            dtype: DType::Bf16,
        })
    }

    fn rope(&self) -> Result<<M::Ops as Ops>::Vector, KernelError> {
        let sizes = self.options.shapes.sizes();
        let (half, mut table) = (sizes.heads.head_dim / 2, Vec::new());
        for position in 0..sizes.max_model_len {
            let angle = |i: usize| position as f32 * 10_000_f32.powf(-(i as f32) / half as f32) % (2.0 * PI);
            table.extend((0..half).map(|i| angle(i).cos()));
            table.extend((0..half).map(|i| angle(i).sin()));
        }
        self.ops.vector(&table)
    }

    /// Layers are the sets: each has keys and values of its own.
    fn attention_case(&self, step: Step, plan: Plan) -> Result<f64, KernelError> {
        let shapes = &self.options.shapes;
        let (heads, layout) = (shapes.heads, Layout::new(step.rows, step.context));
        let (mut kv, rope) = (self.kv_cache(layout, plan.sets)?, self.rope()?);
        let at_once = shapes.sizes().max_tokens;
        let tokens = at_once.min(step.rows * step.context);
        let mut qkv = self.activations(tokens, heads.qkv_width())?;
        for chunk in chunks(step, at_once) {
            let batch = self.batch(chunk, layout, &SampleSpec::greedy())?;
            for layer in 0..plan.sets {
                self.ops.rope_kv_write(&mut qkv, &mut kv, transform(&rope, heads), &batch, heads, layer)?;
            }
            self.ops.download(&qkv, 1)?;
        }
        let tokens = self.extent(step, layout)?.tokens;
        let qkv = self.activations(tokens, heads.qkv_width())?;
        let mut out = self.ops.buffer(tokens * heads.num_heads * heads.head_dim)?;
        let batch = self.batch(step, layout, &SampleSpec::greedy())?;
        let scale = (heads.head_dim as f32).powf(-0.5);
        let scoring =
            Scoring { scale, window: None, soft_cap: None, slopes: None, sinks: None, causal: true };
        let mut work = || -> Result<(), KernelError> {
            for _ in 0..plan.passes {
                for layer in 0..plan.sets {
                    self.ops.paged_attention(&mut out, &qkv, &kv, &batch, heads, scoring, layer)?;
                }
            }
            Ok(())
        };
        self.seconds(plan, &mut work)
    }

    fn pointwise(&mut self) {
        let shapes = self.options.shapes.clone();
        for &(m, rows) in shapes.rows.iter().filter(|(_, rows)| ![8, 256, 1024].contains(rows)) {
            let (t, h) = (rows as f64, shapes.hidden as f64);
            let norm = Cost { bytes: BF16 * 2.0 * t * h + F32 * h, flops: 0.0 };
            self.case(&format!("rmsnorm {m}"), norm, |bench, plan| bench.rmsnorm_case(rows, plan));
            let embedding = Cost { bytes: BF16 * 2.0 * t * h, flops: 0.0 };
            self.case(&format!("embedding {m}"), embedding, |bench, plan| bench.embedding_case(rows, plan));
            let (qkv, d) = (shapes.heads.qkv_width() as f64, shapes.heads.head_dim as f64);
            // Reads all of qkv and a row of the table; writes queries in place, keys and values into the cache.
            let rope = Cost { bytes: t * (BF16 * 2.0 * qkv + F32 * d), flops: 0.0 };
            self.case(&format!("rope + kv write {m}"), rope, |bench, plan| bench.rope_case(rows, plan));
        }
    }

    fn rmsnorm_case(&self, rows: usize, plan: Plan) -> Result<f64, KernelError> {
        let h = self.options.shapes.hidden;
        let weight = self.ops.vector(&vec![1.0; h])?;
        let norm = Norm::Rms { weight: &weight, eps: 1e-5 };
        let x: Vec<_> = (0..plan.sets).map(|_| self.activations(rows, h)).collect::<Result<_, _>>()?;
        let mut out = self.ops.buffer(rows * h)?;
        let mut work =
            || (0..plan.passes).flat_map(|_| &x).try_for_each(|x| self.ops.norm(&mut out, x, norm, rows));
        self.seconds(plan, &mut work)
    }

    fn embedding_case(&self, rows: usize, plan: Plan) -> Result<f64, KernelError> {
        let shapes = &self.options.shapes;
        // Tables are large, whatever few of their rows are read.
        let plan = Plan { sets: 2, passes: plan.calls().div_ceil(2) };
        let tables: Vec<_> =
            (0..plan.sets).map(|_| self.weight(shapes.vocab, shapes.hidden)).collect::<Result<_, _>>()?;
        let meta = Step::of(1, rows, rows).meta(Layout::new(1, rows), shapes.vocab);
        let batch = self.ops.upload(meta.into(), tasks(1, &SampleSpec::greedy()))?;
        let mut out = self.ops.buffer(self.ops.extent(&batch).tokens * shapes.hidden)?;
        let mut work = || {
            (0..plan.passes)
                .flat_map(|_| &tables)
                .try_for_each(|table| self.ops.embedding(&mut out, table, &batch, TOKENS))
        };
        self.seconds(plan, &mut work)
    }

    fn rope_case(&self, rows: usize, plan: Plan) -> Result<f64, KernelError> {
        let heads = self.options.shapes.heads;
        let step = Step::of(1, rows, rows);
        let layout = Layout::new(1, rows);
        let (mut kv, rope) = (self.kv_cache(layout, plan.sets)?, self.rope()?);
        let tokens = self.extent(step, layout)?.tokens;
        let mut qkv: Vec<_> =
            (0..plan.sets).map(|_| self.activations(tokens, heads.qkv_width())).collect::<Result<_, _>>()?;
        let batch = self.batch(step, layout, &SampleSpec::greedy())?;
        let mut work = || -> Result<(), KernelError> {
            for _ in 0..plan.passes {
                for (layer, qkv) in qkv.iter_mut().enumerate() {
                    self.ops.rope_kv_write(qkv, &mut kv, transform(&rope, heads), &batch, heads, layer)?;
                }
            }
            Ok(())
        };
        self.seconds(plan, &mut work)
    }

    fn experts(&mut self) {
        let shapes = self.options.shapes.clone();
        for &(m, tokens) in shapes.rows.iter().filter(|(_, rows)| ![8, 256, 1024].contains(rows)) {
            let name = format!("experts {m}");
            self.case(&name, shapes.experts.cost(tokens), |bench, _| match bench.machine.as_cuda() {
                Some(machine) => experts::layer(machine, shapes.experts, tokens, bench.options.budget),
                None => Err(KernelError::Unsupported {
                    op: "moe",
                    detail: "only a GPU has a mixture of experts".into(),
                }),
            });
        }
    }

    fn sampling(&mut self) {
        let (rows, vocab) = (self.options.shapes.sampled_rows, self.options.shapes.sampled_vocab);
        let drawn = SampleSpec { temperature: 1.0, ..SampleSpec::greedy() };
        let filtered = SampleSpec { top_k: 50, top_p: 0.9, ..drawn.clone() };
        let cost = Cost { bytes: F32 * (rows * vocab) as f64, flops: 0.0 };
        for (name, spec) in [
            ("sample greedy", SampleSpec::greedy()),
            ("sample temperature", drawn),
            ("sample top-k top-p", filtered),
        ] {
            self.case(name, cost, |bench, plan| bench.sampling_case(&spec, plan));
        }
    }

    fn sampling_case(&self, spec: &SampleSpec, plan: Plan) -> Result<f64, KernelError> {
        let Shapes { sampled_rows: rows, sampled_vocab: vocab, .. } = self.options.shapes;
        let (step, layout) = (Step::of(rows, 1, 1), Layout::new(rows, 1));
        let padded = self.extent(step, layout)?.logits_rows;
        let logits = (0..plan.sets).map(|_| self.ops.logits_buffer(padded * vocab));
        let mut work = Sampling {
            bench: self,
            x: self.activations(padded, LOGITS_DEPTH)?,
            weight: self.weight(vocab, LOGITS_DEPTH)?,
            logits: logits.collect::<Result<_, _>>()?,
            batch: self.batch(step, layout, spec)?,
            rows: padded,
        };
        let seconds = self.machine.clock().seconds(&mut work, self.options.budget)?;
        Ok(seconds / plan.sets as f64)
    }
}

/// Rotation of whole heads.
fn transform<V>(table: &V, heads: HeadShape) -> QkTransform<'_, V> {
    QkTransform { norm: None, rotary: Some(Rotary { table, dim: heads.head_dim, interleaved: false }) }
}

/// How a case goes over its inputs.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    pub(super) sets: usize,
    pub(super) passes: usize,
}

impl Plan {
    fn calls(self) -> usize {
        self.sets * self.passes
    }
}

/// Sampling overwrites its logits, so they are made anew before each repetition: a product of 64 terms, so that they are peaked
/// as a model's are, with a standard deviation near 3.
struct Sampling<'a, 'b, M: Machine> {
    bench: &'a Bench<'b, M>,
    x: Buffer<M>,
    weight: Weight<M>,
    logits: Vec<Buffer<M>>,
    batch: Batch<M>,
    rows: usize,
}

impl<M: Machine> Work for Sampling<'_, '_, M> {
    fn prepare(&mut self) -> Result<(), KernelError> {
        let ops = &self.bench.ops;
        self.logits
            .iter_mut()
            .try_for_each(|logits| ops.linear(logits, &self.x, &self.weight, self.rows, Epilogue::Store))
    }

    fn queue(&mut self) -> Result<(), KernelError> {
        let (ops, vocab) = (&self.bench.ops, self.bench.options.shapes.sampled_vocab);
        let rows = 0..self.rows;
        self.logits.iter_mut().try_for_each(|logits| ops.sample(logits, vocab, &self.batch, rows.clone()))
    }
}

/// Steps of at most `most` tokens that together compute everything that `step` finds in the cache.
fn chunks(step: Step, most: usize) -> Vec<Step> {
    let Step { rows, context, .. } = step;
    if context > most {
        let ends = (0..context).step_by(most).map(|start| (start, context.min(start + most)));
        return ends
            .flat_map(|(start, end)| {
                (0..rows).map(move |first| Step { first, rows: 1, new: end - start, context: end })
            })
            .collect();
    }
    let at_once = most / context;
    (0..rows)
        .step_by(at_once)
        .map(|first| Step { first, rows: at_once.min(rows - first), new: context, context })
        .collect()
}
