//! `CudaOps` as the decoder uses it: what comes from a step's metadata, and what must run from graphs.

use std::sync::Arc;

use half::bf16;
use tidemill_kernels::{
    DType, KernelError, Ops,
    cuda::{CudaAttention, CudaConfig, CudaKvCache, CudaOps, CudaWeight, Device, memory::DeviceBuffer},
    ops::{
        Activation, BatchMeta, BlockCopy, Epilogue, ExpertGroups, ExpertScoring, HeadShape, KvShape,
        LatentShape, Lookup, Norm, Rotary, Routing, Scoring,
    },
    tensor::ExpertParts,
};
use tidemill_kernels_emu::Schedule;

use crate::{
    common::{Rng, assert_same, tensor},
    harness::{driver, rounded, schedules},
};

const H: usize = 40;
const I: usize = 24;
const VOCAB: usize = 16;
const BLOCK_SIZE: usize = 16;
const LATENT: LatentShape = LatentShape { num_heads: 3, latent_dim: 32, rope_dim: 8 };
const HEADS: HeadShape = HeadShape { num_heads: 2, num_kv_heads: 1, head_dim: 16 };

fn open(schedule: Schedule, attention: CudaAttention, graphs: bool) -> CudaOps {
    let config = CudaConfig {
        max_tokens: 8,
        max_rows: 4,
        max_model_len: 64,
        block_size: BLOCK_SIZE,
        attention,
        vocab: VOCAB,
        graphs,
    };
    CudaOps::new(Device::new(driver(schedule)), config).unwrap()
}

fn matrix(ops: &CudaOps, seed: u64, n: usize, k: usize) -> CudaWeight {
    let values = Rng::new(seed).units(n * k);
    ops.weight(&[tensor(DType::Bf16, &[n, k], &values, 0).into()], &[]).unwrap()
}

/// A decode step: row `r` has token `ids[r]`, at position `positions[r]` of block `r`.
fn decode(ids: &[u32], positions: &[u32]) -> Arc<BatchMeta> {
    let rows = ids.len() as u32;
    Arc::new(BatchMeta {
        token_ids: ids.to_vec(),
        positions: positions.to_vec(),
        slot_mapping: (0..rows).zip(positions).map(|(r, p)| r * BLOCK_SIZE as u32 + p).collect(),
        cu_seqlens_q: (0..=rows).collect(),
        context_lens: positions.iter().map(|p| p + 1).collect(),
        block_tables: (0..rows).collect(),
        max_blocks: 1,
        logits_indices: (0..rows).collect(),
        ..BatchMeta::default()
    })
}

#[test]
fn positions_and_segments_come_from_the_step_and_no_segments_are_zeros() {
    let values = |seed: u64| rounded(&Rng::new(seed).units(VOCAB * H));
    for schedule in schedules() {
        let ops = open(schedule, CudaAttention::causal(HEADS), false);
        let [tokens, positions, segments] = [1, 2, 3].map(|seed| matrix(&ops, seed, VOCAB, H));
        for named in [vec![], vec![2, 0, 5]] {
            let meta =
                BatchMeta { segments: named.clone(), ..BatchMeta::clone(&decode(&[3, 9, 3], &[7, 0, 11])) };
            let batch = ops.upload(Arc::new(meta), Arc::new([])).unwrap();
            let mut out = ops.buffer(3 * H).unwrap();
            ops.embedding(&mut out, &tokens, &batch, Lookup::Tokens { scale: 1.0 }).unwrap();
            ops.embedding(&mut out, &positions, &batch, Lookup::Positions { offset: 2 }).unwrap();
            ops.embedding(&mut out, &segments, &batch, Lookup::Segments).unwrap();
            let mut want = Vec::new();
            for (r, (id, position)) in [(3, 7), (9, 0), (3, 11)].into_iter().enumerate() {
                let segment = named.get(r).map_or(0, |&segment| segment as usize);
                for h in 0..H {
                    let sum = bf16::from_f32(values(1)[id * H + h] + values(2)[(position + 2) * H + h]);
                    want.push(sum.to_f32() + values(3)[segment * H + h]);
                }
            }
            assert_same(&ops.download(&out, 3 * H).unwrap(), &rounded(&want), "sum");
        }
    }
}

