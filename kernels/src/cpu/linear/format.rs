//! How one step along K of a weight row meets one step of a packed activation.

use std::marker::PhantomData;

use super::super::simd::Simd;

/// K is padded to a multiple of this in packed activations: every format's step divides it.
pub(super) const K_ALIGN: usize = 32;

/// One pairing of weight storage, activation storage and instruction.
///
/// # Safety
/// of the loads: the pointer is valid for `STEP` elements (`tail`: for the `n < STEP` given), in any alignment.
pub(super) trait Format: Copy {
    type Acc: Copy;
    type W: Copy;
    type X: Copy;
    /// Elements of K in a step.
    const STEP: usize;
    /// Bytes of a weight element.
    const W_SIZE: usize;
    /// Bytes of a packed activation element.
    const X_SIZE: usize;
    /// Tokens whose sums are held in registers at a time; with four rows each, all registers are used.
    const MAX_TOKENS: usize;

    fn zero(self) -> Self::Acc;
    fn dot(self, acc: Self::Acc, w: Self::W, x: Self::X) -> Self::Acc;
    fn sum4(self, acc: [Self::Acc; 4]) -> [f32; 4];
    unsafe fn load_w(self, p: *const u8) -> Self::W;
    /// Elements from `n` on read as 0.
    unsafe fn load_w_tail(self, p: *const u8, n: usize) -> Self::W;
    unsafe fn load_x(self, p: *const u8) -> Self::X;
    /// Packs `k` activations from `x` to `out`, which has room for `k` rounded up to [`K_ALIGN`]; the rest becomes 0.
    unsafe fn pack(self, x: *const f32, k: usize, out: *mut u8, round: bool);
}

/// Weight elements that are widened to f32 in registers.
pub(super) trait Element: Copy {
    const SIZE: usize;
    /// Whether [`Element::load2`] gives even and odd elements instead of a first and a second half.
    const INTERLEAVED: bool;
    /// `2 * LANES` elements.
    unsafe fn load2<S: Simd>(s: S, p: *const u8) -> [S::F; 2];
}

/// bf16 weights: one load gives the odd elements by a mask and the even ones by a shift.
#[derive(Clone, Copy)]
pub(super) struct Bf16;
/// f16 weights.
#[derive(Clone, Copy)]
pub(super) struct F16;
/// f32 weights.
#[derive(Clone, Copy)]
pub(super) struct F32;

impl Element for Bf16 {
    const SIZE: usize = 2;
    const INTERLEAVED: bool = true;
    #[inline(always)]
    unsafe fn load2<S: Simd>(s: S, p: *const u8) -> [S::F; 2] {
        // SAFETY: the caller's pointer is valid for 2 * LANES elements.
        unsafe { s.load_bf16_pair(p) }
    }
}

impl Element for F16 {
    const SIZE: usize = 2;
    const INTERLEAVED: bool = false;
    #[inline(always)]
    unsafe fn load2<S: Simd>(s: S, p: *const u8) -> [S::F; 2] {
        // SAFETY: as above.
        unsafe { [s.load_f16(p), s.load_f16(p.add(2 * S::LANES))] }
    }
}

impl Element for F32 {
    const SIZE: usize = 4;
    const INTERLEAVED: bool = false;
    #[inline(always)]
    unsafe fn load2<S: Simd>(s: S, p: *const u8) -> [S::F; 2] {
        // SAFETY: as above.
        unsafe { [s.load(p.cast()), s.load(p.add(4 * S::LANES).cast())] }
    }
}

/// f32 multiply-add over widened weights.
#[derive(Clone, Copy)]
pub(super) struct Wide<S, E>(S, PhantomData<E>);

impl<S, E> Wide<S, E> {
    #[inline(always)]
    pub(super) fn new(s: S) -> Self {
        Wide(s, PhantomData)
    }
}

impl<S: Simd, E: Element> Format for Wide<S, E> {
    type Acc = S::F;
    type W = [S::F; 2];
    type X = [S::F; 2];
    const STEP: usize = 2 * S::LANES;
    const W_SIZE: usize = E::SIZE;
    const X_SIZE: usize = 4;
    const MAX_TOKENS: usize = S::QUERIES;

