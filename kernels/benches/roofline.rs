//! How near the CPU's ops come to what the machine can do: `cargo bench -p tidemill-kernels -- [probe|linear|quantized|attention|fork|step]`.
//!
//! Shapes are those of a 117 M-parameter decoder in bf16: 12 layers, H 768, I 3072, 12 query and 4 key/value heads of 64, V 8192.

#![allow(clippy::unwrap_used)]

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use tidemill_kernels::{
    DType, HostTensor, Ops,
    cpu::{Compute, CpuBatch, CpuBuffer, CpuConfig, CpuOps, CpuWeight, probe, resident, resident_with},
    ops::{Activation, BatchMeta, Epilogue, HeadShape, KvShape, Lookup, Norm, QkTransform, Rotary, Scoring},
    sampling::{RowTask, SampleSpec},
    tensor::{GgmlType, HostMatrix, QuantFormat, QuantMatrix},
};

const LAYERS: usize = 12;
const HIDDEN: usize = 768;
const INTER: usize = 3072;
const VOCAB: usize = 8192;
const HEADS: HeadShape = HeadShape { num_heads: 12, num_kv_heads: 4, head_dim: 64 };
const BLOCK: usize = 16;

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let want = |name: &str| wanted.is_empty() || wanted.iter().any(|w| w == name);
    let threads = std::env::var("THREADS").ok().and_then(|t| t.parse().ok());
    let ops = CpuOps::new(CpuConfig { compute: Compute::Bf16, isa: None, threads }).unwrap();
    println!("{} on {} threads", ops.isa(), ops.threads());
    let limits = Limits::measure(ops.threads());
    if want("fork") {
        fork(&ops);
    }
    if want("linear") {
        linear(&ops, &limits);
    }
    if want("quantized") {
        quantized(&ops);
    }
    if want("attention") {
        attention(&ops);
    }
    if want("step") {
        step(&ops, &limits);
    }
}

/// Seconds of `f`, repeated for about `budget` seconds: the first quartile, as neighbours only ever take time.
fn time(budget: f64, mut f: impl FnMut()) -> f64 {
    f();
    let (start, mut times) = (Instant::now(), vec![]);
    while times.len() < 5 || start.elapsed().as_secs_f64() < budget {
        let t = Instant::now();
        f();
        times.push(t.elapsed().as_secs_f64());
    }
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 4]
}

struct Limits {
    read: f64,
    flops: f64,
}

impl Limits {
    fn measure(threads: usize) -> Limits {
        let one = probe::read_bandwidth(1).unwrap();
        let read = probe::read_bandwidth(threads).unwrap();
        println!("read bandwidth      {:6.1} GB/s one thread, {:6.1} GB/s all", one / 1e9, read / 1e9);
        let mut flops = 0.0;
        #[cfg(target_arch = "x86_64")]
        {
            for (name, kind) in [("f32 fma zmm", 0), ("vdpbf16ps zmm", 1), ("vdpbf16ps + load", 2)] {
                let best = |threads| (0..5).map(|_| peak::rate(kind, threads)).fold(0.0, f64::max);
                let (one, all) = (best(1), best(threads));
                println!("{name:<19} {:6.0} GFLOP/s one thread, {:6.0} GFLOP/s all", one / 1e9, all / 1e9);
                flops = f64::max(flops, all);
            }
        }
        Limits { read, flops }
    }
}

#[cfg(target_arch = "x86_64")]
mod peak {
    use std::{arch::x86_64::*, hint::black_box, time::Instant};

    /// Multiply-adds per second times two, on all of `threads` together.
    pub fn rate(kind: u32, threads: usize) -> f64 {
        if !is_x86_feature_detected!("avx512bf16") {
            return 0.0;
        }
        let n = 4_000_000_u64;
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                // SAFETY: the instructions were detected above.
                scope.spawn(move || unsafe { black_box(run(kind, n)) });
            }
        });
        let per_step = 24.0 * if kind == 0 { 32.0 } else { 64.0 };
        n as f64 * per_step * threads as f64 / start.elapsed().as_secs_f64()
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn run(kind: u32, n: u64) -> f32 {
        let data = black_box([1_u16; 32 * 24]);
        let mut acc = [_mm512_setzero_ps(); 24];
        let one = _mm512_set1_epi16(black_box(0));
        // SAFETY: both types are 512 plain bits.
        let b = unsafe { std::mem::transmute::<__m512i, __m512bh>(one) };
        let f = _mm512_set1_ps(black_box(0.0));
        for _ in 0..n {
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = match kind {
                    0 => _mm512_fmadd_ps(f, f, *acc),
                    1 => _mm512_dpbf16_ps(*acc, b, b),
                    _ => {
                        // SAFETY: vector i of the array.
                        let x =
                            unsafe { std::ptr::read_unaligned(data.as_ptr().add(32 * i).cast::<__m512bh>()) };
                        _mm512_dpbf16_ps(*acc, b, x)
                    }
                };
            }
        }
        acc.into_iter().map(|a| _mm512_reduce_add_ps(a)).sum()
    }
}