/// The weights of a layer of experts.
struct Layer {
    table: CudaWeight,
    router: CudaWeight,
    bias: DeviceBuffer,
    gate_up: <CudaOps as Ops>::Experts,
    down: <CudaOps as Ops>::Experts,
}

const ROUTING: Routing = Routing {
    experts: 6,
    top_k: 2,
    scoring: ExpertScoring::Sigmoid,
    groups: Some(ExpertGroups { count: 3, top: 2, by_top_two: true }),
    renormalize: true,
    scale: 1.5,
};

fn expert(seed: u64, parts: &[[usize; 2]], bias: bool) -> ExpertParts {
    let mut rng = Rng::new(seed);
    let mut random = |shape: &[usize]| {
        let values = rng.units(shape.iter().product());
        tensor(DType::Bf16, shape, &values, 0)
    };
    let matrices = parts.iter().map(|shape| random(shape).into()).collect();
    let bias = if bias { parts.iter().map(|[n, _]| random(&[*n])).collect() } else { Vec::new() };
    ExpertParts { parts: matrices, bias }
}

impl Layer {
    fn new(ops: &CudaOps) -> Layer {
        let experts = |seed: u64, parts: &[[usize; 2]]| {
            let experts: Vec<_> =
                (0..ROUTING.experts as u64).map(|x| expert(seed + x, parts, true)).collect();
            ops.experts(&experts).unwrap()
        };
        Layer {
            table: matrix(ops, 1, VOCAB, H),
            router: matrix(ops, 2, ROUTING.experts, H),
            bias: ops.vector(&Rng::new(3).units(ROUTING.experts)).unwrap(),
            gate_up: experts(10, &[[I, H], [I, H]]),
            down: experts(30, &[[H, I]]),
        }
    }
}

/// Steps of the layer over these tokens, one after the other; what each leaves, and how often the ops were called.
fn run_experts(ops: &CudaOps, steps: &[&[u32]]) -> (Vec<Vec<f32>>, usize) {
    const T: usize = 4;
    let layer = Layer::new(ops);
    let (mut x, mut scratch) = (ops.buffer(T * H).unwrap(), ops.buffer(T * ROUTING.top_k * H).unwrap());
    let mut inner = ops.buffer(T * ROUTING.top_k * I).unwrap();
    let mut fused = ops.scratch_buffer(T * ROUTING.top_k * 2 * I).unwrap();
    let mut logits = ops.logits_buffer(T * ROUTING.experts).unwrap();
    let mut routes = ops.routes(T, &ROUTING).unwrap();
    let activation = Activation::SwigluOai { alpha: 1.702, limit: 1.0 };
    let mut calls = 0;
    let mut results = Vec::new();
    for ids in steps {
        let batch = ops.upload(decode(ids, &vec![0; ids.len()]), Arc::new([])).unwrap();
        let rows = ops.extent(&batch).tokens;
        ops.run(&batch, || {
            calls += 1;
            ops.embedding(&mut x, &layer.table, &batch, Lookup::Tokens { scale: 1.0 })?;
            ops.linear(&mut logits, &x, &layer.router, rows, Epilogue::Store)?;
            ops.moe_route(&mut routes, &logits, Some(&layer.bias), &ROUTING, rows)?;
            ops.moe_gated(&mut inner, &mut fused, &x, &layer.gate_up, &routes, rows, activation)?;
            ops.moe_combine(&mut x, &mut scratch, &inner, &layer.down, &routes, rows)
        })
        .unwrap();
        results.push(ops.download(&x, ids.len() * H).unwrap());
    }
    (results, calls)
}

