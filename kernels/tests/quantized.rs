//! Products with quantised matrices against f64 over weights that are decoded here, one by one, from what each format's definition says.

#![allow(clippy::unwrap_used)]

mod common;

use bytes::Bytes;
use common::{Rng, assert_same, buffer, devices, poisoned, tensor};
use tidemill_kernels::{
    DType, HostTensor, KernelError, Ops,
    cpu::{Compute, CpuOps, CpuWeight},
    ops::{BatchMeta, Epilogue, Lookup},
    tensor::{GgmlType, HostMatrix, QuantFormat, QuantMatrix, f8_to_f32},
};

const FORMATS: [QuantFormat; 15] = [
    QuantFormat::Fp8 { rows: 1, columns: usize::MAX },
    QuantFormat::Fp8 { rows: usize::MAX, columns: usize::MAX },
    QuantFormat::Fp8 { rows: 24, columns: 48 },
    QuantFormat::Int4 { group: 16 },
    QuantFormat::Int4 { group: 128 },
    QuantFormat::Int4 { group: usize::MAX },
    QuantFormat::Int8 { group: 48 },
    QuantFormat::Int8 { group: 32 },
    QuantFormat::Int8 { group: usize::MAX },
    QuantFormat::Mxfp4,
    QuantFormat::Ggml(GgmlType::Q4_0),
    QuantFormat::Ggml(GgmlType::Q8_0),
    QuantFormat::Ggml(GgmlType::Q4_K),
    QuantFormat::Ggml(GgmlType::Q5_K),
    QuantFormat::Ggml(GgmlType::Q6_K),
];

/// Widths that a format can have: for those with free groups also some that no vector divides.
fn widths(format: QuantFormat) -> &'static [usize] {
    match format {
        QuantFormat::Fp8 { .. } | QuantFormat::Int8 { .. } => &[33, 160, 512],
        QuantFormat::Int4 { .. } => &[34, 176, 512],
        QuantFormat::Mxfp4 => &[32, 160],
        QuantFormat::Ggml(ty) if ty.block() == 32 => &[32, 160],
        QuantFormat::Ggml(_) => &[256, 768],
    }
}

/// The format with groups that are whole rows or columns where it says so.
fn fitted(format: QuantFormat, n: usize, k: usize) -> QuantFormat {
    match format {
        QuantFormat::Fp8 { rows, columns } => QuantFormat::Fp8 { rows: rows.min(n), columns: columns.min(k) },
        QuantFormat::Int4 { group } => QuantFormat::Int4 { group: group.min(k) },
        QuantFormat::Int8 { group } => QuantFormat::Int8 { group: group.min(k) },
        other => other,
    }
}

struct Sample {
    matrix: QuantMatrix,
    values: Vec<f64>,
}

