//! `moe_permute.cu`, the grouped kernels of the matrix product, and `moe_combine.cu`.

use std::sync::Arc;

use tidemill_kernels::{
    DType, KernelError,
    cuda::{
        Device,
        driver::Driver,
        memory::{DeviceBuffer, DeviceMemory},
        ops::{
            ActivationKind, Linear, LinearEpilogue, LinearHeads, LinearKernel, MoeCombine, MoeLinear,
            MoeOrder, MoePermute, MoeRows, MoeShape, linear, linear_heads, moe_combine, moe_linear,
            moe_permute,
        },
        words::DeviceWords,
    },
};

use crate::{
    common::{Rng, assert_same},
    harness::{assert_near, bf16s, f32s, poisoned, rounded, values},
    paged::Bed,
    words,
};

/// Memory for `count` words that no kernel has written yet.
fn unwritten(driver: &Arc<dyn Driver>, count: usize) -> DeviceMemory {
    words::upload(driver, &vec![0xdead_beef; count])
}

fn nan_f32s(device: &Device, elems: usize) -> DeviceBuffer {
    f32s(device, &vec![f32::NAN; elems])
}

// ---- Order

/// The order of `ids` and the memory it lies in.
struct Order {
    ids: DeviceMemory,
    sorted_pairs: DeviceMemory,
    offsets: DeviceMemory,
    tiles: DeviceMemory,
    shape: MoeShape,
    tokens: usize,
    kernel: LinearKernel,
}

impl Order {
    fn new(
        device: &Device,
        driver: &Arc<dyn Driver>,
        ids: &[u32],
        shape: MoeShape,
        kernel: LinearKernel,
    ) -> Order {
        let tokens = ids.len() / shape.top_k;
        let order = Order {
            ids: words::upload(driver, ids),
            sorted_pairs: unwritten(driver, ids.len()),
            offsets: unwritten(driver, shape.experts + 1),
            tiles: unwritten(driver, 2 * shape.max_tiles(tokens, kernel)),
            shape,
            tokens,
            kernel,
        };
        let call = MoePermute { order: order.view(), ids: DeviceWords::new(&order.ids) };
        moe_permute(device, call).unwrap();
        order
    }

    fn view(&self) -> MoeOrder<'_> {
        MoeOrder {
            sorted_pairs: DeviceWords::new(&self.sorted_pairs),
            offsets: DeviceWords::new(&self.offsets),
            tiles: DeviceWords::new(&self.tiles),
            shape: self.shape,
            tokens: self.tokens,
            kernel: self.kernel,
        }
    }
}

/// Experts for `tokens` tokens: expert 1 gets every token, the last none, the others what is left.
fn skewed_ids(tokens: usize, shape: MoeShape) -> Vec<u32> {
    let mut rng = Rng::new(7);
    let mut ids = Vec::new();
    for _ in 0..tokens {
        let mut chosen = vec![1];
        while chosen.len() < shape.top_k {
            let expert = rng.below(shape.experts - 1) as u32;
            if !chosen.contains(&expert) {
                chosen.push(expert);
            }
        }
        chosen.reverse();
        ids.extend(chosen);
    }
    ids
}

/// An order and products for the tests of planted faults.
pub fn sample(bed: &Bed) -> Vec<f32> {
    [sample_of_orders(bed), sample_of_products(bed)].concat()
}

/// More pairs than a block looks at in one round.
fn sample_of_orders(bed: &Bed) -> Vec<f32> {
    let (device, driver) = (&bed.device, &bed.driver);
    let shape = MoeShape { experts: 3, top_k: 2 };
    let order = Order::new(device, driver, &skewed_ids(2060, shape), shape, LinearKernel::Skinny16x8);
    // All below 2^24, but for the mark of unused tiles.
    [&order.sorted_pairs, &order.offsets, &order.tiles]
        .into_iter()
        .flat_map(|memory| words::download(driver, memory))
        .map(|word| word as f32)
        .collect()
}

