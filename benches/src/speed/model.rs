//! Whole steps of models of real size: one prompt of 1k and of 8k tokens, and decoding at 1k of context.
//!
//! The floor of a step is the sum of two: matrix products (each weight read once, two operations per weight and token) and
//! attention (keys and values read once, four operations per pair of positions, query head and dimension); each part takes the
//! larger of its bytes at the memory's rate and its operations at the best product's rate.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;
use tidemill_engine::model::{
    decoder::{Decoder, DecoderLimits},
    spec::ModelSpec,
};
use tidemill_kernels::{
    DType,
    ops::BatchMeta,
    sampling::{RowTask, SampleSpec},
};

use super::{
    Error,
    limits::Limits,
    loop_cost,
    machine::{Machine, Sizes},
    random::RandomTensors,
    steps::{BLOCK_SIZE, Layout, Step, tasks},
    table::Table,
};
use crate::summary::median;

/// Bytes of a bf16 number.
const BF16: f64 = 2.0;
/// Steps in flight at once: one runs while the next is queued, as in the engine.
const IN_FLIGHT: usize = 2;

/// A model: its name and what its `config.json` says.
#[derive(Debug, Clone)]
pub struct Shape {
    /// As results name it.
    pub name: &'static str,
    /// `config.json`.
    pub config: serde_json::Value,
}

impl Shape {
    /// The models that are measured.
    pub fn all() -> Vec<Self> {
        let llama = |vocab, theta| {
            json!({
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": vocab, "rms_norm_eps": 1e-5, "rope_theta": theta,
                "max_position_embeddings": 32768, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
                "bos_token_id": 1, "eos_token_id": 2,
            })
        };
        let mut mistral = llama(32000, 10000.0);
        mistral["architectures"] = json!(["MistralForCausalLM"]);
        mistral["model_type"] = json!("mistral");
        // Version 0.2 and later; the first one had a window.
        mistral["sliding_window"] = json!(null);
        // In Llama's wiring: without its norms of queries and keys, which move few bytes.
        let mut qwen = llama(151_936, 1e6);
        for (key, value) in [
            ("hidden_size", json!(1024)),
            ("intermediate_size", json!(3072)),
            ("num_hidden_layers", json!(28)),
            ("num_attention_heads", json!(16)),
            ("head_dim", json!(128)),
            ("tie_word_embeddings", json!(true)),
            ("rms_norm_eps", json!(1e-6)),
        ] {
            qwen[key] = value;
        }
        vec![
            Self { name: "mistral-7b", config: mistral },
            Self { name: "llama-3.1-8b", config: llama(128_256, 500_000.0) },
            Self { name: "qwen3-0.6b", config: qwen },
        ]
    }

    /// The same wiring, so small that the emulator is done in seconds.
    #[must_use]
    pub fn tiny(mut self) -> Self {
        for (key, value) in [
            ("hidden_size", 64),
            ("intermediate_size", 96),
            ("num_hidden_layers", 2),
            ("num_attention_heads", 2),
            ("num_key_value_heads", 1),
            ("head_dim", 64),
            ("vocab_size", 512),
        ] {
            self.config[key] = json!(value);
        }
        self
    }
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// Models.
    pub shapes: Vec<Shape>,
    /// Cases whose names contain this.
    pub only: String,
    /// Sequences that decode together.
    pub batches: Vec<usize>,
    /// Their tokens in the cache.
    pub context: usize,
    /// Prompts: the end of the case's name, and tokens.
    pub prompts: Vec<(&'static str, usize)>,
    /// Steps of each measurement.
    pub steps: usize,
    /// T of the largest step.
    pub max_tokens: usize,
}

impl Options {
    /// Real sizes.
    pub fn full() -> Self {
        Self {
            shapes: Shape::all(),
            only: String::new(),
            batches: vec![1, 8, 64, 256],
            context: 1024,
            prompts: vec![("1k", 1024), ("8k", 8192)],
            steps: 64,
            max_tokens: 8192,
        }
    }

