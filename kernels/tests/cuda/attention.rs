//! `attention.cu` against f64, and against itself: whatever path, split or company a token has, its bits are the same.

use std::sync::Arc;

use tidemill_kernels::{
    KernelError,
    cuda::{
        memory::DeviceBuffer,
        ops::{
            Attention, AttentionKernels, AttentionWorkspace, KvLayer, PlanKind, PlanLimits, PlanShape,
            attention, attention_plan,
        },
        words::DeviceWords,
    },
    ops::{BatchMeta, HeadShape, Scoring},
};
use tidemill_kernels_emu::{EmuDriver, Schedule};

use crate::{
    common::{Rng, assert_same},
    harness::{self, assert_near, f32s, poisoned, values},
    paged::{Bed, CANCELLING, LAYER, Row, Step, kv, query, row},
};

/// What a test varies beside the rows.
#[derive(Clone, Copy)]
pub struct Options {
    pub heads: HeadShape,
    pub window: Option<usize>,
    pub soft_cap: Option<f32>,
    pub slopes: bool,
    pub sinks: bool,
    pub causal: bool,
    /// Room for split tiles, and the multiprocessors that rows are split for.
    pub split: (usize, usize),
    pub block_size: usize,
}

pub fn heads(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> HeadShape {
    HeadShape { num_heads, num_kv_heads, head_dim }
}

pub fn plain(heads: HeadShape) -> Options {
    Options {
        heads,
        window: None,
        soft_cap: None,
        slopes: false,
        sinks: false,
        causal: true,
        split: (256, 64),
        block_size: 16,
    }
}

impl Options {
    fn scale(&self) -> f32 {
        1.0 / (self.heads.head_dim as f32).sqrt()
    }

    fn slope(&self, head: usize) -> f32 {
        0.5 / (head + 1) as f32
    }

    fn sink(&self, head: usize) -> f32 {
        head as f32 - 1.0
    }

    pub fn limits(&self, step: &Step) -> PlanLimits {
        let (split_tiles, num_sms) = self.split;
        PlanLimits { max_tokens: step.tokens(), max_rows: step.rows.len(), split_tiles, num_sms }
    }

    pub fn plan(&self) -> PlanShape {
        let kind = if self.causal { PlanKind::Causal } else { PlanKind::BothWays };
        PlanShape { heads: self.heads, block_size: self.block_size, window: self.window, kind }
    }
}

/// Runs a step; tokens of padding rows stay NaN.
fn run(bed: &Bed, options: &Options, rows: &[Row]) -> Vec<f32> {
    let step = Step::new(options.heads, rows, options.window, options.block_size);
    let mut plan = Vec::new();
    let limits = options.limits(&step);
    let kernels = attention_plan(&mut plan, &step.meta, &options.plan(), &limits).unwrap();
    launch(bed, options, &step, &plan, kernels)
}

pub fn launch(
    bed: &Bed,
    options: &Options,
    step: &Step,
    plan: &[u32],
    kernels: AttentionKernels,
) -> Vec<f32> {
    let heads = options.heads;
    let (cache, qkv) = step.upload(bed);
    let mut out = poisoned(&bed.device, step.tokens() * heads.num_heads * heads.head_dim);
    let plan = bed.words(plan);
    let mut workspace = AttentionWorkspace::new(&bed.device, options.split.0, heads.head_dim).unwrap();
    let per_head =
        |f: &dyn Fn(usize) -> f32| f32s(&bed.device, &(0..heads.num_heads).map(f).collect::<Vec<_>>());
    let (slopes, sinks) = (per_head(&|h| options.slope(h)), per_head(&|h| options.sink(h)));
    let call = Attention {
        out: &mut out,
        qkv: &qkv,
        kv: KvLayer { cache: &cache, shape: step.shape, layer: LAYER },
        heads,
        plan: DeviceWords::new(&plan),
        kernels,
        workspace: &mut workspace,
        scoring: Scoring {
            scale: options.scale(),
            window: options.window,
            soft_cap: options.soft_cap,
            slopes: options.slopes.then_some(&slopes),
            sinks: options.sinks.then_some(&sinks),
            causal: options.causal,
        },
        tokens: step.tokens(),
    };
    attention(&bed.device, call).unwrap();
    values(&bed.device, &out)
}

/// One token and head in f64.
fn expected(options: &Options, id: u64, position: usize, head: usize) -> Vec<f64> {
    expected_in(options, id, (position, position + 1), head)
}

/// The same in a row of so many tokens.
fn expected_in(options: &Options, id: u64, (position, context): (usize, usize), head: usize) -> Vec<f64> {
    let HeadShape { num_heads, num_kv_heads, head_dim } = options.heads;
    let kv_head = head / (num_heads / num_kv_heads);
    let q = query(id, position, head, head_dim);
    let first = options.window.map_or(0, |w| (position + 1).saturating_sub(w));
    let score = |j: usize| {
        let key = kv(id, j, 0, kv_head, head_dim);
        let product: f64 = q.iter().zip(&key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
        let mut score = product * f64::from(options.scale());
        if let Some(cap) = options.soft_cap.map(f64::from) {
            score = cap * (score / cap).tanh();
        }
        if options.slopes {
            score + f64::from(options.slope(head)) * (j as f64 - position as f64)
        } else {
            score
        }
    };
    let last = match options.window {
        _ if options.causal => position,
        Some(window) => (context - 1).min(position + window - 1),
        None => context - 1,
    };
    let scores: Vec<f64> = (first..=last).map(score).collect();
    let greatest = scores.iter().fold(f64::MIN, |a, &b| a.max(b));
    let weights: Vec<f64> = scores.iter().map(|s| (s - greatest).exp()).collect();
    let sink = if options.sinks { (f64::from(options.sink(head)) - greatest).exp() } else { 0.0 };
    let total = weights.iter().sum::<f64>() + sink;
    let mut out = vec![0.0; head_dim];
    for (j, weight) in (first..=last).zip(&weights) {
        for (o, v) in out.iter_mut().zip(kv(id, j, 1, kv_head, head_dim)) {
            *o += weight / total * f64::from(v);
        }
    }
    out
}

fn all_expected(options: &Options, rows: &[Row]) -> Vec<f64> {
    rows.iter()
        .flat_map(|r| (0..r.new).map(|i| (r.id, (r.context - r.new + i, r.context))))
        .flat_map(|(id, place)| {
            (0..options.heads.num_heads).flat_map(move |head| expected_in(options, id, place, head))
        })
        .collect()
}

/// Values are below 1: rounding weights to bf16 costs up to 2^-9 of them, rounding the result as much of itself.
#[track_caller]
fn agrees(bed: &Bed, options: &Options, rows: &[Row]) {
    let out = run(bed, options, rows);
    let what = format!("{:?}, {rows:?}", options.heads);
    assert_near(&out, &all_expected(options, rows), 0.004, 0.003, &what);
}

/// A run of every kernel, for the tests of planted faults: some blocks and warps get a second item, rings come round, tiles are merged.
pub fn sample(bed: &Bed, head_dim: usize) -> Vec<f32> {
    let blocks = [row(1, 5, 150), row(2, 5, 5), row(3, 5, 5)];
    let mut out = run(bed, &plain(heads(26, 2, head_dim)), &blocks);
    out.extend(run(bed, &plain(heads(17, 17, head_dim)), &[row(4, 1, 5), row(5, 1, 9)]));
    out.extend(run(bed, &plain(heads(2, 1, head_dim)), &[row(6, 1, 150)]));
    out
}

fn on_every_bed(test: impl Fn(&Bed)) {
    harness::schedules().into_iter().for_each(|schedule| test(&Bed::new(schedule)));
}

#[test]
fn attention_agrees_with_f64_for_every_head_size() {
    on_every_bed(|bed| {
        for head_dim in [64, 80, 96, 128, 192, 256] {
            let options = plain(heads(4, 2, head_dim));
            agrees(
                bed,
                &options,
                &[row(1, 1, 1), row(2, 1, 17), row(3, 3, 130), row(4, 37, 37), row(5, 41, 131)],
            );
        }
    });
}

#[test]
fn attention_agrees_with_f64_at_every_context_length_that_is_an_edge() {
    on_every_bed(|bed| {
        let lengths = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 300];
        let rows: Vec<Row> = lengths.into_iter().enumerate().map(|(i, n)| row(i as u64, 1, n)).collect();
        agrees(bed, &plain(heads(3, 1, 64)), &rows);
    });
}

#[test]
fn attention_agrees_with_f64_for_every_group_size() {
    for (num_heads, num_kv_heads) in [(1, 1), (5, 1), (16, 1), (34, 2), (64, 2), (71, 1)] {
        let bed = Bed::new(Schedule::all()[num_heads % 4]);
        let options = plain(heads(num_heads, num_kv_heads, 64));
        agrees(&bed, &options, &[row(1, 1, 140), row(2, 2, 19), row(3, 7, 9)]);
    }
}

#[test]
fn attention_agrees_with_f64_and_keeps_its_bits_for_every_block_size() {
    let bed = Bed::new(Schedule::all()[1]);
    let rows = [row(1, 1, 139), row(2, 35, 70)];
    let small = plain(heads(2, 1, 80));
    let want = run(&bed, &small, &rows);
    for block_size in [32, 64, 128, 256] {
        let options = Options { block_size, ..small };
        agrees(&bed, &options, &rows);
        assert_same(&run(&bed, &options, &rows), &want, &format!("blocks of {block_size}"));
    }
}

#[test]
fn attention_agrees_with_f64_with_window_soft_cap_slopes_and_sinks() {
    let base = plain(heads(4, 2, 64));
    let rows = [row(1, 1, 5), row(2, 1, 290), row(3, 4, 261), row(4, 70, 150), row(5, 40, 40)];
    let cases = [
        Options { window: Some(1), ..base },
        Options { window: Some(40), ..base },
        Options { window: Some(128), sinks: true, ..base },
        Options { soft_cap: Some(1.5), ..base },
        Options { slopes: true, ..base },
        Options { window: Some(70), soft_cap: Some(3.0), slopes: true, sinks: true, ..base },
    ];
    for (i, options) in cases.iter().enumerate() {
        agrees(&Bed::new(Schedule::all()[i % 4]), options, &rows);
    }
}

#[test]
fn tokens_that_see_their_whole_row_agree_with_f64_and_keep_their_bits_in_any_company() {
    let both_ways = |head_dim| Options { causal: false, ..plain(heads(4, 2, head_dim)) };
    let cases = [
        both_ways(64),
        Options { split: (256, 1), ..both_ways(32) },
        Options { split: (0, 64), ..both_ways(192) },
        Options { window: Some(1), ..both_ways(64) },
        Options { window: Some(70), slopes: true, soft_cap: Some(3.0), sinks: true, ..both_ways(80) },
        Options { window: Some(150), ..both_ways(64) },
    ];
    let rows = [row(1, 1, 1), row(2, 20, 20), row(3, 0, 0), row(4, 300, 300), row(5, 4, 4), row(6, 131, 131)];
    for (i, options) in cases.iter().enumerate() {
        let bed = Bed::new(Schedule::all()[i % 4]);
        agrees(&bed, options, &rows);
        let all = run(&bed, options, &rows);
        let mut first = 0;
        for r in rows {
            let alone = if r.new > 0 { run(&bed, options, &[r]) } else { Vec::new() };
            assert_same(&tokens(&all, options, first, r.new), &alone, &format!("{r:?} alone"));
            first += r.new;
        }
        // A plan without a window serves every layer.
        let step = Step::new(options.heads, &rows, None, options.block_size);
        let (mut plan, limits) = (Vec::new(), options.limits(&step));
        let shape = PlanShape { window: None, ..options.plan() };
        let kernels = attention_plan(&mut plan, &step.meta, &shape, &limits).unwrap();
        assert_same(&launch(&bed, options, &step, &plan, kernels), &all, "a plan without a window");
    }
}

/// The rows of `tokens` tokens of the output.
fn tokens(out: &[f32], options: &Options, first: usize, count: usize) -> Vec<f32> {
    let width = options.heads.num_heads * options.heads.head_dim;
    out[first * width..(first + count) * width].to_vec()
}

#[test]
fn a_token_has_the_same_bits_in_a_prompt_in_chunks_and_as_a_decode_row_split_or_not() {
    let wide = Options {
        window: Some(150),
        soft_cap: Some(5.0),
        slopes: true,
        sinks: true,
        ..plain(heads(4, 1, 64))
    };
    let cases = [plain(heads(4, 1, 128)), plain(heads(3, 1, 80)), plain(heads(2, 1, 256)), wide];
    for (i, options) in cases.iter().enumerate() {
        let bed = Bed::new(Schedule::all()[i]);
        const LENGTH: usize = 270;
        let whole = run(&bed, options, &[row(1, LENGTH, LENGTH)]);
        let mut at = 0;
        for chunk in [1, 63, 7, 130, 2, 67] {
            let out = run(&bed, options, &[row(1, chunk, at + chunk)]);
            assert_same(&out, &tokens(&whole, options, at, chunk), &format!("chunk of {chunk} at {at}"));
            at += chunk;
        }
        assert_eq!(at, LENGTH);
        // One tile to a warp, two tiles to a warp, and no room to split at all.
        for split in [(256, 64), (256, 1), (0, 64)] {
            let rows: Vec<Row> =
                [0, 14, 15, 16, 127, 128, 200, 256, 269].into_iter().map(|p| row(1, 1, p + 1)).collect();
            let out = run(&bed, &Options { split, ..*options }, &rows);
            for (n, r) in rows.iter().enumerate() {
                let want = tokens(&whole, options, r.context - 1, 1);
                assert_same(
                    &tokens(&out, options, n, 1),
                    &want,
                    &format!("decode at {}, {split:?}", r.context),
                );
            }
        }
    }
}

#[test]
fn every_way_to_a_token_merges_its_tiles_with_the_same_roundings() {
    for (i, (heads, soft_cap)) in
        [(heads(4, 1, 64), None), (heads(2, 1, 192), None), (heads(4, 1, 96), Some(20.0))]
            .into_iter()
            .enumerate()
    {
        let bed = Bed::new(Schedule::all()[i]);
        let options = Options { soft_cap, ..plain(heads) };
        let last = run(&bed, &options, &[row(CANCELLING, 40, 300)]);
        let mut seen = Vec::new();
        for split in [(256, 64), (256, 1), (0, 64)] {
            let rows = [row(CANCELLING, 1, 300), row(CANCELLING, 3, 280)];
            let out = run(&bed, &Options { split, ..options }, &rows);
            assert_same(&tokens(&out, &options, 0, 1), &tokens(&last, &options, 39, 1), "the last token");
            assert_same(&tokens(&out, &options, 1, 3), &tokens(&last, &options, 17, 3), "three tokens");
            seen.extend(out);
        }
        // The test can fail: what is left is not what the exact sum would be.
        let exact = expected(&options, CANCELLING, 299, 0);
        let differ =
            seen.iter().zip(&exact).filter(|(g, w)| (f64::from(**g) - **w).abs() > 0.01 * w.abs()).count();
        assert!(differ > heads.head_dim / 4, "{differ} elements show rounding errors");
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_others_and_padding_rows_are_not_written() {
    on_every_bed(|bed| {
        let options = plain(heads(8, 2, 64));
        let rows = [row(1, 1, 200), row(7, 2, 0), row(2, 33, 60), row(3, 3, 130), row(4, 1, 1)];
        let out = run(bed, &options, &rows);
        let mut first = 0;
        for r in rows {
            let got = tokens(&out, &options, first, r.new);
            if r.context == 0 {
                assert!(got.iter().all(|x| x.is_nan()), "padding was written");
            } else {
                assert_same(&got, &run(bed, &options, &[r]), &format!("{r:?} alone"));
            }
            first += r.new;
        }
    });
}

#[test]
fn attention_reads_shared_memory_without_bank_conflicts() {
    for head_dim in [64, 80, 96, 128, 192, 256] {
        // Only the emulator counts them.
        let emulator = Arc::new(EmuDriver::new(Schedule::default()));
        let bed = Bed::over(emulator.clone());
        let options = plain(heads(2, 1, head_dim));
        for (rows, kernels) in [
            ([row(1, 1, 100)], AttentionKernels { split: true, block: false, combine: false }),
            ([row(1, 40, 100)], AttentionKernels { split: false, block: true, combine: false }),
        ] {
            let step = Step::new(options.heads, &rows, None, 16);
            let mut plan = Vec::new();
            let needed =
                attention_plan(&mut plan, &step.meta, &options.plan(), &options.limits(&step)).unwrap();
            assert_eq!(needed, kernels);
            launch(&bed, &options, &step, &plan, kernels);
            let stats = emulator.last_stats();
            assert!(stats.ldmatrix_phases > 0);
            assert_eq!(stats.ldmatrix_conflicts, 0, "D = {head_dim}, {kernels:?}");
        }
    }
}

#[test]
fn a_captured_decode_step_serves_steps_of_other_lengths() {
    let bed = Bed::new(Schedule::all()[2]);
    let options = plain(heads(4, 2, 64));
    let (heads, driver) = (options.heads, bed.device.driver());
    let step = Step::new(heads, &[row(1, 1, 290), row(2, 1, 3)], None, 16);
    let limits = options.limits(&step);
    let (cache, qkv) = step.upload(&bed);
    let plan = bed.words(&[0; 1024]);
    let mut workspace = AttentionWorkspace::new(&bed.device, options.split.0, heads.head_dim).unwrap();
    let mut out = poisoned(&bed.device, 2 * heads.num_heads * heads.head_dim);
    let scoring = Scoring {
        scale: options.scale(),
        window: None,
        soft_cap: None,
        slopes: None,
        sinks: None,
        causal: true,
    };
    driver.begin_capture().unwrap();
    let call = Attention {
        out: &mut out,
        qkv: &qkv,
        kv: KvLayer { cache: &cache, shape: step.shape, layer: LAYER },
        heads,
        plan: DeviceWords::new(&plan),
        kernels: AttentionKernels::DECODE,
        workspace: &mut workspace,
        scoring,
        tokens: 2,
    };
    attention(&bed.device, call).unwrap();
    let graph = driver.end_capture().unwrap();
    let want = all_expected(&options, &step.rows);
    let (mut words, half) = (Vec::new(), want.len() / 2);
    // The same launches with nothing to do, then with the first row as padding, then with all.
    for contexts in [[0, 0], [0, 3], [290, 3]] {
        let meta = BatchMeta { context_lens: contexts.to_vec(), ..step.meta.clone() };
        attention_plan(&mut words, &meta, &options.plan(), &limits).unwrap();
        bed.rewrite(&plan, &words);
        // SAFETY: all buffers of the recorded launches live.
        unsafe { driver.launch_graph(graph) }.unwrap();
        let got = values(&bed.device, &out);
        for (row, context) in contexts.into_iter().enumerate() {
            let (got, want) = (&got[row * half..][..half], &want[row * half..][..half]);
            match context {
                0 => assert!(got.iter().all(|x| x.is_nan()), "row {row} was written"),
                _ => assert_near(got, want, 0.004, 0.003, "replayed"),
            }
        }
    }
}

#[test]
fn a_plan_has_every_query_row_every_tile_and_every_block_table_once() {
    for seed in 0..200 {
        let mut rng = Rng::new(seed);
        let group = [1, 2, 4, 7, 16, 71][rng.below(6)];
        let heads = heads(group * 2, 2, 64);
        let mut meta = BatchMeta { cu_seqlens_q: vec![0], ..BatchMeta::default() };
        for _ in 0..1 + rng.below(6) {
            let new = [0, 1, 1, 3, 4, 5, 30, 200][rng.below(8)];
            let context = if rng.below(5) == 0 { 0 } else { new + [0, 1, 500, 20_000][rng.below(4)] };
            meta.cu_seqlens_q.push(meta.cu_seqlens_q.last().unwrap() + new as u32);
            meta.context_lens.push(context as u32);
        }
        meta.max_blocks = 1 + meta.context_lens.iter().max().unwrap().div_ceil(16) as usize;
        meta.block_tables = (0..meta.num_rows() * meta.max_blocks).map(|block| block as u32).collect();
        let window = [None, Some(1), Some(300)][rng.below(3)];
        let limits = PlanLimits {
            max_tokens: *meta.cu_seqlens_q.last().unwrap() as usize,
            max_rows: meta.num_rows(),
            split_tiles: [0, 3, 50, 5000][rng.below(4)],
            num_sms: [1, 4, 132][rng.below(3)],
        };
        let mut plan = Vec::new();
        let shape = PlanShape { heads, block_size: 16, window, kind: PlanKind::Causal };
        attention_plan(&mut plan, &meta, &shape, &limits).unwrap();
        check_plan(&plan, &meta, heads, window, limits.split_tiles);
    }
}

fn check_plan(plan: &[u32], meta: &BatchMeta, heads: HeadShape, window: Option<usize>, split_tiles: usize) {
    let items = |kind: usize| {
        let (count, first) = (plan[2 * kind] as usize, plan[2 * kind + 1] as usize);
        plan[first..first + 8 * count].chunks(8).map(|item| <[u32; 8]>::try_from(item).unwrap())
    };
    let group = heads.num_heads / heads.num_kv_heads;
    // How often each slot is filled, and how often each token's head is written.
    let (mut filled, mut merged) = (vec![0; split_tiles], vec![0; split_tiles]);
    let tokens = *meta.cu_seqlens_q.last().unwrap() as usize;
    let mut written = vec![0; tokens * heads.num_heads];
    for (kind, item) in (0..3).flat_map(|kind| items(kind).map(move |item| (kind, item))) {
        let [table, token, position, head_rows, first, tile, tiles, slot] = item.map(|word| word as usize);
        let starts_here = |ends: &[u32]| ends[0] as usize == token && ends[1] > ends[0];
        let row = meta.cu_seqlens_q.windows(2).position(starts_here).unwrap();
        let blocks = (meta.context_lens[row] as usize).div_ceil(16);
        assert_eq!(plan[table..table + blocks], meta.block_tables[row * meta.max_blocks..][..blocks]);
        let whole = slot == u32::MAX as usize || kind == 2;
        if slot != u32::MAX as usize {
            let slots = if kind == 2 { &mut merged } else { &mut filled };
            slots[slot..slot + tiles].iter_mut().for_each(|n| *n += 1);
        }
        if !whole {
            continue;
        }
        for packed in first..first + (head_rows >> 16) {
            let p = position + packed / group;
            let oldest = window.map_or(0, |w| (p + 1).saturating_sub(w));
            assert!(tile <= oldest / 128 && p / 128 < tile + tiles, "tiles {tile}+{tiles} for position {p}");
            written[(token + packed / group) * heads.num_heads
                + (head_rows & 0xffff) * group
                + packed % group] += 1;
        }
    }
    assert_eq!(filled, merged);
    assert!(filled.iter().all(|&n| n <= 1));
    for (row, &context) in meta.context_lens.iter().enumerate() {
        let [first, end] = [row, row + 1].map(|r| meta.cu_seqlens_q[r] as usize * heads.num_heads);
        assert!(written[first..end].iter().all(|&n| n == u32::from(context > 0)), "row {row}");
    }
}

#[test]
fn attention_refuses_what_the_kernels_cannot_take() {
    let bed = Bed::new(Schedule::default());
    let refused = |options: &Options, tamper: &dyn Fn(&mut Attention<'_>)| {
        let step = Step::new(options.heads, &[row(1, 1, 5)], None, 16);
        let mut plan = Vec::new();
        let limits = options.limits(&step);
        let kernels = attention_plan(&mut plan, &step.meta, &options.plan(), &limits).unwrap();
        let (cache, qkv) = step.upload(&bed);
        let plan = bed.words(&plan);
        let mut workspace = AttentionWorkspace::new(&bed.device, 1, options.heads.head_dim).unwrap();
        let mut out = poisoned(&bed.device, options.heads.num_heads * options.heads.head_dim);
        let mut call = Attention {
            out: &mut out,
            qkv: &qkv,
            kv: KvLayer { cache: &cache, shape: step.shape, layer: LAYER },
            heads: options.heads,
            plan: DeviceWords::new(&plan),
            kernels,
            workspace: &mut workspace,
            scoring: Scoring {
                scale: 1.0,
                window: None,
                soft_cap: None,
                slopes: None,
                sinks: None,
                causal: true,
            },
            tokens: 1,
        };
        tamper(&mut call);
        attention(&bed.device, call).unwrap_err()
    };
    let small = plain(heads(2, 1, 64));
    let unsupported =
        |e: KernelError| assert!(matches!(e, KernelError::Unsupported { op: "attention", .. }), "{e}");
    let shape = |e: KernelError| assert!(matches!(e, KernelError::Shape { op: "attention", .. }), "{e}");
    unsupported(refused(&plain(heads(2, 1, 72)), &|_| {}));
    unsupported(refused(&small, &|c| c.scoring.scale = f32::NAN));
    unsupported(refused(&small, &|c| c.scoring.soft_cap = Some(0.0)));
    unsupported(refused(&small, &|c| c.scoring.window = Some(0)));
    unsupported(refused(&small, &|c| c.kv.shape.block_size = 24));
    unsupported(refused(&small, &|c| c.heads.num_heads = 0));
    shape(refused(&small, &|c| c.kv.layer = 3));
    shape(refused(&small, &|c| c.tokens = 2));
    unsupported(refused(&small, &|c| c.plan = c.plan.part(1, 8).unwrap()));
    // Leaked, so that the closures may hand them to a call of any lifetime.
    let narrow: &'static DeviceBuffer = Box::leak(Box::new(f32s(&bed.device, &[0.0])));
    shape(refused(&small, &|c| c.scoring.slopes = Some(narrow)));
    shape(refused(&small, &|c| c.scoring.sinks = Some(narrow)));
    unsupported(refused(&small, &|c| {
        c.workspace = Box::leak(Box::new(AttentionWorkspace::new(&bed.device, 1, 80).unwrap()));
    }));
}

#[test]
fn a_plan_refuses_steps_beyond_its_limits() {
    let heads = heads(2, 1, 64);
    let limits = PlanLimits { max_tokens: 4, max_rows: 2, split_tiles: 0, num_sms: 1 };
    let plan_of = |kind: PlanKind, cu_seqlens_q: &[u32], context_lens: &[u32]| {
        let (cu_seqlens_q, context_lens) = (cu_seqlens_q.to_vec(), context_lens.to_vec());
        let block_tables = vec![0; context_lens.len()];
        let meta =
            BatchMeta { cu_seqlens_q, context_lens, block_tables, max_blocks: 1, ..BatchMeta::default() };
        let shape = PlanShape { heads, block_size: 16, window: None, kind };
        attention_plan(&mut Vec::new(), &meta, &shape, &limits)
    };
    let plan =
        |cu_seqlens_q: &[u32], context_lens: &[u32]| plan_of(PlanKind::Causal, cu_seqlens_q, context_lens);
    assert!(plan(&[0, 2, 4], &[2, 9]).is_ok());
    assert!(plan_of(PlanKind::BothWays, &[0, 2, 4], &[2, 2]).is_ok());
    let in_part = plan_of(PlanKind::BothWays, &[0, 2, 4], &[2, 9]);
    for refused in [in_part, plan(&[0, 5], &[5]), plan(&[0, 1, 2, 3], &[1, 1, 1]), plan(&[0, 3], &[2])] {
        assert!(matches!(refused, Err(KernelError::Unsupported { op: "attention_plan", .. })));
    }
}