#[test]
fn pairs_are_sorted_by_expert_and_cut_into_tiles() {
    words::on_every_schedule(|device, driver| {
        for (tokens, experts, top_k, kernel) in [
            (1, 6, 2, LinearKernel::Skinny16x8),
            (9, 4, 2, LinearKernel::Skinny16x8),
            (70, 5, 3, LinearKernel::Skinny32x32),
            (2060, 3, 2, LinearKernel::Tiled128x128),
        ] {
            let shape = MoeShape { experts, top_k };
            let ids = skewed_ids(tokens, shape);
            let order = Order::new(device, driver, &ids, shape, kernel);
            let mut pairs: Vec<u32> = (0..ids.len() as u32).collect();
            pairs.sort_by_key(|&p| ids[p as usize]);
            assert_eq!(words::download(driver, &order.sorted_pairs), pairs);

            let (mut offsets, mut tiles) = (vec![0], Vec::new());
            for expert in 0..experts as u32 {
                let begin = offsets[expert as usize];
                let end = begin + ids.iter().filter(|&&id| id == expert).count() as u32;
                offsets.push(end);
                tiles.extend((begin..end).step_by(kernel.tokens()).flat_map(|first| [expert, first]));
            }
            assert_eq!(words::download(driver, &order.offsets), offsets);
            let got = words::download(driver, &order.tiles);
            assert_eq!(got[..tiles.len()], tiles);
            assert!(got[tiles.len()..].chunks(2).all(|tile| tile[0] == u32::MAX));
        }
    });
}

// ---- Products

const H: usize = 40;
const I: usize = 24;

/// The weights of a layer.
struct Layer {
    shape: MoeShape,
    gate_up: Vec<f32>,
    down: Vec<f32>,
    down_bias: Vec<f32>,
}

impl Layer {
    fn new(shape: MoeShape) -> Layer {
        let mut rng = Rng::new(3);
        let mut matrices =
            |elems| rounded(&rng.units(shape.experts * elems)).iter().map(|w| w * 0.25).collect();
        Layer { shape, gate_up: matrices(2 * I * H), down: matrices(H * I), down_bias: matrices(H) }
    }

    /// Every step of the layer on tokens `x`, added to `x`; `kernel` of both products.
    fn run(
        &self,
        device: &Device,
        driver: &Arc<dyn Driver>,
        x: &[f32],
        (ids, weights): (&[u32], &[f32]),
        kernel: LinearKernel,
    ) -> (Vec<f32>, Vec<f32>) {
        let (shape, tokens, pairs) = (self.shape, x.len() / H, ids.len());
        let order = Order::new(device, driver, ids, shape, kernel);
        let (mut inner, mut rows) = (poisoned(device, pairs * I), poisoned(device, pairs * H));
        let call = MoeLinear {
            order: order.view(),
            rows: MoeRows::Tokens,
            out: &mut inner,
            x: &bf16s(device, x),
            weight: &bf16s(device, &self.gate_up),
            bias: None,
            n: I,
            k: H,
            epilogue: LinearEpilogue::Gated(ActivationKind::Silu),
        };
        moe_linear(device, call).unwrap();
        let call = MoeLinear {
            order: order.view(),
            rows: MoeRows::Pairs,
            out: &mut rows,
            x: &inner,
            weight: &bf16s(device, &self.down),
            bias: Some(&f32s(device, &self.down_bias)),
            n: H,
            k: I,
            epilogue: LinearEpilogue::Store,
        };
        moe_linear(device, call).unwrap();
        let (mut out, weights) = (bf16s(device, x), f32s(device, weights));
        let call = MoeCombine {
            out: &mut out,
            rows: &rows,
            weights: &weights,
            width: H,
            top_k: shape.top_k,
            tokens,
        };
        moe_combine(device, call).unwrap();
        (values(device, &rows), values(device, &out))
    }

    /// What expert `expert` makes of one token, with the dense product.
    fn dense(&self, device: &Device, x: &[f32], expert: usize) -> Vec<f32> {
        let part = |values: &[f32], elems| bf16s(device, &values[expert * elems..][..elems]);
        let (mut inner, mut out) = (poisoned(device, I), poisoned(device, H));
        let call = Linear {
            out: &mut inner,
            x: &bf16s(device, x),
            weight: &part(&self.gate_up, 2 * I * H),
            bias: None,
            rows: 1,
            n: I,
            k: H,
            epilogue: LinearEpilogue::Gated(ActivationKind::Silu),
        };
        linear(device, call).unwrap();
        let call = Linear {
            out: &mut out,
            x: &inner,
            weight: &part(&self.down, H * I),
            bias: Some(&f32s(device, &self.down_bias[expert * H..][..H])),
            rows: 1,
            n: H,
            k: I,
            epilogue: LinearEpilogue::Store,
        };
        linear(device, call).unwrap();
        values(device, &out)
    }
}