    #[inline(always)]
    fn zero(self) -> S::F {
        self.0.splat(0.0)
    }
    #[inline(always)]
    fn dot(self, acc: S::F, w: [S::F; 2], x: [S::F; 2]) -> S::F {
        self.0.fma(w[1], x[1], self.0.fma(w[0], x[0], acc))
    }
    #[inline(always)]
    fn sum4(self, acc: [S::F; 4]) -> [f32; 4] {
        self.0.sum4(acc)
    }
    #[inline(always)]
    unsafe fn load_w(self, p: *const u8) -> [S::F; 2] {
        // SAFETY: the caller's pointer is valid for a step.
        unsafe { E::load2(self.0, p) }
    }
    #[inline(always)]
    unsafe fn load_w_tail(self, p: *const u8, n: usize) -> [S::F; 2] {
        let mut step = [0_u8; 4 * K_ALIGN];
        // SAFETY: the caller's pointer is valid for n elements; the array has room for a step of any format.
        unsafe {
            std::ptr::copy_nonoverlapping(p, step.as_mut_ptr(), n * E::SIZE);
            E::load2(self.0, step.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn load_x(self, p: *const u8) -> [S::F; 2] {
        // SAFETY: the caller's pointer is valid for a step of f32.
        unsafe { [self.0.load(p.cast()), self.0.load(p.add(4 * S::LANES).cast())] }
    }
    #[inline(always)]
    unsafe fn pack(self, x: *const f32, k: usize, out: *mut u8, round: bool) {
        let (s, lanes) = (self.0, S::LANES);
        let out = out.cast::<f32>();
        let mut at = 0;
        while at < k.next_multiple_of(K_ALIGN) {
            let mut step = [0.0_f32; K_ALIGN];
            let n = k.saturating_sub(at).min(Self::STEP);
            // SAFETY: n elements of x are left from `at`; `step` holds STEP of them; `out` has room up to the padded k.
            unsafe {
                std::ptr::copy_nonoverlapping(x.add(at), step.as_mut_ptr(), n);
                if E::INTERLEAVED {
                    let from = step;
                    for i in 0..lanes {
                        step[i] = from[2 * i];
                        step[lanes + i] = from[2 * i + 1];
                    }
                }
                for half in 0..2 {
                    let v = s.load(step.as_ptr().add(half * lanes));
                    s.store(out.add(at + half * lanes), if round { s.round_bf16(v) } else { v });
                }
            }
            at += Self::STEP;
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use bf16_dot::Bf16Dot;

#[cfg(target_arch = "x86_64")]
mod bf16_dot {
    use std::arch::x86_64::*;

    use super::{Format, K_ALIGN};
    use crate::cpu::simd::{Avx512, Simd};

    /// `vdpbf16ps`: bf16 pairs of weights and activations, f32 sums. The proof that this CPU has it.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Bf16Dot(Avx512);

    impl Bf16Dot {
        /// # Safety
        /// The CPU has AVX-512 F, BW, DQ, VL and BF16.
        #[inline(always)]
        pub(in super::super) unsafe fn new() -> Self {
            // SAFETY: by the caller's word.
            Bf16Dot(unsafe { Avx512::new() })
        }
    }

    /// An intrinsic of this set.
    macro_rules! op {
        ($e:expr) => {
            // SAFETY: `self` exists, so the CPU has the instruction; a pointer is the caller's, valid for what this intrinsic touches.
            unsafe { $e }
        };
    }

    impl Format for Bf16Dot {
        type Acc = __m512;
        type W = __m512i;
        type X = __m512i;
        const STEP: usize = 32;
        const W_SIZE: usize = 2;
        const X_SIZE: usize = 2;
        const MAX_TOKENS: usize = 6;

        #[inline(always)]
        fn zero(self) -> __m512 {
            self.0.splat(0.0)
        }
        #[inline(always)]
        fn dot(self, acc: __m512, w: __m512i, x: __m512i) -> __m512 {
            // SAFETY: `self` exists, so the CPU has the instruction; `__m512bh` is another name for the same 512 bits.
            unsafe {
                _mm512_dpbf16_ps(
                    acc,
                    std::mem::transmute::<__m512i, __m512bh>(w),
                    std::mem::transmute::<__m512i, __m512bh>(x),
                )
            }
        }
        #[inline(always)]
        fn sum4(self, acc: [__m512; 4]) -> [f32; 4] {
            self.0.sum4(acc)
        }
        #[inline(always)]
        unsafe fn load_w(self, p: *const u8) -> __m512i {
            op!(_mm512_loadu_si512(p.cast()))
        }
        #[inline(always)]
        unsafe fn load_w_tail(self, p: *const u8, n: usize) -> __m512i {
            op!(_mm512_maskz_loadu_epi16(((1_u64 << n) - 1) as __mmask32, p.cast()))
        }
        #[inline(always)]
        unsafe fn load_x(self, p: *const u8) -> __m512i {
            op!(_mm512_loadu_si512(p.cast()))
        }
        #[inline(always)]
        unsafe fn pack(self, x: *const f32, k: usize, out: *mut u8, _round: bool) {
            let mut at = 0;
            while at < k.next_multiple_of(K_ALIGN) {
                let n = k.saturating_sub(at).min(32);
                op!({
                    let lo = self.0.load_first(x.add(at), n.min(16));
                    let hi = self.0.load_first(x.add(at + n.min(16)), n - n.min(16));
                    self.0.store(out.add(2 * at).cast(), self.0.pack_bf16([lo, hi]));
                });
                at += 32;
            }
        }
    }
}
