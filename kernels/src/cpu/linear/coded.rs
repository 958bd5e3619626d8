//! Products with quantised weights: a few rows at a time are decoded into memory that stays in the caches, and meet all tokens there.

use std::{cell::RefCell, ops::Range};

use super::{Kernel, dot::Panel};
use crate::cpu::decode::{Coded, DecodeF32, SLACK};
#[cfg(target_arch = "x86_64")]
use crate::cpu::{
    decode::{ToBf16, decode},
    simd::Avx512,
};

/// Bytes of a cache line.
const LINE: usize = 64;

/// Bytes of decoded rows: they stay in the first-level cache, beside the activations of few tokens.
const FEW_TOKENS_BYTES: usize = 16 << 10;

/// Bytes of decoded rows that many tokens meet: they stay in the second-level cache.
const MANY_TOKENS_BYTES: usize = 128 << 10;

/// Tokens from which on rows are used so often that decoding them hardly counts.
const MANY_TOKENS: usize = 8;

/// One line of a cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [u8; LINE]);

thread_local! {
    /// Decoded rows of the task at hand.
    static DECODED: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

impl Kernel {
    /// The product with rows `first..first + p.rows`; `p.w` is not looked at.
    ///
    /// # Safety
    /// The rows are there; otherwise see [`Panel`].
    pub(super) unsafe fn coded(self, coded: &Coded, first: usize, p: Panel) {
        // Decoded weights are as wide as the activations that they meet.
        let row_bytes = p.k * self.x_size();
        let budget = if p.tokens < MANY_TOKENS { FEW_TOKENS_BYTES } else { MANY_TOKENS_BYTES };
        let step = self.decode_step();
        let block = (budget / row_bytes.max(1) / step).max(1) * step;
        DECODED.with_borrow_mut(|decoded| {
            let bytes = block.min(p.rows) * row_bytes + SLACK * self.x_size();
            if decoded.len() * LINE < bytes {
                decoded.resize(bytes.div_ceil(LINE), Line([0; LINE]));
            }
            let w = decoded.as_mut_ptr().cast::<u8>();
            let mut at = 0;
            while at < p.rows {
                let rows = block.min(p.rows - at);
                // SAFETY: `first + p.rows` rows are there, and the memory holds `block` of them; outputs from row `at` on belong to the panel.
                unsafe {
                    self.decode(coded, first + at..first + at + rows, w);
                    let out = p.out.add(at);
                    let bias = p.bias.map(|bias| &bias[at..at + rows]);
                    self.panel(Panel { w, rows, out, bias, ..p });
                }
                at += rows;
            }
        });
    }

    /// Rows that the panel takes together.
    fn decode_step(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Kernel::Amx(_) => super::amx::ROWS,
            _ => 4,
        }
    }

    /// # Safety
    /// The rows are there, and `out` has room for them and [`SLACK`] elements.
    unsafe fn decode(self, coded: &Coded, rows: Range<usize>, out: *mut u8) {
        let (first, rows) = (rows.start, rows.len());
        match self {
            Kernel::Wide { host, .. } => host.run(DecodeF32 { coded, first, rows, out }),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: by the caller's word; the values prove the instructions.
            Kernel::Bf16Dot(_) | Kernel::Amx(_) => unsafe { decode_bf16(coded, first, rows, out) },
        }
    }
}

/// # Safety
/// As `Kernel::decode`, and the CPU has AVX-512 F, BW, DQ, VL and BF16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn decode_bf16(coded: &Coded, first: usize, rows: usize, out: *mut u8) {
    // SAFETY: by the caller's word.
    unsafe { decode(Avx512::new(), ToBf16::new(), coded, first, rows, out) }
}