/// A random matrix and its values.
fn sample(format: QuantFormat, n: usize, k: usize, seed: u64) -> Sample {
    let format = fitted(format, n, k);
    let mut rng = Rng::new(seed);
    let mut bytes = |count: usize| -> Vec<u8> { (0..count).map(|_| rng.next() as u8).collect() };
    let (mut data, groups) = match format {
        QuantFormat::Fp8 { rows, columns } => (bytes(n * k), n.div_ceil(rows) * k.div_ceil(columns)),
        QuantFormat::Int4 { group } => (bytes(n * k / 2), n * k.div_ceil(group)),
        QuantFormat::Int8 { group } => (bytes(n * k), n * k.div_ceil(group)),
        QuantFormat::Mxfp4 => (bytes(n * k / 32 * 17), 0),
        QuantFormat::Ggml(ty) => (bytes(n * k / ty.block() * ty.block_bytes()), 0),
    };
    let mut scale = |i: usize| {
        half::f16::from_f32((0.02 + 0.01 * rng.unit()) * if i.is_multiple_of(3) { -1.0 } else { 1.0 })
    };
    match format {
        QuantFormat::Fp8 { .. } => {
            data.iter_mut().filter(|b| **b & 0x7f == 0x7f).for_each(|b| *b -= 1);
        }
        QuantFormat::Mxfp4 => data.chunks_exact_mut(17).for_each(|b| b[0] = 120 + b[0] % 8),
        QuantFormat::Ggml(ty) => {
            for (i, block) in data.chunks_exact_mut(ty.block_bytes()).enumerate() {
                let places: &[usize] = match ty {
                    GgmlType::Q4_0 | GgmlType::Q8_0 => &[0],
                    GgmlType::Q4_K | GgmlType::Q5_K => &[0, 2],
                    GgmlType::Q6_K => &[208],
                };
                for &at in places {
                    block[at..at + 2].copy_from_slice(&scale(i).to_le_bytes());
                }
            }
        }
        _ => {}
    }
    let scales: Vec<f32> = (0..groups).map(|i| scale(i).to_f32()).collect();
    let is_affine =
        matches!(format, QuantFormat::Int4 { .. } | QuantFormat::Int8 { .. }) && seed.is_multiple_of(2);
    let offsets: Vec<f32> =
        (0..if is_affine { groups } else { 0 }).map(|i| -8.0 * scale(i).to_f32()).collect();
    let values = (0..n * k).map(|i| value(format, [n, k], &data, &scales, &offsets, i)).collect();
    let floats = |v: &[f32]| Bytes::from(v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
    // One byte off any alignment.
    data.insert(0, 0xff);
    let matrix = QuantMatrix {
        name: "test".into(),
        shape: [n, k],
        format,
        data: Bytes::from(data).slice(1..),
        scales: floats(&scales),
        offsets: floats(&offsets),
    };
    Sample { matrix, values }
}

/// Element `i` of the matrix, by definition.
fn value(
    format: QuantFormat,
    [_, k]: [usize; 2],
    data: &[u8],
    scales: &[f32],
    offsets: &[f32],
    i: usize,
) -> f64 {
    let (n, c) = (i / k, i % k);
    let affine = |q: i32, group: usize| {
        let at = n * k.div_ceil(group) + c / group;
        f64::from(q) * f64::from(scales[at]) + offsets.get(at).map_or(0.0, |&o| f64::from(o))
    };
    match format {
        QuantFormat::Fp8 { rows, columns } => {
            f64::from(f8_to_f32(data[i])) * f64::from(scales[n / rows * k.div_ceil(columns) + c / columns])
        }
        QuantFormat::Int4 { group } => affine(i32::from(data[i / 2] >> (4 * (i % 2)) & 15), group),
        QuantFormat::Int8 { group } => affine(i32::from(data[i] as i8), group),
        QuantFormat::Mxfp4 => {
            let block = &data[i / 32 * 17..][..17];
            let code = block[1 + i % 32 / 2] >> (4 * (i % 2)) & 15;
            let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
            let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
            sign * magnitude * f64::from(i32::from(block[0]) - 127).exp2()
        }
        QuantFormat::Ggml(ty) => {
            ggml_value(ty, &data[i / ty.block() * ty.block_bytes()..][..ty.block_bytes()], i % ty.block())
        }
    }
}

fn ggml_value(ty: GgmlType, b: &[u8], i: usize) -> f64 {
    let f16 = |at: usize| f64::from(half::f16::from_le_bytes([b[at], b[at + 1]]).to_f32());
    match ty {
        GgmlType::Q4_0 => f16(0) * (f64::from(b[2 + i % 16] >> (i / 16 * 4) & 15) - 8.0),
        GgmlType::Q8_0 => f16(0) * f64::from(b[2 + i] as i8),
        GgmlType::Q4_K | GgmlType::Q5_K => {
            let (g, l) = (i / 32, i % 32);
            // ggml-quants.c, get_scale_min_k4.
            let packed = &b[4..16];
            let (scale, minimum) = if g < 4 {
                (packed[g] & 63, packed[g + 4] & 63)
            } else {
                let high = |at: usize| (packed[at] >> 6) << 4;
                ((packed[g + 4] & 15) | high(g - 4), (packed[g + 4] >> 4) | high(g))
            };
            let at = if ty == GgmlType::Q4_K { 16 } else { 48 };
            let mut q = b[at + g / 2 * 32 + l] >> (g % 2 * 4) & 15;
            if ty == GgmlType::Q5_K {
                q |= (b[16 + l] >> g & 1) << 4;
            }
            f16(0) * f64::from(scale) * f64::from(q) - f16(2) * f64::from(minimum)
        }
        GgmlType::Q6_K => {
            let (half, quarter, l) = (i / 128, i % 128 / 32, i % 32);
            let low = b[64 * half + 32 * (quarter % 2) + l] >> (quarter / 2 * 4) & 15;
            let high = b[128 + 32 * half + l] >> (2 * quarter) & 3;
            let scale = b[192 + i / 16] as i8;
            f16(208) * f64::from(scale) * (f64::from(low | high << 4) - 32.0)
        }
    }
}

fn run(ops: &CpuOps, weight: &CpuWeight, x: &[f32], rows: usize) -> Vec<f32> {
    let mut out = poisoned(ops, rows * weight.rows());
    ops.linear(&mut out, &buffer(ops, x), weight, rows, Epilogue::Store).unwrap();
    out.as_slice()[..rows * weight.rows()].to_vec()
}

/// The product in f64, and the same over magnitudes: what an error is measured by.
fn reference(values: &[f64], k: usize, x: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let dot = |row: &[f64], x: &[f32], abs: bool| -> f64 {
        row.iter().zip(x).map(|(w, &x)| if abs { (w * f64::from(x)).abs() } else { w * f64::from(x) }).sum()
    };
    let all =
        |abs| x.chunks_exact(k).flat_map(|x| values.chunks_exact(k).map(move |w| dot(w, x, abs))).collect();
    (all(false), all(true))
}

#[track_caller]
fn assert_near(got: &[f32], (want, size): &(Vec<f64>, Vec<f64>), tolerance: f64, what: &str) {
    for (i, (&g, (&w, &s))) in got.iter().zip(want.iter().zip(size)).enumerate() {
        assert!((f64::from(g) - w).abs() <= tolerance * s, "{what}: element {i} is {g}, expected {w} of {s}");
    }
    assert_eq!(got.len(), want.len(), "{what}: length");
}

#[test]
fn a_product_is_that_of_the_decoded_matrix() {
    for (compute, tolerance) in [(Compute::F32, 1e-5), (Compute::Bf16, 8e-3)] {
        for ops in devices(compute, 2) {
            for (f, format) in FORMATS.into_iter().enumerate() {
                for &k in widths(format) {
                    let Sample { matrix, values } = sample(format, 70, k, f as u64 + 1);
                    let weight = ops.weight(&[HostMatrix::Quantized(matrix)], &[]).unwrap();
                    for rows in [1, 3, 9, 40] {
                        let x = Rng::new(7).units(rows * k);
                        let what = format!("{} {compute:?} {format:?} K {k}, {rows} rows", ops.isa());
                        assert_near(
                            &run(&ops, &weight, &x, rows),
                            &reference(&values, k, &x),
                            tolerance,
                            &what,
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads() {
    for compute in [Compute::F32, Compute::Bf16] {
        for (one, two) in devices(compute, 1).iter().zip(devices(compute, 2)) {
            for format in FORMATS {
                let k = *widths(format).last().unwrap();
                let m = || HostMatrix::Quantized(sample(format, 133, k, 5).matrix);
                let (weight, other) = (one.weight(&[m()], &[]).unwrap(), two.weight(&[m()], &[]).unwrap());
                let x = Rng::new(3).units(70 * k);
                let alone: Vec<f32> = x.chunks_exact(k).flat_map(|x| run(one, &weight, x, 1)).collect();
                for rows in [2, 4, 5, 7, 8, 17, 33, 70] {
                    let what = format!("{} {compute:?} {format:?} {rows} rows", one.isa());
                    let got = run(&two, &other, &x[..rows * k], rows);
                    assert_same(&got, &alone[..rows * 133], &what);
                }
            }
        }
    }
}

#[test]
fn parts_of_different_formats_stand_in_one_matrix() {
    let k = 512;
    for compute in [Compute::F32, Compute::Bf16] {
        for ops in devices(compute, 2) {
            let quant = |format, n, seed| sample(format, n, k, seed);
            let parts = [
                quant(QuantFormat::Ggml(GgmlType::Q4_K), 30, 1),
                quant(QuantFormat::Ggml(GgmlType::Q6_K), 17, 2),
                quant(QuantFormat::Int8 { group: 64 }, 9, 3),
            ];
            let dense = Rng::new(9).units(12 * k);
            let stacked: Vec<HostMatrix> = [
                HostMatrix::Quantized(parts[0].matrix.clone()),
                tensor(DType::F32, &[12, k], &dense, 1).into(),
                HostMatrix::Quantized(parts[1].matrix.clone()),
                HostMatrix::Quantized(parts[2].matrix.clone()),
            ]
            .into();
            let bias = Rng::new(4).units(68);
            let of = |range: std::ops::Range<usize>| -> HostTensor {
                tensor(DType::F32, &[range.len()], &bias[range], 0)
            };
            let biases = [of(0..30), of(30..42), of(42..59), of(59..68)];
            let weight = ops.weight(&stacked, &biases).unwrap();
            let x = Rng::new(7).units(5 * k);
            let got = run(&ops, &weight, &x, 5);
            let mut first = 0;
            for part in &stacked {
                let alone = ops.weight(std::slice::from_ref(part), &[]).unwrap();
                let want = run(&ops, &alone, &x, 5);
                let n = alone.rows();
                for t in 0..5 {
                    let want: Vec<f32> =
                        want[t * n..(t + 1) * n].iter().zip(&bias[first..]).map(|(v, b)| v + b).collect();
                    assert_same(&got[t * 68 + first..][..n], &want, &format!("{} {compute:?}", ops.isa()));
                }
                first += n;
            }
        }
    }
}

#[test]
fn a_quantised_table_is_looked_up() {
    for ops in devices(Compute::Bf16, 2) {
        for format in FORMATS {
            let k = widths(format)[0];
            let Sample { matrix, values } = sample(format, 20, k, 2);
            let table = ops.table(&HostMatrix::Quantized(matrix)).unwrap();
            let meta = BatchMeta { token_ids: vec![19, 0, 7], ..BatchMeta::default() };
            let batch = ops.upload(meta.into(), [].into()).unwrap();
            let mut out = poisoned(&ops, 3 * k);
            ops.embedding(&mut out, &table, &batch, Lookup::Tokens { scale: 1.0 }).unwrap();
            for (t, id) in [19, 0, 7].into_iter().enumerate() {
                for c in 0..k {
                    let (got, want) = (f64::from(out.as_slice()[t * k + c]), values[id * k + c]);
                    // Two roundings of a sum of two.
                    assert!((got - want).abs() <= 1e-6, "{} {format:?}: {got}, expected {want}", ops.isa());
                }
            }
        }
    }
}

#[test]
fn refuses_data_that_do_not_fit_the_format() {
    let ops = &devices(Compute::F32, 1)[0];
    for format in FORMATS {
        let k = widths(format)[0];
        let whole = sample(format, 6, k, 2).matrix;
        let cut = |bytes: &Bytes| bytes.slice(..bytes.len().saturating_sub(1));
        let mut broken = vec![
            QuantMatrix { data: cut(&whole.data), ..whole.clone() },
            QuantMatrix { shape: [7, k], ..whole.clone() },
            QuantMatrix { shape: [usize::MAX, k], ..whole.clone() },
            QuantMatrix { offsets: Bytes::from_static(&[0; 3]), ..whole.clone() },
        ];
        if !whole.scales.is_empty() {
            broken.push(QuantMatrix { scales: cut(&whole.scales), ..whole.clone() });
        } else {
            broken.push(QuantMatrix { scales: Bytes::from_static(&[0; 4]), ..whole.clone() });
        }
        for matrix in broken {
            let refused = ops.weight(&[HostMatrix::Quantized(matrix)], &[]);
            assert!(matches!(refused, Err(KernelError::Shape { .. })), "{format:?}");
        }
    }
    let odd = |format, k| {
        let empty = Bytes::new;
        let matrix = QuantMatrix {
            name: "x".into(),
            shape: [0, k],
            format,
            data: empty(),
            scales: empty(),
            offsets: empty(),
        };
        let refused = ops.weight(&[HostMatrix::Quantized(matrix)], &[]);
        assert!(matches!(refused, Err(KernelError::Unsupported { .. })), "{format:?}");
    };
    odd(QuantFormat::Int4 { group: 0 }, 64);
    odd(QuantFormat::Int4 { group: 24 }, 64);
    odd(QuantFormat::Int4 { group: 33 }, 33);
    odd(QuantFormat::Int8 { group: 8 }, 64);
    odd(QuantFormat::Fp8 { rows: 0, columns: 64 }, 64);
    odd(QuantFormat::Fp8 { rows: 1, columns: 24 }, 64);
    odd(QuantFormat::Mxfp4, 48);
    odd(QuantFormat::Ggml(GgmlType::Q4_K), 128);
}