/// A product of each kind of kernel. K is long enough for their queues to come round, and what the tiled one loads last is where
/// its epilogue goes.
fn sample_of_products(bed: &Bed) -> Vec<f32> {
    const N: usize = 40;
    const K: usize = 296;
    let (device, driver) = (&bed.device, &bed.driver);
    let (shape, tokens) = (MoeShape { experts: 2, top_k: 1 }, 9);
    let mut rng = Rng::new(5);
    let (x, weight) = (bf16s(device, &rng.units(tokens * K)), bf16s(device, &rng.units(2 * N * K)));
    let product = |kernel| {
        let ids: Vec<u32> = (0..tokens as u32).map(|token| token % 2).collect();
        let order = Order::new(device, driver, &ids, shape, kernel);
        let mut out = nan_f32s(device, tokens * N);
        let call = MoeLinear {
            order: order.view(),
            rows: MoeRows::Tokens,
            out: &mut out,
            x: &x,
            weight: &weight,
            bias: None,
            n: N,
            k: K,
            epilogue: LinearEpilogue::Store,
        };
        moe_linear(device, call).unwrap();
        values(device, &out)
    };
    [LinearKernel::Skinny32x16, LinearKernel::Tiled128x64].into_iter().flat_map(product).collect()
}

/// Tokens, their experts and weights.
fn step(tokens: usize, shape: MoeShape) -> (Vec<f32>, Vec<u32>, Vec<f32>) {
    let x = rounded(&Rng::new(11).units(tokens * H));
    let weights = Rng::new(12).units(tokens * shape.top_k);
    (x, skewed_ids(tokens, shape), weights)
}

#[test]
fn each_pair_gets_its_experts_dense_product_to_the_bit_in_every_kernel() {
    let (device, driver) = words::device();
    for (tokens, experts, top_k) in [(1, 4, 2), (70, 5, 3)] {
        let layer = Layer::new(MoeShape { experts, top_k });
        let (x, ids, weights) = step(tokens, layer.shape);
        let dense: Vec<f32> = (0..ids.len())
            .flat_map(|p| layer.dense(&device, &x[p / top_k * H..][..H], ids[p] as usize))
            .collect();
        let expected: Vec<f64> = (0..tokens * H)
            .map(|i| {
                let (t, h) = (i / H, i % H);
                let sum: f64 = (t * top_k..(t + 1) * top_k)
                    .map(|p| f64::from(weights[p]) * f64::from(dense[p * H + h]))
                    .sum();
                sum + f64::from(x[i])
            })
            .collect();
        let mut first = None;
        for kernel in LinearKernel::ALL {
            let (rows, out) = layer.run(&device, &driver, &x, (&ids, &weights), kernel);
            assert_same(&rows, &dense, &format!("{kernel:?}"));
            assert_near(&out, &expected, 2_f64.powi(-8), 1e-5, "combined");
            assert_same(&out, first.get_or_insert(out.clone()), "combined");
        }
    }
}

#[test]
fn a_token_alone_gets_the_bits_it_has_among_others_on_every_schedule() {
    words::on_every_schedule(|device, driver| {
        let shape = MoeShape { experts: 5, top_k: 2 };
        let layer = Layer::new(shape);
        let (x, ids, weights) = step(21, shape);
        let (_, all) = layer.run(device, driver, &x, (&ids, &weights), LinearKernel::Tiled128x64);
        for t in [0, 8, 20] {
            let (ids, weights) = (&ids[2 * t..][..2], &weights[2 * t..][..2]);
            let x = &x[t * H..][..H];
            let (_, alone) = layer.run(device, driver, x, (ids, weights), shape.kernel(1));
            assert_same(&alone, &all[t * H..][..H], "a token alone");
        }
    });
}