/// Random bf16 of one weight, in memory of its own: in huge pages, or with `SMALL_PAGES` as a mapped checkpoint has them.
fn random(elems: usize, seed: &mut u64) -> Bytes {
    let mut data = Vec::with_capacity(elems * 2);
    for _ in 0..elems {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let v = ((*seed >> 40) as f32 / (1 << 23) as f32 - 1.0) * 0.06;
        data.extend(half::bf16::from_f32(v).to_le_bytes());
    }
    if std::env::var_os("SMALL_PAGES").is_some() { Bytes::from(data) } else { resident(&data).unwrap() }
}

fn weight(ops: &CpuOps, rows: &[usize], k: usize, seed: &mut u64) -> CpuWeight {
    let parts: Vec<HostMatrix> = rows
        .iter()
        .map(|&n| {
            let (name, dtype, shape) = (String::new(), DType::Bf16, vec![n, k]);
            HostTensor { name, dtype, shape, data: random(n * k, seed) }.into()
        })
        .collect();
    ops.weight(&parts, &[]).unwrap()
}

/// The projections of all layers, and the output head: 226 MB.
struct Layer {
    qkv: CpuWeight,
    o: CpuWeight,
    gate_up: CpuWeight,
    down: CpuWeight,
}

fn layers(ops: &CpuOps) -> (Vec<Layer>, CpuWeight) {
    let mut seed = 1;
    let layers = (0..LAYERS)
        .map(|_| Layer {
            qkv: weight(ops, &[768, 256, 256], HIDDEN, &mut seed),
            o: weight(ops, &[HIDDEN], HIDDEN, &mut seed),
            gate_up: weight(ops, &[INTER, INTER], HIDDEN, &mut seed),
            down: weight(ops, &[HIDDEN], INTER, &mut seed),
        })
        .collect();
    (layers, weight(ops, &[VOCAB], HIDDEN, &mut seed))
}

fn filled(ops: &CpuOps, elems: usize) -> CpuBuffer {
    let mut b = ops.buffer(elems).unwrap();
    for (i, v) in b.as_mut_slice().iter_mut().enumerate() {
        *v = ((i * 7919) % 1000) as f32 / 500.0 - 1.0;
    }
    b
}

fn linear(ops: &CpuOps, limits: &Limits) {
    let (layers, head) = layers(ops);
    println!("linear, weights of all layers in turn      M    GB/s  % read  GFLOP/s  % peak");
    for m in [1, 2, 4, 8, 16, 32, 64, 512] {
        let x = filled(ops, m * INTER);
        let mut out = filled(ops, m * VOCAB);
        type Pick = fn(&Layer) -> &CpuWeight;
        let shapes: [(&str, Pick); 4] =
            [("qkv", |l| &l.qkv), ("o", |l| &l.o), ("gate_up", |l| &l.gate_up), ("down", |l| &l.down)];
        let mut report = |name: &str, weights: &[&CpuWeight]| {
            let elems: usize = weights.iter().map(|w| w.rows() * w.width()).sum();
            let t = ops.enter(|| {
                time(0.25, || {
                    for w in weights {
                        ops.linear(&mut out, &x, w, m, Epilogue::Store).unwrap();
                    }
                })
            });
            let (bytes, flops) = (elems as f64 * 2.0 / t, elems as f64 * 2.0 * m as f64 / t);
            println!(
                "  {name:<8} {:>5} x {:<5} {:>18} {:7.1} {:6.0}% {:8.0} {:6.0}%",
                weights[0].rows(),
                weights[0].width(),
                m,
                bytes / 1e9,
                100.0 * bytes / limits.read,
                flops / 1e9,
                100.0 * flops / limits.flops
            );
        };
        for (name, pick) in shapes {
            if [1, 8, 32, 512].contains(&m) {
                report(name, &layers.iter().map(pick).collect::<Vec<_>>());
            }
        }
        let mut all: Vec<&CpuWeight> =
            layers.iter().flat_map(|l| [&l.qkv, &l.o, &l.gate_up, &l.down]).collect();
        all.push(&head);
        report("all", &all);
    }
}

