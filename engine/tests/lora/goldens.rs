//! Adapters against transformers with their products merged into the weights (`scripts/make_lora_goldens.py`), many in one step.

use std::{collections::HashMap, sync::Arc};

use safetensors::SafeTensors;
use tidemill_engine::model::{
    Checkpoint, Decoder, DecoderLimits, ModelFiles, ModelSource, ModelSpec,
    lora::{self, Sites},
};
use tidemill_kernels::{
    DType,
    cpu::{Compute, CpuConfig, CpuOps, Isa},
    ops::BatchMeta,
};

use crate::{adapter, fixtures};

const NAMES: [&str; 3] = ["llama_all", "llama_qv", "llama_mlp"];
const TOLERANCE: f32 = 1e-4;
const BLOCK: usize = 16;
const BLOCKS_PER_ROW: usize = 6;

struct Model {
    decoder: Decoder<CpuOps>,
    vocab: usize,
}

/// One row of a step: the slot of its adapter + 1, where it starts, and its tokens.
type Row<'a> = (u32, usize, &'a [u32]);

impl Model {
    /// The model with an adapter in each slot.
    fn load(compute: Compute, isa: Isa) -> Self {
        let files = ModelFiles::open(&ModelSource::Dir(fixtures().join("llama"))).unwrap();
        let spec = ModelSpec::load(&files).unwrap();
        let checkpoint = Checkpoint::open(&files).unwrap();
        let kv_dtype = if compute == Compute::F32 { DType::F32 } else { DType::Bf16 };
        let limits = DecoderLimits { max_num_batched_tokens: 384, max_model_len: 96 };
        let ops = CpuOps::new(CpuConfig { compute, isa: Some(isa), threads: Some(2) }).unwrap();
        let mut decoder = Decoder::load(ops, &spec, &checkpoint, limits, |_| ()).unwrap();
        decoder.allocate_kv(spec.kv_shape(8 * BLOCKS_PER_ROW, BLOCK, kv_dtype)).unwrap();
        decoder.allocate_lora(NAMES.len(), 8).unwrap();
        let sites = Sites::of(&spec);
        // The first slot held another one before.
        for (slot, name) in [(0, NAMES[1])].into_iter().chain(NAMES.into_iter().enumerate()) {
            let folder = adapter(name);
            decoder.set_adapter(slot, &lora::load(&folder, &folder, &sites, 8).unwrap()).unwrap();
        }
        Self { decoder, vocab: spec.vocab_size }
    }

    /// Logits of all tokens of each row, each in the blocks of its place.
    fn run(&mut self, rows: &[(usize, Row<'_>)]) -> Vec<Vec<Vec<f32>>> {
        let mut meta =
            BatchMeta { cu_seqlens_q: vec![0], max_blocks: BLOCKS_PER_ROW, ..BatchMeta::default() };
        for &(place, (slot, start, tokens)) in rows {
            let first = (place * BLOCKS_PER_ROW) as u32;
            let end = start + tokens.len();
            meta.token_ids.extend(tokens);
            meta.positions.extend(start as u32..end as u32);
            meta.slot_mapping.extend((start..end).map(|p| first * BLOCK as u32 + p as u32));
            meta.cu_seqlens_q.push(meta.token_ids.len() as u32);
            meta.context_lens.push(end as u32);
            meta.block_tables.extend(first..first + BLOCKS_PER_ROW as u32);
            meta.adapters.push(slot);
        }
        if meta.adapters.iter().all(|&slot| slot == 0) {
            meta.adapters.clear();
        }
        meta.logits_indices = (0..meta.token_ids.len() as u32).collect();
        let logits = self.decoder.logits(Arc::new(meta)).unwrap();
        let mut logits = logits.chunks_exact(self.vocab).map(<[f32]>::to_vec);
        rows.iter().map(|(_, (_, _, tokens))| logits.by_ref().take(tokens.len()).collect()).collect()
    }
}

fn golden(name: &str) -> (HashMap<String, Vec<f32>>, HashMap<String, Vec<u32>>) {
    let folder = if name == "llama" { fixtures().join(name) } else { adapter(name) };
    let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
    let (mut floats, mut ids) = (HashMap::new(), HashMap::new());
    for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        let words = tensor.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
        if name.starts_with("logits") {
            floats.insert(name, words.map(f32::from_le_bytes).collect());
        } else {
            ids.insert(name, words.map(u32::from_le_bytes).collect());
        }
    }
    (floats, ids)
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a))).unwrap() as u32
}