#[test]
fn each_head_gets_its_dense_product_to_the_bit_however_many_rows_there_are() {
    words::on_every_schedule(|device, _| {
        for (heads, n, k) in [(1, 8, 16), (3, 40, 24), (5, 24, 296)] {
            const ROWS: usize = 70;
            let mut rng = Rng::new(k as u64);
            let (x, weight) = (rounded(&rng.units(ROWS * heads * k)), rounded(&rng.units(heads * n * k)));
            let bias = rng.units(heads * n);
            let run = |x: &[f32], rows: usize| {
                let mut out = nan_f32s(device, rows * heads * n);
                let call = LinearHeads {
                    out: &mut out,
                    x: &bf16s(device, x),
                    weight: &bf16s(device, &weight),
                    bias: Some(&f32s(device, &bias)),
                    rows,
                    heads,
                    n,
                    k,
                };
                linear_heads(device, call).unwrap();
                values(device, &out)
            };
            let all = run(&x, ROWS);
            for rows in [1, 9, 33] {
                let width = heads * k;
                let last = run(&x[(ROWS - rows) * width..], rows);
                assert_same(&last, &all[(ROWS - rows) * heads * n..], &format!("{rows} rows"));
            }
            for (row, head) in [(0, 0), (ROWS - 1, heads - 1), (7, heads / 2)] {
                let mut out = nan_f32s(device, n);
                let call = Linear {
                    out: &mut out,
                    x: &bf16s(device, &x[(row * heads + head) * k..][..k]),
                    weight: &bf16s(device, &weight[head * n * k..][..n * k]),
                    bias: Some(&f32s(device, &bias[head * n..][..n])),
                    rows: 1,
                    n,
                    k,
                    epilogue: LinearEpilogue::Store,
                };
                linear(device, call).unwrap();
                let got = &all[(row * heads + head) * n..][..n];
                assert_same(got, &values(device, &out), &format!("row {row}, head {head}"));
            }
        }
    });
}

#[test]
fn what_the_experts_made_is_added_to_the_stream() {
    let (device, _) = words::device();
    let (tokens, top_k, width) = (3, 2, 2056);
    let rows = rounded(&Rng::new(1).units(tokens * top_k * width));
    let weights = Rng::new(2).units(tokens * top_k);
    let stream = rounded(&Rng::new(3).units(tokens * width));
    let mut out = bf16s(&device, &stream);
    let (rows_there, weights_there) = (bf16s(&device, &rows), f32s(&device, &weights));
    let call = MoeCombine { out: &mut out, rows: &rows_there, weights: &weights_there, width, top_k, tokens };
    moe_combine(&device, call).unwrap();
    let want: Vec<f64> = (0..tokens * width)
        .map(|i| {
            let pair = |j| i / width * top_k + j;
            let sum: f64 = (0..top_k)
                .map(|j| f64::from(weights[pair(j)]) * f64::from(rows[pair(j) * width + i % width]))
                .sum();
            f64::from(stream[i]) + sum
        })
        .collect();
    assert_near(&values(&device, &out), &want, 2_f64.powi(-8), 1e-6, "combined");
}

#[test]
fn shapes_that_the_kernels_cannot_take_are_refused() {
    let (device, driver) = words::device();
    let shape = MoeShape { experts: 4, top_k: 2 };
    let small = unwritten(&driver, 4);
    let words = DeviceWords::new(&small);
    let order = MoeOrder {
        sorted_pairs: words,
        offsets: words,
        tiles: words,
        shape,
        tokens: 2,
        kernel: LinearKernel::Skinny16x8,
    };
    let refused = moe_permute(&device, MoePermute { order, ids: words });
    assert!(matches!(refused, Err(KernelError::Shape { op: "moe_permute", .. })));
    let mut out = device.buffer(DType::Bf16, 8, "out").unwrap();
    let (rows, logits) = (bf16s(&device, &[0.0; 16]), f32s(&device, &[0.0; 8]));
    let call = MoeCombine { out: &mut out, rows: &rows, weights: &logits, width: 12, top_k: 1, tokens: 1 };
    assert!(matches!(moe_combine(&device, call), Err(KernelError::Unsupported { op: "moe_combine", .. })));
}