/// A matrix of zeros whose scales are zeros too, of the same cost as any other.
fn zeros(format: QuantFormat, n: usize, k: usize) -> HostMatrix {
    let (row_bytes, scales) = match format {
        QuantFormat::Fp8 { rows, columns } => (k, n.div_ceil(rows) * k.div_ceil(columns)),
        QuantFormat::Int4 { group } => (k / 2, n * k.div_ceil(group)),
        QuantFormat::Int8 { group } => (k, n * k.div_ceil(group)),
        QuantFormat::Mxfp4 => (k / 32 * 17, 0),
        QuantFormat::Ggml(ty) => (k / ty.block() * ty.block_bytes(), 0),
    };
    let memory = |bytes| resident_with(bytes, |all| all.fill(0)).unwrap();
    let (data, scales) = (memory(n * row_bytes), memory(4 * scales));
    QuantMatrix { name: String::new(), shape: [n, k], format, data, scales, offsets: Bytes::new() }.into()
}

fn quantized(ops: &CpuOps) {
    let (n, k) = (1 << 16, 2048);
    let formats = [
        QuantFormat::Fp8 { rows: 1, columns: k },
        QuantFormat::Fp8 { rows: 128, columns: 128 },
        QuantFormat::Int8 { group: k },
        QuantFormat::Int4 { group: 128 },
        QuantFormat::Mxfp4,
        QuantFormat::Ggml(GgmlType::Q8_0),
        QuantFormat::Ggml(GgmlType::Q4_0),
        QuantFormat::Ggml(GgmlType::Q4_K),
        QuantFormat::Ggml(GgmlType::Q5_K),
        QuantFormat::Ggml(GgmlType::Q6_K),
    ];
    let mut weights = vec![("bf16".to_owned(), 2.0, weight(ops, &[n], k, &mut 1))];
    for format in formats {
        let matrix = zeros(format, n, k);
        let bytes = if let HostMatrix::Quantized(m) = &matrix { m.data.len() + m.scales.len() } else { 0 };
        let weight = ops.weight(&[matrix], &[]).unwrap();
        weights.push((format!("{format:?}"), bytes as f64 / (n * k) as f64, weight));
    }
    println!("one product with {n} x {k}        M   Gweights/s    GB/s  times bf16");
    for m in [1, 4, 16, 256] {
        let (x, mut out) = (filled(ops, m * k), filled(ops, m * n));
        let mut dense = 0.0;
        for (name, bytes, w) in &weights {
            let t = ops.enter(|| time(0.4, || ops.linear(&mut out, &x, w, m, Epilogue::Store).unwrap()));
            let rate = (n * k) as f64 / t / 1e9;
            dense = if name == "bf16" { rate } else { dense };
            println!("  {name:<34} {m:>4} {rate:10.1} {:9.1} {:9.2}", rate * bytes, rate / dense);
        }
    }
}

/// `rows` sequences that each add `new` tokens to a context of `before`.
fn batch(rows: usize, before: usize, new: usize) -> BatchMeta {
    let max_blocks = (before + new).div_ceil(BLOCK);
    let mut meta = BatchMeta { cu_seqlens_q: vec![0], max_blocks, ..BatchMeta::default() };
    for r in 0..rows {
        for p in before..before + new {
            meta.token_ids.push((p * 31 % VOCAB) as u32);
            meta.positions.push(p as u32);
            meta.slot_mapping.push((r * max_blocks * BLOCK + p) as u32);
        }
        meta.cu_seqlens_q.push(meta.positions.len() as u32);
        meta.context_lens.push((before + new) as u32);
        meta.block_tables.extend((r * max_blocks..(r + 1) * max_blocks).map(|b| b as u32));
        meta.logits_indices.push(meta.positions.len() as u32 - 1);
    }
    meta
}

