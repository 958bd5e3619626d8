//! Blocks of GGML as integers with scales and offsets: `ggml-common.h` defines them, `ggml-quants.c` what they mean.

use half::f16;

use crate::tensor::GgmlType;

/// The integers of a block, in order: 0 to 15 for formats of 4 bits, signed for others.
pub(super) fn integers(ty: GgmlType, block: &[u8], out: &mut [i8]) {
    match ty {
        GgmlType::Q4_0 => {
            let (low, high) = out.split_at_mut(16);
            for ((low, high), b) in low.iter_mut().zip(high).zip(&block[2..18]) {
                (*low, *high) = ((b & 15) as i8, (b >> 4) as i8);
            }
        }
        GgmlType::Q8_0 => out.iter_mut().zip(&block[2..34]).for_each(|(q, &b)| *q = b as i8),
        GgmlType::Q4_K => pairs_of_32(&block[16..144], out),
        GgmlType::Q5_K => {
            pairs_of_32(&block[48..176], out);
            let fifth = &block[16..48];
            for (i, q) in out.iter_mut().enumerate() {
                *q |= ((fifth[i % 32] >> (i / 32) & 1) << 4) as i8;
            }
        }
        // Half a block: 64 bytes with 4 bits of two weights each, 32 with 2 bits of four.
        GgmlType::Q6_K => {
            for (half, out) in out.chunks_exact_mut(128).enumerate() {
                let (low, high) = (&block[64 * half..][..64], &block[128 + 32 * half..][..32]);
                for (i, q) in out.iter_mut().enumerate() {
                    let four = low[i % 64] >> (i / 64 * 4) & 15;
                    let two = high[i % 32] >> (i / 32 * 2) & 3;
                    *q = (four | two << 4) as i8 - 32;
                }
            }
        }
    }
}

/// Groups of 32 weights, of which each two share 32 bytes.
fn pairs_of_32(bytes: &[u8], out: &mut [i8]) {
    for (out, bytes) in out.chunks_exact_mut(64).zip(bytes.chunks_exact(32)) {
        let (low, high) = out.split_at_mut(32);
        for ((low, high), b) in low.iter_mut().zip(high).zip(bytes) {
            (*low, *high) = ((b & 15) as i8, (b >> 4) as i8);
        }
    }
}

/// Scale and offset of the weight `i` of a block.
pub(super) fn affine(ty: GgmlType, block: &[u8], i: usize) -> [f32; 2] {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    match ty {
        GgmlType::Q4_0 => [half(0), -8.0 * half(0)],
        GgmlType::Q8_0 => [half(0), 0.0],
        GgmlType::Q4_K | GgmlType::Q5_K => {
            let [scale, minimum] = six_bits(&block[4..16], i / 32);
            [half(0) * f32::from(scale), -half(2) * f32::from(minimum)]
        }
        GgmlType::Q6_K => [half(208) * f32::from(block[192 + i / 16] as i8), 0.0],
    }
}

/// Scale and minimum of a group of eight: those of the last four have their upper 2 bits in the bytes of the first four.
fn six_bits(packed: &[u8], group: usize) -> [u8; 2] {
    match group {
        0..4 => [packed[group] & 63, packed[group + 4] & 63],
        _ => [
            packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
            packed[group + 4] >> 4 | packed[group] >> 6 << 4,
        ],
    }
}