#[test]
fn a_step_with_experts_runs_from_a_graph_whoever_is_chosen_and_tokens_stand_alone() {
    let attention = CudaAttention::causal(HEADS);
    // Two sizes of graphs: 4 for the steps of three and four, 1.
    let steps: [&[u32]; 5] = [&[1, 2, 3], &[9, 9, 4, 15], &[7], &[3, 8, 12], &[5]];
    for schedule in schedules() {
        let (eager, calls) = run_experts(&open(schedule, attention, false), &steps);
        assert_eq!(calls, steps.len());
        let (replayed, calls) = run_experts(&open(schedule, attention, true), &steps);
        assert_eq!(calls, 2, "a recorded step is replayed");
        for (step, ids) in steps.iter().enumerate() {
            assert!(eager[step].iter().all(|x| x.is_finite()));
            assert_same(&replayed[step], &eager[step], &format!("step {step}"));
            for (r, id) in ids.iter().enumerate() {
                let (alone, _) = run_experts(&open(schedule, attention, false), &[&[*id]]);
                assert_same(&eager[step][r * H..][..H], &alone[0], &format!("token {id} of step {step}"));
            }
        }
    }
}

#[test]
fn experts_that_differ_are_refused() {
    let ops = open(Schedule::default(), CudaAttention::causal(HEADS), false);
    let refused = |experts: &[ExpertParts]| {
        let error = ops.experts(experts).err().unwrap();
        assert!(matches!(error, KernelError::Shape { op: "experts", .. }), "{error}");
    };
    let one = expert(1, &[[I, H]], true);
    assert!(ops.experts(&[one.clone(), expert(2, &[[I, H]], true)]).is_ok());
    refused(&[one.clone(), expert(2, &[[I, H], [I, H]], true)]);
    refused(&[one.clone(), expert(2, &[[I, 48]], true)]);
    refused(&[one.clone(), expert(2, &[[I, H]], false)]);
    refused(&[ExpertParts { bias: [one.bias.clone(), one.bias.clone()].concat(), ..one.clone() }]);

    let too_many = Routing { experts: 513, groups: None, ..ROUTING };
    let error = ops.routes(1, &too_many).err().unwrap();
    assert!(error.to_string().contains("--device cpu"), "{error}");
}

const KV: KvShape = KvShape {
    num_layers: 2,
    num_blocks: 5,
    block_size: BLOCK_SIZE,
    num_kv_heads: 1,
    head_dim: LATENT.latent_dim + LATENT.rope_dim,
    value_dim: 0,
    dtype: DType::Bf16,
};

/// Decode steps of latent attention, whose input follows from the tokens: what each leaves.
fn run_latents(ops: &CudaOps, kv: &mut CudaKvCache, steps: &[(&[u32], &[u32])]) -> (Vec<Vec<f32>>, usize) {
    const T: usize = 4;
    let LatentShape { num_heads: q, latent_dim: l, rope_dim: r } = LATENT;
    let tables = [(1, q * l), (2, q * r), (3, l + r)].map(|(seed, width)| matrix(ops, seed, VOCAB, width));
    let [mut q_latent, mut q_rope, mut latent] =
        [q * l, q * r, l + r].map(|width| ops.buffer(T * width).unwrap());
    let mut out = ops.buffer(T * q * l).unwrap();
    let weight = ops.vector(&Rng::new(8).units(l)).unwrap();
    let table = ops.vector(&Rng::new(9).units(64 * r)).unwrap();
    let (mut calls, mut results) = (0, Vec::new());
    for (ids, positions) in steps {
        let batch = ops.upload(decode(ids, positions), Arc::new([])).unwrap();
        let scale = Lookup::Tokens { scale: 1.0 };
        ops.run(&batch, || {
            calls += 1;
            ops.embedding(&mut q_latent, &tables[0], &batch, scale)?;
            ops.embedding(&mut q_rope, &tables[1], &batch, scale)?;
            ops.embedding(&mut latent, &tables[2], &batch, scale)?;
            let norm = Norm::Rms { weight: &weight, eps: 1e-6 };
            let rotary = Rotary { table: &table, dim: r, interleaved: true };
            ops.latent_kv_write(&mut q_rope, &mut latent, kv, norm, rotary, &batch, LATENT, 1)?;
            ops.latent_attention(&mut out, &q_latent, &q_rope, kv, &batch, LATENT, 0.25, 1)
        })
        .unwrap();
        results.push(ops.download(&out, ids.len() * q * l).unwrap());
    }
    (results, calls)
}

