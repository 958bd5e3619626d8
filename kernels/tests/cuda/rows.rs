//! `embedding.cu`, `gather_rows.cu` and `add.cu`: rows that are copied or added.

use tidemill_kernels::{
    KernelError,
    cuda::{
        Device,
        ops::{
            AddGated, Embedding, EmbeddingAdd, GatherRows, PADDING_INDEX, add, add_gated, embedding,
            embedding_add, gather_rows,
        },
        words::DeviceWords,
    },
    ops::FEEDBACK,
};

use crate::{
    common::{Rng, assert_same},
    harness::{assert_near, bf16s, f32s, poisoned, rounded, values},
    words::{device, on_every_schedule, upload},
};

#[test]
fn embedding_copies_rows_and_takes_ids_from_the_host_or_from_the_device() {
    on_every_schedule(|device, driver| {
        for (vocab, width) in [(3, 8), (11, 104), (5, 4104)] {
            let table = rounded(&Rng::new(width as u64).units(vocab * width));
            let ids = [2, 0, FEEDBACK | 1, 1, FEEDBACK];
            let feedback = [1, 2];
            let want: Vec<f32> =
                [2_usize, 0, 2, 1, 1].iter().flat_map(|&id| table[id * width..][..width].to_vec()).collect();
            let (ids, feedback) = (upload(driver, &ids), upload(driver, &feedback));
            for scale in [1.0, 12.5_f32] {
                let mut out = poisoned(device, 5 * width);
                let call = Embedding {
                    out: &mut out,
                    table: &bf16s(device, &table),
                    token_ids: DeviceWords::new(&ids),
                    feedback: Some(DeviceWords::new(&feedback)),
                    width,
                    scale,
                    tokens: 5,
                };
                embedding(device, call).unwrap();
                let want: Vec<f32> = want.iter().map(|x| x * scale).collect();
                assert_same(&values(device, &out), &rounded(&want), "embedding");
            }
        }
    });
}

#[test]
fn positions_and_segments_are_added_to_what_is_there() {
    on_every_schedule(|device, driver| {
        for (width, first) in [(8, 0), (104, 2), (4104, 1)] {
            let table = rounded(&Rng::new(width as u64).units(7 * width));
            let old = rounded(&Rng::new(1).units(4 * width));
            let rows = upload(driver, &[3, 0, 4, 3]);
            let mut out = bf16s(device, &old);
            let call = EmbeddingAdd {
                out: &mut out,
                table: &bf16s(device, &table),
                rows: DeviceWords::new(&rows),
                first,
                width,
                tokens: 4,
            };
            embedding_add(device, call).unwrap();
            let added = [3, 0, 4, 3].into_iter().flat_map(|row| &table[(row + first) * width..][..width]);
            let want: Vec<f32> = old.iter().zip(added).map(|(old, row)| old + row).collect();
            assert_same(&values(device, &out), &rounded(&want), "embedding_add");
        }
    });
}

#[test]
fn sums_stop_where_they_are_told_and_gates_scale_their_rows() {
    on_every_schedule(|device, _| {
        for (rows, width) in [(1, 8), (3, 72), (2, 4104)] {
            let mut rng = Rng::new(width as u64);
            let elems = rows * width;
            let (old, x) = (rounded(&rng.units(elems)), rounded(&rng.units(elems)));
            let mut out = bf16s(device, &old);
            add(device, &mut out, &bf16s(device, &x), elems - 8).unwrap();
            let mut want: Vec<f32> = old.iter().zip(&x).map(|(old, x)| old + x).collect();
            want[elems - 8..].copy_from_slice(&old[elems - 8..]);
            assert_same(&values(device, &out), &rounded(&want), "add");

            let gate: Vec<f32> = rng.units(rows).iter().map(|g| 4.0 * g).collect();
            let run = |rows: usize| {
                let mut out = bf16s(device, &old);
                let (x, gate) = (&bf16s(device, &x), &f32s(device, &gate));
                add_gated(device, AddGated { out: &mut out, x, gate, rows, width }).unwrap();
                values(device, &out)
            };
            let want: Vec<f64> = (0..elems)
                .map(|i| f64::from(old[i]) + f64::from(x[i]) / (1.0 + f64::from(-gate[i / width]).exp()))
                .collect();
            let all = run(rows);
            assert_near(&all, &want, 0.004, 1e-6, "add_gated");
            let one = run(1);
            assert_same(&one[..width], &all[..width], "first row alone");
            assert_same(&one[width..], &old[width..], "the other rows");
        }
    });
}

