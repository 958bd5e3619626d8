//! `probe.cu`: a probe that skips a word would report a bandwidth that the machine does not have.

use tidemill_kernels::{
    KernelError,
    cuda::ops::{probe_copy_bandwidth, probe_read_bandwidth, probe_sums},
};

use crate::{
    common::{Rng, assert_same},
    harness::{f32s, on_every_schedule, values},
};

fn bits(values: &[f32]) -> u32 {
    values.iter().fold(0, |sum, v| sum ^ v.to_bits())
}

#[test]
fn every_word_is_read_once_and_copied() {
    on_every_schedule(|device| {
        // One word; parts of a tile; a tile less one, exactly and more one; more tiles than blocks.
        for words in [1, 5, 1023, 1024, 1025, 40_000] {
            let data = Rng::new(words as u64).units(4 * words);
            let source = f32s(device, &data);
            let mut sums = f32s(device, &vec![f32::NAN; probe_sums(device)]);
            probe_read_bandwidth(device, &mut sums, &source).unwrap();
            assert_eq!(bits(&values(device, &sums)), bits(&data), "{words} words");

            let mut copy = f32s(device, &vec![f32::NAN; 4 * words]);
            probe_copy_bandwidth(device, &mut copy, &source).unwrap();
            assert_same(&values(device, &copy), &data, "copy");
        }
    });
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    on_every_schedule(|device| {
        let (odd, mut small) = (f32s(device, &[0.0; 6]), f32s(device, &[0.0; 4]));
        let refused = probe_copy_bandwidth(device, &mut small, &odd);
        assert!(matches!(refused, Err(KernelError::Unsupported { op: "probe", .. })), "{refused:?}");
        let refused = probe_copy_bandwidth(device, &mut small, &f32s(device, &[0.0; 8]));
        assert!(matches!(refused, Err(KernelError::Shape { op: "probe", .. })), "{refused:?}");
        let refused = probe_read_bandwidth(device, &mut small, &f32s(device, &[0.0; 8]));
        assert!(matches!(refused, Err(KernelError::Shape { op: "probe", .. })), "{refused:?}");
    });
}