/// Every adapter and none in the same steps, prompts and then single tokens: each row's logits and greedy tokens are its reference's.
#[test]
fn rows_of_every_adapter_and_of_none_equal_transformers_in_the_same_steps() {
    let all = ["llama", NAMES[0], NAMES[1], NAMES[2]];
    let goldens = all.map(golden);
    for isa in Isa::available() {
        for prompt in 0..3 {
            let mut model = Model::load(Compute::F32, isa);
            let ids = |(_, ids): &(_, HashMap<String, Vec<u32>>), what: &str| {
                ids[&format!("{what}.{prompt}")].clone()
            };
            let inputs: Vec<_> = goldens.iter().map(|golden| ids(golden, "input_ids")).collect();
            let rows: Vec<_> =
                inputs.iter().enumerate().map(|(i, ids)| (i, (i as u32, 0, &ids[..]))).collect();
            let mut logits = model.run(&rows);
            for (i, (floats, _)) in goldens.iter().enumerate() {
                let expected = &floats[&format!("logits.{prompt}")];
                let got = logits[i][logits[i].len() - expected.len() / model.vocab..].concat();
                let most = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(most <= TOLERANCE, "{}, prompt {prompt}, {isa:?}: logits differ by {most}", all[i]);
            }
            let greedy: Vec<_> = goldens.iter().map(|golden| ids(golden, "greedy_ids")).collect();
            for step in 0..12 {
                let next: Vec<_> = logits.iter().map(|rows| [argmax(rows.last().unwrap())]).collect();
                for (i, greedy) in greedy.iter().enumerate() {
                    assert_eq!(
                        next[i][0], greedy[step],
                        "{}, prompt {prompt}, {isa:?}: token {step}",
                        all[i]
                    );
                }
                let batch: Vec<(usize, Row<'_>)> = next
                    .iter()
                    .enumerate()
                    .map(|(i, token)| (i, (i as u32, inputs[i].len() + step, token.as_slice())))
                    .collect();
                logits = model.run(&batch);
            }
        }
    }
}

#[test]
fn a_row_has_the_bits_that_it_has_alone_and_a_base_row_those_of_a_step_without_adapters() {
    let (_, ids) = golden("llama");
    let (long, short) = (&ids["input_ids.1"][..], &ids["input_ids.0"][..]);
    for compute in [Compute::F32, Compute::Bf16] {
        let rows: [Row<'_>; 7] = [
            (0, 0, long),
            (1, 0, short),
            (2, 0, long),
            (0, 0, short),
            (3, 0, long),
            (1, 0, long),
            (2, 0, short),
        ];
        let mut model = Model::load(compute, Isa::detect());
        let placed: Vec<_> = rows.into_iter().enumerate().collect();
        let together = model.run(&placed);
        for (i, row) in placed {
            let alone = Model::load(compute, Isa::detect()).run(&[(0, row)]);
            assert!(alone[0] == together[i], "{compute:?}, row {i}: company changes its bits");
            let chunked: Vec<_> = row
                .2
                .chunks(5)
                .enumerate()
                .flat_map(|(c, piece)| model.run(&[(7, (row.0, 5 * c, piece))]).remove(0))
                .collect();
            assert!(chunked == together[i], "{compute:?}, row {i}: chunks change its bits");
        }
    }
}
