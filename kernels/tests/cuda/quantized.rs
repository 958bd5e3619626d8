//! Products with quantised weights: to the bit those with the same weights in bf16.

use bytes::Bytes;
use half::f16;
use tidemill_kernels::{
    DType, KernelError,
    cuda::{
        CudaWeight, Device, Uploader,
        matrix::{Code, Coding, Matrix, ProductWeight},
        memory::DeviceBuffer,
        ops::{ActivationKind, Linear, LinearEpilogue, LinearKernel, linear, linear_with},
    },
    tensor::{GgmlType, HostMatrix, QuantFormat, QuantMatrix, f8_to_f32},
};

use crate::{
    common::{Rng, assert_same, tensor},
    harness::{bf16s, f32s, on_every_schedule, poisoned, rounded, values},
    words,
};

use LinearEpilogue::{Gated, Store};
use QuantFormat::{Fp8, Ggml, Int4, Int8, Mxfp4};

/// Formats whose scales stand beside the codes, and MX: every kind of group, for N = 40 and K = 544.
const FORMATS: [(QuantFormat, Offsets); 14] = [
    (Fp8 { rows: 40, columns: 544 }, Offsets::None),
    (Fp8 { rows: 1, columns: 544 }, Offsets::None),
    (Fp8 { rows: 16, columns: 128 }, Offsets::None),
    (Fp8 { rows: 7, columns: 48 }, Offsets::None),
    (Int4 { group: 32 }, Offsets::Any),
    (Int4 { group: 16 }, Offsets::Centred),
    (Int4 { group: 128 }, Offsets::Centred),
    (Int4 { group: 544 }, Offsets::Any),
    (Int4 { group: 48 }, Offsets::None),
    (Int8 { group: 32 }, Offsets::None),
    (Int8 { group: 16 }, Offsets::Any),
    (Int8 { group: 1000 }, Offsets::None),
    (Int8 { group: 64 }, Offsets::Any),
    (Mxfp4, Offsets::None),
];

#[derive(Clone, Copy, PartialEq)]
enum Offsets {
    None,
    /// -8 times the scale.
    Centred,
    Any,
}

