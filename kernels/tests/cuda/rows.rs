//! `embedding.cu` and `gather_rows.cu`: rows that are copied.

use tidemill_kernels::{
    KernelError,
    cuda::{
        Device,
        ops::{Embedding, GatherRows, PADDING_INDEX, embedding, gather_rows},
        words::DeviceWords,
    },
    ops::FEEDBACK,
};

use crate::{
    common::{Rng, assert_same},
    harness::{bf16s, poisoned, rounded, values},
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

    assert!(DeviceWords::new(&three).part(1, 2).is_ok());
    assert!(DeviceWords::new(&three).part(1, 3).is_err());
}