fn cache(num_blocks: usize, dtype: DType) -> KvShape {
    let (num_kv_heads, head_dim) = (HEADS.num_kv_heads, HEADS.head_dim);
    let value_dim = head_dim;
    KvShape { num_layers: LAYERS, num_blocks, block_size: BLOCK, num_kv_heads, head_dim, value_dim, dtype }
}

fn causal() -> Scoring<'static, Vec<f32>> {
    Scoring { scale: 0.125, window: None, soft_cap: None, slopes: None, sinks: None, causal: true }
}

fn transform(table: &Vec<f32>) -> QkTransform<'_, Vec<f32>> {
    QkTransform { norm: None, rotary: Some(Rotary { table, dim: HEADS.head_dim, interleaved: false }) }
}

fn attention(ops: &CpuOps) {
    println!("attention, one layer            context  tokens    us   GFLOP/s   GB/s");
    for dtype in [DType::F32, DType::Bf16] {
        for (rows, before, new) in [(1, 511, 1), (8, 511, 1), (1, 4095, 1), (1, 0, 512), (1, 1536, 512)] {
            let meta = batch(rows, before, new);
            let shape = cache(rows * meta.max_blocks, dtype);
            let mut kv = ops.kv_cache(shape).unwrap();
            for storage in kv.storage_mut() {
                storage.fill(0);
            }
            let batch = ops.upload(Arc::new(meta), tasks(rows)).unwrap();
            let tokens = batch.meta().num_tokens();
            let qkv = filled(ops, tokens * HEADS.qkv_width());
            let mut out = filled(ops, tokens * HIDDEN);
            let mut layer = 0;
            let t = ops.enter(|| {
                time(0.25, || {
                    ops.paged_attention(&mut out, &qkv, &kv, &batch, HEADS, causal(), layer).unwrap();
                    layer = (layer + 1) % LAYERS;
                })
            });
            let pairs: usize = batch.meta().positions.iter().map(|&p| p as usize + 1).sum();
            println!(
                "  {dtype:?} {rows} row(s) {:>22} {tokens:>6} {:8.1} {:7.0} {:7.1}",
                before + new,
                t * 1e6,
                (pairs * HIDDEN * 4) as f64 / t / 1e9,
                (rows * (before + new) * HEADS.num_kv_heads * HEADS.head_dim * 2 * dtype.size()) as f64
                    / t
                    / 1e9
            );
        }
    }
}

fn fork(ops: &CpuOps) {
    let (a, b) = (filled(ops, 64), filled(ops, 64));
    drop((a, b));
    let mut seed = 3;
    // Four rows of weights per task: nothing but the cost of sharing the work.
    let w = weight(ops, &[256], 256, &mut seed);
    let x = filled(ops, 256);
    let mut out = filled(ops, 256);
    let region = |out: &mut CpuBuffer| ops.linear(out, &x, &w, 1, Epilogue::Store).unwrap();
    let inside = ops.enter(|| time(0.2, || region(&mut out)));
    let outside = time(0.2, || region(&mut out));
    let enter = time(0.2, || ops.enter(|| ()));
    println!(
        "fork and join       256 x 256 linear {:.2} us inside enter, {:.2} us outside; enter {:.2} us",
        inside * 1e6,
        outside * 1e6,
        enter * 1e6
    );
}

/// Buffers of a step of up to `tokens`.
struct Model {
    layers: Vec<Layer>,
    head: CpuWeight,
    norm: Vec<f32>,
    rope: Vec<f32>,
}

