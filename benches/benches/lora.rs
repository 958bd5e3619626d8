//! What adapters cost: decode steps of 16 rows with 0, 1 and 8 different adapters of rank 16, on the CPU, beside the same steps without any.
//!
//! Prints the median of each and its ratio. The kinds take turns, so that whatever else the machine does meets all of them.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;
use tidemill_benches::speed::{
    Error,
    random::RandomTensors,
    steps::{BLOCK_SIZE, Layout, Step, tasks},
};
use tidemill_engine::model::{
    Decoder, DecoderLimits, ModelSpec,
    lora::{LoraWeights, Sites},
};
use tidemill_kernels::{
    DType,
    cpu::{CpuConfig, CpuOps},
    ops::{BatchMeta, LoraPart},
    sampling::SampleSpec,
};

const ROWS: usize = 16;
const CONTEXT: usize = 128;
const RANK: usize = 16;
const ADAPTERS: usize = 8;
const ROUNDS: usize = 31;

/// A model of half a billion parameters, less its vocabulary.
fn spec() -> Result<ModelSpec, Error> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 8, "vocab_size": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 2048, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    });
    Ok(ModelSpec::from_json(Path::new("config.json"), config.to_string().as_bytes())?)
}

/// An adapter of everything.
fn adapter(sites: &Sites, random: &RandomTensors) -> LoraWeights {
    let part = |n: usize, k: usize| {
        Some(LoraPart { a: random.matrix(RANK, k), b: random.matrix(n, RANK), scale: 1.0 })
    };
    let layers = sites.layers.iter().map(|sites| {
        std::array::from_fn(|at| {
            sites[at].as_ref().map(|site| site.parts.iter().map(|one| part(one.n, site.k)).collect())
        })
    });
    LoraWeights { layers: layers.collect() }
}

fn main() -> Result<(), Error> {
    let spec = spec()?;
    let random = RandomTensors::new(4096 * 1024, 0.02);
    let ops = CpuOps::new(CpuConfig::default())?;
    let limits = DecoderLimits { max_num_batched_tokens: ROWS, max_model_len: 2 * CONTEXT };
    let mut decoder = Decoder::load(ops, &spec, &random, limits, |_| ())?;
    let layout = Layout::new(ROWS, CONTEXT);
    decoder.allocate_kv(spec.kv_shape(layout.num_blocks(), BLOCK_SIZE, DType::Bf16))?;
    decoder.allocate_lora(ADAPTERS, RANK)?;
    let sites = Sites::of(&spec);
    for slot in 0..ADAPTERS {
        decoder.set_adapter(slot, &adapter(&sites, &random))?;
    }
    let plain = Step::of(ROWS, 1, CONTEXT).meta(layout, spec.vocab_size);
    // `None`: no row has one. `Some(n)`: each row has one of n.
    let kinds = [None, Some(1), Some(2), Some(ADAPTERS)];
    let metas = kinds.map(|kind| {
        let adapters = kind.map_or(Vec::new(), |n| (0..ROWS).map(|row| (row % n) as u32 + 1).collect());
        Arc::new(BatchMeta { adapters, ..plain.clone() })
    });
    let tasks = tasks(ROWS, &SampleSpec::greedy());
    let mut times = kinds.map(|_| Vec::<Duration>::new());
    for round in 0..ROUNDS + 2 {
        for (meta, times) in metas.iter().zip(&mut times) {
            let start = Instant::now();
            decoder.step(meta.clone(), &tasks)?;
            // The first ones touch memory.
            if round >= 2 {
                times.push(start.elapsed());
            }
        }
    }
    let medians = times.map(|mut times| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64()
    });
    for (kind, median) in kinds.iter().zip(medians) {
        let adapters = kind.unwrap_or(0);
        let ratio = medians[0] / median;
        println!(
            "{adapters} adapters in {ROWS} rows: {:.2} ms, {ratio:.3} of the throughput without",
            median * 1e3
        );
    }
    Ok(())
}