#[test]
fn latent_attention_runs_from_graphs_and_its_blocks_go_to_the_host_and_back() {
    let steps: [(&[u32], &[u32]); 4] =
        [(&[1, 2], &[0, 0]), (&[7, 3], &[1, 1]), (&[4, 4], &[2, 2]), (&[9], &[3])];
    for schedule in schedules() {
        let attention = CudaAttention::Latent(LATENT);
        let ops = open(schedule, attention, false);
        let mut kv = ops.kv_cache(KV).unwrap();
        let (eager, _) = run_latents(&ops, &mut kv, &steps);
        assert!(eager.iter().flatten().all(|x| x.is_finite()));
        // The first token is all it sees.
        assert_ne!(eager[0], eager[1]);

        let bytes = |ops: &CudaOps, kv: &CudaKvCache, block: usize| {
            let (layer, block_elems) = (KV.num_blocks * BLOCK_SIZE * KV.head_dim, BLOCK_SIZE * KV.head_dim);
            let all = ops.download(kv.storage(), KV.num_layers * layer).unwrap();
            [0, 1].map(|l| all[l * layer + block * block_elems..][..block_elems].to_vec()).concat()
        };
        let before = bytes(&ops, &kv, 0);
        let mut host = ops.host_kv(KvShape { num_blocks: 2, ..KV }).unwrap();
        let copies = [BlockCopy::Save { block: 0, host: 1 }, BlockCopy::Load { host: 1, block: 4 }];
        ops.copy_blocks(&mut kv, &mut host, &copies).unwrap();
        let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same(&bytes(&ops, &kv, 4), &before) && same(&bytes(&ops, &kv, 0), &before));

        let graphed = open(schedule, attention, true);
        let mut kv = graphed.kv_cache(KV).unwrap();
        let (replayed, calls) = run_latents(&graphed, &mut kv, &steps);
        assert_eq!(calls, 2, "a recorded step is replayed");
        for (got, want) in replayed.iter().zip(&eager) {
            assert_same(got, want, "from a graph");
        }
    }
}

#[test]
fn attention_that_the_device_was_not_opened_for_is_refused() {
    let refused = |result: Result<(), KernelError>| {
        assert!(matches!(result, Err(KernelError::Unsupported { .. })), "{result:?}");
    };
    let ops = open(Schedule::default(), CudaAttention::causal(HEADS), false);
    let batch = ops.upload(decode(&[1], &[0]), Arc::new([])).unwrap();
    let shape = KvShape { head_dim: HEADS.head_dim, value_dim: HEADS.head_dim, ..KV };
    let kv = ops.kv_cache(shape).unwrap();
    let [mut out, qkv] = [0, 0].map(|_| ops.buffer(1024).unwrap());
    let scoring =
        |causal| Scoring { scale: 1.0, window: None, soft_cap: None, slopes: None, sinks: None, causal };
    ops.paged_attention(&mut out, &qkv, &kv, &batch, HEADS, scoring(true), 0).unwrap();
    refused(ops.paged_attention(&mut out, &qkv, &kv, &batch, HEADS, scoring(false), 0));
    let latents = ops.kv_cache(KV).unwrap();
    refused(ops.latent_attention(&mut out, &qkv, &qkv, &latents, &batch, LATENT, 1.0, 0));

    let odd = CudaAttention::causal(HeadShape { head_dim: 72, ..HEADS });
    let config = CudaConfig {
        max_tokens: 1,
        max_rows: 1,
        max_model_len: 16,
        block_size: BLOCK_SIZE,
        attention: odd,
        vocab: VOCAB,
        graphs: false,
    };
    let error = CudaOps::new(Device::new(driver(Schedule::default())), config).err().unwrap();
    assert!(error.to_string().contains("--device cpu"), "{error}");
    for value_dim in [8, 0] {
        let shape = KvShape { num_kv_heads: 2, value_dim, ..KV };
        assert!(matches!(ops.kv_cache(shape).err(), Some(KernelError::Unsupported { .. })), "{value_dim}");
    }
}