struct Clock {
    last: Instant,
    spent: Vec<(&'static str, f64)>,
}

impl Clock {
    fn lap(&mut self, name: &'static str) {
        let t = self.last.elapsed().as_secs_f64();
        match self.spent.iter_mut().find(|s| s.0 == name) {
            Some(s) => s.1 += t,
            None => self.spent.push((name, t)),
        }
        self.last = Instant::now();
    }
}

/// Every op of a decoder step, in its order, on random weights.
fn step(ops: &CpuOps, limits: &Limits) {
    let (layers, head) = layers(ops);
    let model = Model { layers, head, norm: vec![1.0; HIDDEN], rope: vec![0.5; 4096 * HEADS.head_dim] };
    let bytes = 2 * (LAYERS * (1280 * HIDDEN + HIDDEN * HIDDEN + 3 * INTER * HIDDEN) + VOCAB * HIDDEN);
    let bound = limits.read / bytes as f64;
    println!("synthetic step, {:.0} MB of weights; bound {bound:.0} steps/s", bytes as f64 / 1e6);
    for (name, rows, before, new) in [
        ("decode 1", 1, 127, 1),
        ("decode 1 @1024", 1, 1023, 1),
        ("decode 8", 8, 127, 1),
        ("decode 32", 32, 127, 1),
        ("prefill 512", 1, 0, 512),
    ] {
        let meta = batch(rows, before, new);
        let tokens = meta.num_tokens();
        let mut kv = ops.kv_cache(cache(rows * meta.max_blocks, DType::Bf16)).unwrap();
        let batch = ops.upload(Arc::new(meta), tasks(rows)).unwrap();
        let b = |width: usize| filled(ops, tokens * width);
        let mut x = [
            b(HIDDEN),
            b(HIDDEN),
            b(HEADS.qkv_width()),
            b(HIDDEN),
            b(2 * INTER),
            b(INTER),
            b(HIDDEN),
            b(VOCAB),
        ];
        let mut clock = Clock { last: Instant::now(), spent: vec![] };
        let mut steps = 0.0;
        let t = time(1.0, || {
            clock.last = Instant::now();
            ops.enter(|| forward(ops, &model, &mut x, &mut kv, &batch, &mut clock));
            steps += 1.0;
        });
        println!(
            "  {name:<15} {:8.2} ms {:9.1} tok/s  {:4.2} of one stream's bound, {:5.0} GFLOP/s ({:.0} %)",
            t * 1e3,
            tokens as f64 / t,
            tokens as f64 / t / bound,
            (bytes * tokens) as f64 / t / 1e9,
            (bytes * tokens) as f64 / t / limits.flops * 100.0
        );
        let parts: Vec<String> =
            clock.spent.iter().map(|(n, s)| format!("{n} {:.0}", s / steps * 1e6)).collect();
        println!("    us: {}", parts.join(", "));
    }
}

fn forward(
    ops: &CpuOps,
    m: &Model,
    x: &mut [CpuBuffer; 8],
    kv: &mut <CpuOps as Ops>::KvCache,
    batch: &CpuBatch,
    clock: &mut Clock,
) {
    let [h, normed, qkv, attn, gate_up, act, last, logits] = x;
    let t = batch.meta().num_tokens();
    let check = |r: tidemill_kernels::ops::Result<()>| r.unwrap();
    let norm = Norm::Rms { weight: &m.norm, eps: 1e-5 };
    check(ops.embedding(h, &m.head, batch, Lookup::Tokens { scale: 1.0 }));
    clock.lap("embedding");
    for (i, layer) in m.layers.iter().enumerate() {
        check(ops.norm(normed, h, norm, t));
        clock.lap("rmsnorm");
        check(ops.linear(qkv, normed, &layer.qkv, t, Epilogue::Store));
        clock.lap("qkv");
        check(ops.rope_kv_write(qkv, kv, transform(&m.rope), batch, HEADS, i));
        clock.lap("rope");
        check(ops.paged_attention(attn, qkv, kv, batch, HEADS, causal(), i));
        clock.lap("attention");
        check(ops.linear(h, attn, &layer.o, t, Epilogue::Add));
        clock.lap("o");
        check(ops.norm(normed, h, norm, t));
        clock.lap("rmsnorm");
        check(ops.linear_gated(act, gate_up, normed, &layer.gate_up, t, Activation::Silu));
        clock.lap("gate_up");
        check(ops.linear(h, act, &layer.down, t, Epilogue::Add));
        clock.lap("down");
    }
    let rows = batch.meta().logits_indices.len();
    check(ops.gather_rows(last, h, batch, 0..rows, HIDDEN));
    check(ops.norm(normed, last, norm, rows));
    check(ops.linear(logits, normed, &m.head, rows, Epilogue::Store));
    clock.lap("head");
    check(ops.sample(logits, VOCAB, batch, 0..rows));
    clock.lap("sample");
}

/// One sampled token per row.
fn tasks(rows: usize) -> Arc<[RowTask]> {
    let spec = SampleSpec {
        temperature: 0.8,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 1,
        position: 1,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        token_counts: vec![],
        logit_bias: vec![],
        forbidden: vec![],
        allowed: None,
    };
    (0..rows).map(|_| RowTask::Sample(spec.clone(), None)).collect()
}
