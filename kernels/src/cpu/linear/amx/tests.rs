//! The tile code on the model of the tiles. It needs AVX-512-BF16 for the vectors around them, and is skipped elsewhere.

use super::*;

fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + seed) * 7919 % 2003) as f32 / 1001.0 - 1.0) * 0.5).collect()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect()
}

fn rounded(v: f32) -> f64 {
    half::bf16::from_f32(v).to_f32().into()
}

fn vectors() -> Option<Avx512> {
    // SAFETY: detected just before.
    is_x86_feature_detected!("avx512bf16").then(|| unsafe { Avx512::new() })
}

#[test]
fn the_model_multiplies_as_the_manual_says() {
    let mut tiles = Model::new();
    let a: Vec<f32> = numbers(16 * 32, 1);
    let b: Vec<f32> = numbers(16 * 32, 2);
    let mut c = [1.0_f32; 256];
    // SAFETY: every operand is 16 rows of 64 bytes.
    unsafe {
        tiles.configure(&Config::new([64; 8]));
        tiles.load::<0>(c.as_ptr().cast(), 64);
        tiles.load::<1>(bytes(&a).as_ptr(), 64);
        tiles.load::<2>(bytes(&b).as_ptr(), 64);
        tiles.dot::<0, 1, 2>();
        tiles.store::<0>(c.as_mut_ptr(), 64);
    }
    for m in 0..16 {
        for n in 0..16 {
            // Pair k of row m of A meets element n of row k of B.
            let dot: f64 =
                (0..32).map(|i| rounded(a[m * 32 + i]) * rounded(b[i / 2 * 32 + 2 * n + i % 2])).sum();
            assert!((f64::from(c[m * 16 + n]) - 1.0 - dot).abs() < 1e-5);
        }
    }
}

#[test]
fn agrees_with_f64_on_awkward_shapes() {
    let Some(s) = vectors() else { return };
    for [rows, k] in [[1, 2], [16, 32], [32, 33], [37, 24], [64, 96], [70, 130], [31, 31], [96, 64]] {
        let (w, odd) = (numbers(rows * k, 5), [vec![0], bytes(&numbers(rows * k, 5))].concat());
        for tokens in [1, 2, 8, 15, 16, 17, 31, 32, 33, 50] {
            let x = numbers(tokens * k, 9);
            // SAFETY: the model needs nothing, the vectors are there.
            let got = unsafe { product(s, &mut Model::new(), &odd[1..], &x, [rows, k]) };
            for t in 0..tokens {
                for n in 0..rows {
                    let dot: f64 = (0..k).map(|i| rounded(w[n * k + i]) * rounded(x[t * k + i])).sum();
                    let got = f64::from(got[t * rows + n]);
                    assert!(
                        (got - dot).abs() < 1e-5,
                        "{rows} x {k}, {tokens} tokens, [{t}][{n}]: {got} {dot}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_in_any_batch() {
    let Some(s) = vectors() else { return };
    for [rows, k] in [[45, 96], [64, 50]] {
        let w = bytes(&numbers(rows * k, 5));
        let x = numbers(70 * k, 1);
        // SAFETY: the model needs nothing, the vectors are there.
        let run = |x: &[f32]| unsafe { product(s, &mut Model::new(), &w, x, [rows, k]) };
        let alone: Vec<f32> = x.chunks(k).flat_map(run).collect();
        for tokens in [1, 2, 7, 16, 17, 32, 40, 70] {
            for first in [0, 1, 70 - tokens] {
                let first = first.min(70 - tokens);
                let got = run(&x[first * k..(first + tokens) * k]);
                assert_eq!(got, alone[first * rows..(first + tokens) * rows]);
            }
        }
    }
}

#[test]
fn bias_and_residual_are_added_last() {
    let Some(s) = vectors() else { return };
    let (rows, k, tokens) = (35, 40, 3);
    let (w, x, bias) = (bytes(&numbers(rows * k, 2)), numbers(tokens * k, 3), numbers(rows, 4));
    // SAFETY: the model needs nothing, the vectors are there; extents are as allocated.
    unsafe {
        let plain = product(s, &mut Model::new(), &w, &x, [rows, k]);
        let mut packed = vec![0_u8; tokens * 128];
        pack_group(s, &x, k, packed.as_mut_ptr());
        let mut out = numbers(tokens * rows, 8);
        let want: Vec<f32> = (0..tokens * rows).map(|i| out[i] + (plain[i] + bias[i % rows])).collect();
        let (x, w, out_ptr, bias) = (packed.as_ptr(), w.as_ptr(), out.as_mut_ptr(), Some(bias.as_slice()));
        let p =
            Panel { x, x_stride: 128, tokens, w, rows, k, out: out_ptr, out_stride: rows, bias, add: true };
        panel(s, &mut Model::new(), p);
        assert_eq!(out, want);
    }
}