#[test]
fn gather_takes_rows_in_order_and_writes_zeros_for_padding() {
    on_every_schedule(|device, driver| {
        for width in [8, 72, 2056] {
            let x = rounded(&Rng::new(3).units(7 * width));
            let indices = upload(driver, &[6, 0, PADDING_INDEX, 6, 3]);
            let mut out = poisoned(device, 5 * width);
            let call = GatherRows {
                out: &mut out,
                x: &bf16s(device, &x),
                logits_indices: DeviceWords::new(&indices),
                width,
                rows: 5,
            };
            gather_rows(device, call).unwrap();
            let mut want: Vec<f32> =
                [6, 0, 0, 6, 3].iter().flat_map(|&i| x[i * width..][..width].to_vec()).collect();
            want[2 * width..3 * width].fill(0.0);
            assert_same(&values(device, &out), &want, "gather");
        }
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    let (device, driver) = device();
    let three = upload(&driver, &[0, 1, 0]);
    let embed = |device: &Device, table: usize, width: usize, tokens: usize| {
        let mut out = poisoned(device, 32);
        let table = bf16s(device, &vec![0.0; table]);
        let token_ids = DeviceWords::new(&three);
        embedding(
            device,
            Embedding { out: &mut out, table: &table, token_ids, feedback: None, width, scale: 1.0, tokens },
        )
    };
    assert!(embed(&device, 16, 8, 3).is_ok());
    assert!(matches!(embed(&device, 16, 4, 3), Err(KernelError::Unsupported { op: "embedding", .. })));
    assert!(matches!(embed(&device, 12, 8, 3), Err(KernelError::Unsupported { op: "embedding", .. })));
    assert!(matches!(embed(&device, 16, 16, 3), Err(KernelError::Shape { op: "embedding", .. })));
    assert!(matches!(embed(&device, 16, 8, 4), Err(KernelError::Shape { op: "embedding", .. })));

    let gather = |width: usize, rows: usize| {
        let (mut out, x) = (poisoned(&device, 32), poisoned(&device, 16));
        let logits_indices = DeviceWords::new(&three);
        gather_rows(&device, GatherRows { out: &mut out, x: &x, logits_indices, width, rows })
    };
    assert!(gather(8, 3).is_ok());
    assert!(matches!(gather(12, 1), Err(KernelError::Unsupported { op: "gather_rows", .. })));
    assert!(matches!(gather(8, 4), Err(KernelError::Shape { op: "gather_rows", .. })));
    assert!(matches!(gather(24, 1), Err(KernelError::Shape { op: "gather_rows", .. })));

    let embed_add = |first: usize, tokens: usize| {
        let (mut out, table, rows) = (poisoned(&device, 32), poisoned(&device, 16), DeviceWords::new(&three));
        embedding_add(&device, EmbeddingAdd { out: &mut out, table: &table, rows, first, width: 8, tokens })
    };
    assert!(embed_add(0, 3).is_ok());
    assert!(matches!(embed_add(2, 1), Err(KernelError::Shape { op: "embedding", .. })));
    assert!(matches!(embed_add(0, 4), Err(KernelError::Shape { op: "embedding", .. })));

    let sum = |elems: usize| add(&device, &mut poisoned(&device, 16), &poisoned(&device, 24), elems);
    assert!(sum(16).is_ok() && sum(0).is_ok());
    assert!(matches!(sum(12), Err(KernelError::Unsupported { op: "add", .. })));
    assert!(matches!(sum(24), Err(KernelError::Shape { op: "add", .. })));
    let gated = |width: usize, rows: usize| {
        let (mut out, x, gate) = (poisoned(&device, 64), poisoned(&device, 64), f32s(&device, &[0.0; 2]));
        add_gated(&device, AddGated { out: &mut out, x: &x, gate: &gate, rows, width })
    };
    assert!(gated(8, 2).is_ok());
    assert!(matches!(gated(12, 1), Err(KernelError::Unsupported { op: "add_gated", .. })));
    assert!(matches!(gated(8, 3), Err(KernelError::Shape { op: "add_gated", .. })));

    assert!(DeviceWords::new(&three).part(1, 2).is_ok());
    assert!(DeviceWords::new(&three).part(1, 3).is_err());
}
