//! `Ops::rope_kv_write` and `Ops::paged_attention`: against f64, and bit by bit across ways to cut a prompt.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/sequences.rs"]
mod sequences;

use std::sync::Arc;

use common::{assert_close, assert_same, buffer, devices};
use sequences::{Form, cache, heads, reference, run, setup, step, whole};
use tidemill_kernels::{
    DType, KernelError, Ops,
    cpu::Compute,
    ops::{HeadShape, KvShape},
};

const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F8E4M3];

/// Every option once, and such as models have together.
fn forms(heads: HeadShape) -> Vec<Form> {
    let plain = Form::plain(heads);
    let quarter = (heads.head_dim / 4).next_multiple_of(2);
    vec![
        plain,
        // Persimmon's and NeoX's partial rotation; GPT-J's and Cohere's pairs; no positions at all.
        Form { rotated: quarter, ..plain },
        Form { interleaved: true, ..plain },
        Form { rotated: quarter, interleaved: true, ..plain },
        Form { rotated: 0, ..plain },
        Form { head_norm: true, ..plain },
        Form { head_norm: true, rotated: 0, ..plain },
        Form { window: Some(1), ..plain },
        Form { window: Some(7), ..plain },
        Form { window: Some(33), ..plain },
        Form { window: Some(1000), ..plain },
        Form { soft_cap: Some(0.4), ..plain },
        Form { slopes: true, rotated: 0, ..plain },
        Form { sinks: true, ..plain },
        Form { causal: false, ..plain },
        Form { causal: false, window: Some(9), ..plain },
        Form { causal: false, slopes: true, soft_cap: Some(2.0), ..plain },
        Form { window: Some(20), sinks: true, ..plain },
        Form { window: Some(13), soft_cap: Some(1.0), head_norm: true, slopes: true, sinks: true, ..plain },
    ]
}

#[test]
fn agrees_with_f64() {
    let shapes = [
        (heads(4, 2, 16), 16, vec![37, 1]),
        (heads(6, 2, 64), 16, vec![50]),
        (heads(2, 2, 32), 8, vec![19, 3, 40]),
        (heads(4, 1, 80), 16, vec![33]),
        (heads(2, 1, 96), 5, vec![23]),
        (heads(8, 2, 128), 32, vec![70]),
        (heads(3, 1, 192), 24, vec![49]),
        (heads(1, 1, 256), 1, vec![9]),
        (heads(7, 1, 2), 3, vec![20]),
        (heads(2, 1, 10), 64, vec![130]),
        (heads(2, 2, 6), 7, vec![90]),
    ];
    for dtype in DTYPES {
        for (heads, block_size, lens) in &shapes {
            for form in forms(*heads) {
                let s = setup(*heads, *block_size, dtype, lens, form);
                let want: Vec<Vec<f64>> = s.sequences.iter().map(|q| reference(&s, q)).collect();
                // A key that rounds the other way moves a bf16 score by 2^-8 of one product, one of F8E4M3 by 2^-3.
                let tolerance = match dtype {
                    DType::F32 => 3e-6,
                    DType::Bf16 => 2e-3,
                    _ => 6e-2,
                };
                for ops in devices(Compute::F32, 2) {
                    for (got, want) in run(&ops, &s, &whole(&s)).iter().zip(&want) {
                        let what = format!("{} {dtype:?} {heads:?} {block_size} {form:?}", ops.isa());
                        assert_close(got, want, tolerance, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_however_its_prompt_is_cut() {
    for (heads, bs) in [(heads(6, 2, 64), 16), (heads(4, 1, 80), 5), (heads(2, 2, 16), 24)] {
        for form in forms(heads).into_iter().filter(|form| form.causal) {
            for dtype in DTYPES {
                let s = setup(heads, bs, dtype, &[97, 41, 64], form);
                for threads in [1, 2] {
                    for ops in devices(Compute::F32, threads) {
                        let want = run(&ops, &s, &whole(&s));
                        let single: Vec<_> = (0..3)
                            .flat_map(|i| (0..s.sequences[i].len).map(move |p| vec![(i, p, p + 1)]))
                            .collect();
                        let chunks = vec![
                            vec![(0, 0, 31), (1, 0, 7)],
                            vec![(2, 0, 64), (0, 31, 48), (1, 7, 8)],
                            vec![(0, 48, 49)],
                            vec![(1, 8, 41), (0, 49, 97)],
                        ];
                        for (name, steps) in [("single tokens", single), ("chunks", chunks)] {
                            for (got, want) in run(&ops, &s, &steps).iter().zip(&want) {
                                let what = format!("{} {heads:?} {dtype:?} {name} {form:?}", ops.isa());
                                assert_same(got, want, &what);
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_sequence_that_sees_itself_whole_has_the_same_bits_alone_and_on_any_number_of_threads() {
    for window in [None, Some(9)] {
        let heads = heads(6, 2, 64);
        let s = setup(
            heads,
            16,
            DType::Bf16,
            &[97, 41, 64],
            Form { causal: false, window, ..Form::plain(heads) },
        );
        for (one, two) in devices(Compute::F32, 1).iter().zip(devices(Compute::F32, 2)) {
            let together = run(one, &s, &whole(&s));
            let alone: Vec<_> = whole(&s)[0].iter().rev().map(|part| vec![*part]).collect();
            for (a, b) in run(&two, &s, &alone).iter().zip(&together) {
                assert_same(a, b, one.isa().name());
            }
        }
    }
}

#[test]
fn other_layers_stay_untouched() {
    let heads = heads(2, 1, 8);
    let s = setup(heads, 4, DType::F32, &[9], Form::plain(heads));
    for ops in devices(Compute::F32, 1) {
        let mut kv = cache(&ops, s.shape);
        let meta = step(&[&s.sequences[0].blocks], 4, &[(0, 0, 9)]);
        let batch = ops.upload(meta, Arc::default()).unwrap();
        let mut qkv = buffer(&ops, &s.sequences[0].qkv);
        ops.rope_kv_write(&mut qkv, &mut kv, s.transform(), &batch, s.heads, 1).unwrap();
        for storage in kv.storage_mut() {
            let half = storage.len() / 2;
            assert!(storage[..half].iter().all(|&b| b == 0xff));
            assert!(storage[half..].iter().any(|&b| b != 0xff));
        }
    }
}

#[test]
fn caches_that_cannot_be_are_refused() {
    let ops = &devices(Compute::F32, 1)[0];
    let heads = heads(2, 2, 8);
    let shape = setup(heads, 4, DType::F32, &[9], Form::plain(heads)).shape;
    let refused = |shape| assert!(matches!(ops.kv_cache(shape), Err(KernelError::Unsupported { .. })));
    refused(KvShape { head_dim: 7, value_dim: 7, ..shape });
    refused(KvShape { value_dim: 4, ..shape });
    // Only one key can be the value of all heads.
    refused(KvShape { value_dim: 0, ..shape });
    refused(KvShape { dtype: DType::F16, ..shape });
}