/// A random matrix, and the weights that it stands for.
fn quantized(format: QuantFormat, offsets: Offsets, [n, k]: [usize; 2]) -> (HostMatrix, Vec<f32>) {
    let mut rng = Rng::new((n * 1000 + k) as u64);
    let groups = match format {
        Fp8 { rows, columns } => n.div_ceil(rows) * k.div_ceil(columns),
        Int4 { group } | Int8 { group } => n * k.div_ceil(group),
        _ => 0,
    };
    let scales: Vec<f32> = (0..groups).map(|_| 0.01 + 0.01 * rng.unit().abs()).collect();
    let offset = |&scale: &f32| match offsets {
        Offsets::None => 0.0,
        Offsets::Centred => -8.0 * scale,
        Offsets::Any => 0.1 * scale - 0.05,
    };
    let offset: Vec<f32> = scales.iter().map(offset).collect();
    let (data, codes) = random_codes(format, &mut rng, n, k);
    let weights = (0..n * k).map(|i| {
        let (row, column) = (i / k, i % k);
        let group = match format {
            Fp8 { rows, columns } => row / rows * k.div_ceil(columns) + column / columns,
            Int4 { group } | Int8 { group } => row * k.div_ceil(group) + column / group,
            _ => return codes[i],
        };
        codes[i].mul_add(scales[group], offset[group])
    });
    let weights = weights.collect();
    let floats =
        |values: &[f32]| Bytes::from(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
    let offsets = if offsets == Offsets::None { Bytes::new() } else { floats(&offset) };
    let (data, scales) = (data.into(), floats(&scales));
    (QuantMatrix { name: "w".into(), shape: [n, k], format, data, scales, offsets }.into(), weights)
}

/// Random data of a format and its codes as numbers; those of MX with their scales.
fn random_codes(format: QuantFormat, rng: &mut Rng, n: usize, k: usize) -> (Vec<u8>, Vec<f32>) {
    let mut byte = || rng.next().to_le_bytes()[3];
    match format {
        // Every byte that is a number.
        Fp8 { .. } => {
            let data: Vec<u8> =
                (0..n * k).map(|_| byte()).map(|b| if b & 127 == 127 { b ^ 1 } else { b }).collect();
            let codes = data.iter().map(|&b| f8_to_f32(b)).collect();
            (data, codes)
        }
        Int4 { .. } => {
            let data: Vec<u8> = (0..n * k / 2).map(|_| byte()).collect();
            let codes = data.iter().flat_map(|&b| [f32::from(b % 16), f32::from(b / 16)]).collect();
            (data, codes)
        }
        Int8 { .. } => {
            let data: Vec<u8> = (0..n * k).map(|_| byte()).collect();
            let codes = data.iter().map(|&b| f32::from(b as i8)).collect();
            (data, codes)
        }
        _ => {
            let e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
            let (mut data, mut codes) = (Vec::new(), Vec::new());
            for _ in 0..n * k / 32 {
                // Exponents from -7 to 0.
                let exponent = byte() % 8;
                data.push(120 + exponent);
                for _ in 0..16 {
                    data.push(byte());
                    let pair = data[data.len() - 1];
                    for code in [pair % 16, pair / 16] {
                        let sign = if code < 8 { 1.0 } else { -1.0 };
                        // As a product with a scale and the sum with no offset have it, there is no -0.
                        codes.push(
                            sign * e2m1[usize::from(code % 8)] * 2_f32.powi(i32::from(exponent) - 7) + 0.0,
                        );
                    }
                }
            }
            (data, codes)
        }
    }
}

/// A random matrix of blocks of GGML.
fn ggml(ty: GgmlType, [n, k]: [usize; 2]) -> HostMatrix {
    let mut rng = Rng::new(k as u64);
    let mut data: Vec<u8> =
        (0..n * k / ty.block() * ty.block_bytes()).map(|_| rng.next().to_le_bytes()[3]).collect();
    for block in data.chunks_exact_mut(ty.block_bytes()) {
        // Scales of any bits would be infinite or no number.
        let places = match ty {
            GgmlType::Q4_0 | GgmlType::Q8_0 => vec![0],
            GgmlType::Q4_K | GgmlType::Q5_K => vec![0, 2],
            GgmlType::Q6_K => vec![208],
        };
        for at in places {
            block[at..at + 2].copy_from_slice(&f16::from_f32(0.002 * rng.unit()).to_le_bytes());
        }
    }
    let (scales, offsets) = (Bytes::new(), Bytes::new());
    QuantMatrix { name: "w".into(), shape: [n, k], format: Ggml(ty), data: data.into(), scales, offsets }
        .into()
}

/// `rows` rows of a product into f32, which shows every bit of the sum.
fn product(
    device: &Device,
    kernel: Option<LinearKernel>,
    weight: &dyn ProductWeight,
    x: &[f32],
    [n, k]: [usize; 2],
) -> Vec<f32> {
    let rows = x.len() / k;
    let (mut out, x) = (f32s(device, &vec![f32::NAN; rows * n]), bf16s(device, x));
    let call = Linear { out: &mut out, x: &x, weight, bias: None, rows, n, k, epilogue: Store };
    match kernel {
        Some(kernel) => linear_with(device, kernel, call).unwrap(),
        None => linear(device, call).unwrap(),
    }
    values(device, &out)
}

fn upload(device: &Device, parts: &[HostMatrix]) -> CudaWeight {
    Uploader::new(device).unwrap().weight(parts, &[]).unwrap()
}

fn coding(weight: &CudaWeight) -> Option<Coding> {
    match weight.matrix() {
        Matrix::Bf16(_) => None,
        Matrix::Coded(coded) => Some(coded.coding()),
    }
}

/// Every kernel over every kind of code, for the tests of planted faults.
pub fn sample(device: &Device) -> Vec<f32> {
    let shape = [72, 320];
    let x = Rng::new(1).units(34 * 320);
    let weights = [(Int4 { group: 16 }, Offsets::Any), (Int8 { group: 64 }, Offsets::None)]
        .map(|(format, offsets)| upload(device, &[quantized(format, offsets, shape).0]));
    let run =
        |kernel| weights.each_ref().map(|w| product(device, Some(kernel), w.matrix(), &x, shape)).concat();
    LinearKernel::ALL.into_iter().filter(|kernel| kernel.quantized() == *kernel).flat_map(run).collect()
}

#[test]
fn every_format_has_the_bits_of_bf16_in_every_kernel() {
    let (device, _) = words::device();
    let shape @ [n, k] = [40, 544];
    let x = rounded(&Rng::new(9).units(70 * k));
    for (format, offsets) in FORMATS {
        let (matrix, weights) = quantized(format, offsets, shape);
        let weight = upload(&device, &[matrix]);
        assert!(coding(&weight).is_some(), "{format:?}");
        let dense = bf16s(&device, &weights);
        let want = product(&device, None, &dense, &x, shape);
        assert!(want.iter().all(|v| v.is_finite()));
        for kernel in LinearKernel::ALL {
            for rows in [1, 9, 70] {
                let got = product(&device, Some(kernel), weight.matrix(), &x[..rows * k], shape);
                assert_same(&got, &want[..rows * n], &format!("{format:?}, {kernel:?}, {rows} rows"));
            }
        }
    }
}

#[test]
fn awkward_shapes_have_the_bits_of_bf16_on_every_schedule() {
    on_every_schedule(|device| {
        for shape @ [n, k] in [[1, 32], [200, 64], [13, 288], [72, 1056]] {
            let x = rounded(&Rng::new(k as u64).units(33 * k));
            for (format, offsets) in [
                (Int4 { group: 32 }, Offsets::Any),
                (Int8 { group: k }, Offsets::None),
                (Mxfp4, Offsets::None),
            ] {
                let (matrix, weights) = quantized(format, offsets, shape);
                let (weight, dense) = (upload(device, &[matrix]), bf16s(device, &weights));
                let want = product(device, None, &dense, &x, shape);
                for kernel in [LinearKernel::Skinny16x8, LinearKernel::Skinny32x32, LinearKernel::Tiled128x64]
                {
                    let got = product(device, Some(kernel), weight.matrix(), &x, shape);
                    assert_same(&got, &want, &format!("{format:?}, {kernel:?}, {n} x {k}"));
                }
            }
        }
    });
}

#[test]
fn gates_biases_and_residuals_follow_a_quantised_product_too() {
    let (device, _) = words::device();
    let [n, k, rows] = [24, 96, 18];
    let x = bf16s(&device, &Rng::new(2).units(rows * k));
    let bias = f32s(&device, &Rng::new(3).units(2 * n));
    for (epilogue, weight_rows) in [(Gated(ActivationKind::Silu), 2 * n), (LinearEpilogue::Add, n)] {
        let (matrix, weights) = quantized(Int4 { group: 32 }, Offsets::Any, [weight_rows, k]);
        let run = |kernel, weight: &dyn ProductWeight| {
            let mut out = if epilogue == LinearEpilogue::Add {
                bf16s(&device, &Rng::new(4).units(rows * n))
            } else {
                poisoned(&device, rows * n)
            };
            let bias = Some(&bias);
            linear_with(&device, kernel, Linear { out: &mut out, x: &x, weight, bias, rows, n, k, epilogue })
                .unwrap();
            values(&device, &out)
        };
        let (weight, dense) = (upload(&device, &[matrix]), bf16s(&device, &weights));
        for kernel in LinearKernel::ALL {
            assert_same(
                &run(kernel, weight.matrix()),
                &run(kernel, &dense),
                &format!("{epilogue:?}, {kernel:?}"),
            );
        }
    }
}

/// What `Ops::table` makes of a matrix, as f32.
fn table(device: &Device, matrix: &HostMatrix) -> Vec<f32> {
    let table = Uploader::new(device).unwrap().table(matrix).unwrap();
    values(device, table.matrix().bf16("test").unwrap())
}

#[test]
fn tables_are_widened_to_bf16() {
    let (device, _) = words::device();
    // 40 columns are no whole blocks: products have those in bf16 too.
    for (k, formats) in [(544, &FORMATS[..]), (40, &FORMATS[4..13])] {
        for &(format, offsets) in formats {
            let (matrix, weights) = quantized(format, offsets, [40, k]);
            let weights = rounded(&weights);
            assert_same(&table(&device, &matrix), &weights, &format!("{format:?}"));
            if k == 40 {
                let weight = upload(&device, &[matrix]);
                assert_same(&values(&device, weight.matrix().bf16("test").unwrap()), &weights, "as a weight");
            }
        }
    }
}

#[test]
fn blocks_of_ggml_keep_their_weights() {
    let (device, _) = words::device();
    let shape @ [_, k] = [24, 512];
    let x = rounded(&Rng::new(5).units(9 * k));
    for (ty, code, group, offsets) in [
        (GgmlType::Q4_0, Code::Int4, 32, false),
        (GgmlType::Q8_0, Code::Int8, 32, false),
        (GgmlType::Q4_K, Code::Int4, 32, true),
        (GgmlType::Q5_K, Code::Int8, 32, true),
        (GgmlType::Q6_K, Code::Int8, 16, false),
    ] {
        let matrix = ggml(ty, shape);
        let weight = upload(&device, std::slice::from_ref(&matrix));
        assert_eq!(coding(&weight), Some(Coding { code, group, offsets }), "{ty:?}");
        let dense = bf16s(&device, &table(&device, &matrix));
        for kernel in [LinearKernel::Skinny16x16, LinearKernel::Tiled128x128] {
            let got = product(&device, Some(kernel), weight.matrix(), &x, shape);
            assert_same(
                &got,
                &product(&device, Some(kernel), &dense, &x, shape),
                &format!("{ty:?}, {kernel:?}"),
            );
        }
    }
}

#[test]
fn parts_of_different_formats_become_one_that_loses_nothing() {
    let (device, _) = words::device();
    let k = 512;
    let fp8 = || quantized(Fp8 { rows: 8, columns: k }, Offsets::None, [8, k]).0;
    let dense = || HostMatrix::from(tensor(DType::Bf16, &[8, k], &Rng::new(6).units(8 * k), 0));
    let centred = || quantized(Int4 { group: 64 }, Offsets::Centred, [8, k]).0;
    let any = || quantized(Int4 { group: 32 }, Offsets::Any, [8, k]).0;
    let q = |ty| ggml(ty, [8, k]);
    let int8 = |group, offsets| Some(Coding { code: Code::Int8, group, offsets });
    for (parts, want) in [
        ([q(GgmlType::Q4_K), q(GgmlType::Q4_K), q(GgmlType::Q6_K)], int8(16, true)),
        ([q(GgmlType::Q4_0), q(GgmlType::Q8_0), q(GgmlType::Q6_K)], int8(16, false)),
        ([any(), centred(), any()], Some(Coding { code: Code::Int4, group: 32, offsets: true })),
        ([fp8(), fp8(), fp8()], Some(Coding { code: Code::Fp8, group: 512, offsets: false })),
        ([fp8(), any(), fp8()], None),
        ([dense(), any(), dense()], None),
    ] {
        let weight = upload(&device, &parts);
        assert_eq!(coding(&weight), want);
        let rows: Vec<f32> = parts.iter().flat_map(|part| table(&device, part)).collect();
        let (x, shape) = (rounded(&Rng::new(7).units(9 * k)), [24, k]);
        let want = product(&device, None, &bf16s(&device, &rows), &x, shape);
        assert_same(&product(&device, None, weight.matrix(), &x, shape), &want, "stacked parts");
    }
}

#[test]
fn the_ends_of_mx_scales_and_bytes_that_are_no_numbers() {
    let (device, _) = words::device();
    let mut data = vec![0x22; 17];
    let mut mx = |scale| {
        data[0] = scale;
        let (data, empty) = (Bytes::from(data.clone()), Bytes::new());
        let (name, shape, scales, offsets) = ("w".into(), [1, 32], empty.clone(), empty);
        upload(&device, &[QuantMatrix { name, shape, format: Mxfp4, data, scales, offsets }.into()])
    };
    // A large x brings what is nearly nothing into range: 32 ones times 2^-127 times 2^100.
    let x = vec![2_f32.powi(100); 32];
    let mut run = |scale| product(&device, None, mx(scale).matrix(), &x, [1, 32])[0];
    assert_eq!(run(0), 2_f32.powi(5 + 100 - 127));
    assert_eq!(run(1), 2_f32.powi(5 + 100 - 126));
    assert!(run(255).is_nan());
    let (data, scales) = (Bytes::from(vec![0x7f; 32]), Bytes::from(1_f32.to_le_bytes().to_vec()));
    let format = Fp8 { rows: 1, columns: 32 };
    let nan = QuantMatrix { name: "w".into(), shape: [1, 32], format, data, scales, offsets: Bytes::new() };
    assert!(product(&device, None, upload(&device, &[nan.into()]).matrix(), &x, [1, 32])[0].is_nan());
}

#[test]
fn shared_memory_meets_no_bank_conflict() {
    // Only the emulator counts them.
    let emulator = std::sync::Arc::new(tidemill_kernels_emu::EmuDriver::new(Default::default()));
    let device = Device::new(emulator.clone());
    let shape @ [_, k] = [136, 320];
    for (format, offsets) in [(Int4 { group: 16 }, Offsets::Any), (Int8 { group: 16 }, Offsets::None)] {
        let weight = upload(&device, &[quantized(format, offsets, shape).0]);
        for kernel in LinearKernel::ALL {
            product(&device, Some(kernel), weight.matrix(), &vec![1.0; 130 * k], shape);
            let stats = emulator.last_stats();
            assert!(stats.shared_phases > 0);
            assert_eq!(stats.shared_conflicts, 0, "{kernel:?} with {format:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (device, _) = words::device();
    let refused = |change: &dyn Fn(&mut QuantMatrix)| {
        let HostMatrix::Quantized(mut matrix) = quantized(Int4 { group: 32 }, Offsets::Any, [4, 64]).0 else {
            panic!("it is quantised")
        };
        change(&mut matrix);
        let error = Uploader::new(&device).unwrap().weight(&[matrix.into()], &[]).err().unwrap();
        assert!(error.to_string().contains('w'), "{error}");
        error
    };
    let shape = |change: &dyn Fn(&mut QuantMatrix)| {
        let error = refused(change);
        assert!(matches!(error, KernelError::Shape { op: "weight", .. }), "{error}");
    };
    shape(&|m| m.data = m.data.slice(1..));
    shape(&|m| m.scales = m.scales.slice(4..));
    shape(&|m| m.offsets = m.offsets.slice(4..));
    shape(&|m| m.shape[0] = usize::MAX / 2);
    let unsupported = |change: &dyn Fn(&mut QuantMatrix)| {
        let error = refused(change);
        assert!(matches!(error, KernelError::Unsupported { op: "weight", .. }), "{error}");
    };
    unsupported(&|m| m.format = Int4 { group: 0 });
    unsupported(&|m| m.format = Int8 { group: 24 });
    unsupported(&|m| m.format = Fp8 { rows: 0, columns: 64 });
    unsupported(&|m| (m.format, m.shape[1]) = (Mxfp4, 48));
    unsupported(&|m| m.format = Ggml(GgmlType::Q4_K));
    unsupported(&|m| m.shape[1] = 63);

    let weight = upload(&device, &[quantized(Int4 { group: 32 }, Offsets::Any, [4, 64]).0]);
    let call = |n, k, out: &mut DeviceBuffer| {
        let x = bf16s(&device, &[0.0; 96]);
        linear(
            &device,
            Linear { out, x: &x, weight: weight.matrix(), bias: None, rows: 1, n, k, epilogue: Store },
        )
    };
    let mut out = poisoned(&device, 8);
    assert!(call(4, 64, &mut out).is_ok());
    assert!(matches!(call(5, 64, &mut out), Err(KernelError::Shape { op: "linear", .. })));
    assert!(matches!(call(4, 32, &mut out), Err(KernelError::Shape { op: "linear", .. })));
    assert!(matches!(
        weight.matrix().bf16("embedding"),
        Err(KernelError::Unsupported { op: "embedding", .. })
    ));
}