    /// Sizes for a dry run.
    pub fn tiny() -> Self {
        let shapes = Shape::all().into_iter().map(Shape::tiny).collect();
        Self {
            shapes,
            batches: vec![1, 3],
            context: 24,
            prompts: vec![("1k", 20)],
            steps: 3,
            max_tokens: 48,
            ..Self::full()
        }
    }
}

/// Measures every model and prints it.
///
/// # Errors
/// When the machine cannot be used at all; models that fail are in the table.
pub fn run<M: Machine>(
    machine: &M,
    options: &Options,
    limits: Limits,
    table: &mut Table,
) -> Result<(), Error> {
    for shape in &options.shapes {
        let bytes = serde_json::to_vec(&shape.config)?;
        match ModelSpec::from_json(shape.name.as_ref(), &bytes) {
            Err(error) => table.skipped(shape.name, &error.to_string()),
            Ok(spec) => {
                let measured = Model::load(machine, options, limits, &spec, shape.name)
                    .and_then(|model| model.measure(table));
                if let Err(error) = measured {
                    table.failed(shape.name, &error.to_string());
                }
            }
        }
    }
    Ok(())
}

struct Model<'a, M: Machine> {
    machine: &'a M,
    options: &'a Options,
    limits: Limits,
    spec: ModelSpec,
    name: &'static str,
    layout: Layout,
    decoder: Decoder<M::Ops>,
}

impl<'a, M: Machine> Model<'a, M> {
    fn load(
        machine: &'a M,
        options: &'a Options,
        limits: Limits,
        spec: &ModelSpec,
        name: &'static str,
    ) -> Result<Self, Error> {
        let start = Instant::now();
        let rows = options.batches.iter().copied().max().unwrap_or(1);
        let longest = options.prompts.iter().map(|p| p.1).max().unwrap_or(1);
        // Room for the tokens of every measured step, and for those of the engine's own run.
        let capacity = options.context + 2 * loop_cost::tokens(options.steps) + 3 * options.steps;
        let max_model_len = longest.max(capacity);
        let sizes = Sizes {
            max_tokens: options.max_tokens,
            max_rows: rows,
            max_model_len,
            heads: spec.head_shape(),
            vocab: spec.vocab_size,
        };
        let largest =
            spec.tensors().iter().map(|tensor| tensor.shape.iter().product::<usize>()).max().unwrap_or(1);
        let random = RandomTensors::new(largest, 0.04);
        let limits_of_steps = DecoderLimits { max_num_batched_tokens: options.max_tokens, max_model_len };
        let mut decoder = Decoder::load(machine.ops(sizes)?, spec, &random, limits_of_steps, |_| ())?;
        let layout = Layout::new(rows, capacity);
        let num_blocks = layout.num_blocks().max(Layout::new(1, longest).num_blocks());
        decoder.allocate_kv(spec.kv_shape(num_blocks, BLOCK_SIZE, DType::Bf16))?;
        decoder.warm_up()?;
        println!("{name}: ready in {:.1} s", start.elapsed().as_secs_f64());
        Ok(Self { machine, options, limits, spec: spec.clone(), name, layout, decoder })
    }

    fn measure(mut self, table: &mut Table) -> Result<(), Error> {
        for &(label, tokens) in &self.options.prompts {
            let name = format!("{} prefill {label}", self.name);
            if name.contains(&self.options.only) {
                let seconds = self.prefill(tokens)?;
                let floor = self.floor(Step::of(1, tokens, tokens));
                table.step(&name, tokens, seconds, floor, json!({}));
            }
        }
        let cases: Vec<_> = self
            .options
            .batches
            .iter()
            .map(|&rows| (rows, format!("{} decode {rows}", self.name)))
            .filter(|(_, name)| name.contains(&self.options.only))
            .collect();
        let Some(most) = cases.iter().map(|(rows, _)| *rows).max() else { return Ok(()) };
        self.fill_cache(most)?;
        let mut alone = Vec::new();
        for (rows, name) in &cases {
            let (device, synchronous) = self.decode(*rows)?;
            let floor = self.floor(Step::of(*rows, 1, self.options.context));
            let more = json!({ "synchronous_step_seconds": synchronous });
            table.step(name, *rows, device, floor, more);
            alone.push((*rows, device));
        }
        let figures = loop_cost::measure(loop_cost::Setup {
            decoder: self.decoder,
            vocab: self.spec.vocab_size,
            layout_blocks: self.layout.num_blocks(),
            context: self.options.context,
            steps: self.options.steps,
            max_tokens: self.options.max_tokens,
            batches: alone.iter().map(|a| a.0).collect(),
        })?;
        for ((rows, device), engine) in alone.into_iter().zip(figures) {
            let name = format!("{} engine {rows}", self.name);
            let more = json!({ "kernels_alone_seconds": device, "loss": engine / device - 1.0 });
            table.step(&name, rows, engine, device, more);
        }
        Ok(())
    }

    /// Seconds of one prompt in as few steps as hold it: the median.
    fn prefill(&mut self, tokens: usize) -> Result<f64, Error> {
        let (vocab, most) = (self.spec.vocab_size, self.options.max_tokens);
        let layout = Layout::new(1, tokens);
        let steps: Vec<Arc<BatchMeta>> = (0..tokens)
            .step_by(most)
            .map(|start| {
                let end = tokens.min(start + most);
                Step::of(1, end - start, end).meta(layout, vocab).into()
            })
            .collect();
        let mut times = Vec::new();
        // The first is not counted: what is allocated late is allocated in it.
        for counted in [false, true, true, true, true, true] {
            let start = Instant::now();
            for meta in &steps {
                self.decoder.step(meta.clone(), &greedy(1))?;
            }
            if counted {
                times.push(start.elapsed().as_secs_f64());
            }
        }
        Ok(median(&times))
    }

    /// Computes the context of the first `rows` sequences, so that the cache holds what a model wrote.
    fn fill_cache(&mut self, rows: usize) -> Result<(), Error> {
        let context = self.options.context;
        let at_once = (self.options.max_tokens / context).max(1);
        for first in (0..rows).step_by(at_once) {
            let step = Step { first, rows: at_once.min(rows - first), new: context, context };
            self.decoder.step(step.meta(self.layout, self.spec.vocab_size).into(), &greedy(step.rows))?;
        }
        Ok(())
    }

    /// Seconds of a decode step of `rows` sequences: on the device, with the next one queued behind it; and with a wait for each.
    fn decode(&mut self, rows: usize) -> Result<(f64, f64), Error> {
        let (steps, context) = (self.options.steps, self.options.context);
        let metas: Vec<Arc<BatchMeta>> = (1..=3 * steps)
            .map(|i| Step::of(rows, 1, context + i).meta(self.layout, self.spec.vocab_size).into())
            .collect();
        let tasks = greedy(rows);
        let [warm, queued, waited] = [0, 1, 2].map(|i| &metas[i * steps..(i + 1) * steps]);
        for meta in warm {
            self.decoder.step(meta.clone(), &tasks)?;
        }
        let (decoder, clock) = (&mut self.decoder, self.machine.clock());
        let device = clock.once(&mut || {
            let mut pending = VecDeque::new();
            for meta in queued {
                pending.push_back(decoder.launch(meta.clone(), tasks.clone())?);
                if pending.len() == IN_FLIGHT
                    && let Some(oldest) = pending.pop_front()
                {
                    decoder.wait(oldest)?;
                }
            }
            pending.into_iter().try_for_each(|last| decoder.wait(last).map(drop))
        })? / steps as f64;
        let mut times = Vec::new();
        for meta in waited {
            let start = Instant::now();
            self.decoder.step(meta.clone(), &tasks)?;
            times.push(start.elapsed().as_secs_f64());
        }
        Ok((device, median(&times)))
    }

    fn floor(&self, step: Step) -> f64 {
        let spec = &self.spec;
        let (tokens, rows) = ((step.rows * step.new) as f64, step.rows as f64);
        let matrices = |name: &dyn Fn(&str) -> bool| {
            let found = spec.tensors().into_iter().filter(|t| t.shape.len() == 2 && name(&t.name));
            found.map(|t| t.shape.iter().product::<usize>() as f64).sum::<f64>()
        };
        let layers = matrices(&|name| name.contains(".layers."));
        // A tied head is the embedding table, read as a matrix.
        let head = (spec.vocab_size * spec.hidden_size) as f64;
        let flops = 2.0 * (layers * tokens + head * rows);
        let products = self.limits.floor(BF16 * (layers + head), flops);
        let heads = spec.head_shape();
        let per_layer = (2 * heads.num_kv_heads * heads.head_dim) as f64;
        let layers = spec.layers.len();
        let kv = BF16 * layers as f64 * per_layer * rows * step.context as f64;
        let pairs: f64 = (step.context - step.new..step.context).map(|p| rows * (p + 1) as f64).sum();
        let attention = 4.0 * pairs * (layers * heads.num_heads * heads.head_dim) as f64;
        products + self.limits.floor(kv, attention)
    }
}

fn greedy(rows: usize) -> Arc<[RowTask]> {
    tasks(rows, &SampleSpec::greedy())
}

/// Measures what floors are computed with: the memory, and the best matrix product of 8192 cubed.
///
/// # Errors
/// What the device returned.
pub fn limits<M: Machine>(machine: &M, peak_flops: Option<f64>, table: &mut Table) -> Result<Limits, Error> {
    let budget = Duration::from_millis(300);
    let bandwidth = machine.bandwidth(budget)?.best();
    let flops = super::kernels::best_product(machine, budget)?.max(peak_flops.unwrap_or(0.0));
    let limits = Limits { bandwidth, flops };
    table.set_limits(limits);
    Ok(limits)
}
