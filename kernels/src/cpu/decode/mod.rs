//! Quantised matrices: rows of them become f32 or bf16, a few at a time, in memory that stays in the caches.
//!
//! The bytes of a format are taken apart with plain loops over bytes, which compilers make vectors of, into signed integers; those are widened,
//! multiplied with their scale and stored as the product reads them.

mod ggml;
mod groups;

use bytes::Bytes;

use super::{
    isa::{Host, Job},
    simd::{Simd, prefetch},
};
use crate::{
    error::KernelError,
    ops::Result,
    tensor::{GgmlType, QuantFormat, QuantMatrix},
};

/// Elements that a decoder may write after a row.
pub(super) const SLACK: usize = 32;

/// A quantised matrix `[N, K]` whose extents were checked.
pub(crate) struct Coded {
    format: QuantFormat,
    k: usize,
    /// Bytes of a row of `data`.
    pub(super) row_bytes: usize,
    data: Bytes,
    /// f32, little-endian, as are the offsets.
    scales: Bytes,
    offsets: Bytes,
}

impl Coded {
    /// # Errors
    /// [`KernelError::Shape`] where data, scales or offsets have another length than the format says; [`KernelError::Unsupported`] for groups
    /// that are neither whole rows nor multiples of 16 columns.
    pub(super) fn new(matrix: &QuantMatrix) -> Result<Coded> {
        let QuantMatrix { name, shape: [n, k], format, data, scales, offsets } = matrix;
        let (n, k) = (*n, *k);
        let refuse = |detail: &str| {
            let detail = format!("{name} [{n}, {k}] is {format:?}: {detail}");
            Err(KernelError::Unsupported { op: "weight", detail })
        };
        let odd_group = |columns: usize| columns == 0 || !(columns.is_multiple_of(16) || columns >= k);
        let (row_bytes, expected) = match *format {
            QuantFormat::Fp8 { rows, columns } if rows == 0 || odd_group(columns) => {
                return refuse("a block has rows, and columns in multiples of 16 or all");
            }
            QuantFormat::Int4 { group } | QuantFormat::Int8 { group } if odd_group(group) => {
                return refuse("a group has columns in multiples of 16, or all");
            }
            QuantFormat::Int4 { .. } if !k.is_multiple_of(2) => return refuse("the width is odd"),
            QuantFormat::Mxfp4 if !k.is_multiple_of(32) => {
                return refuse("the width is no multiple of 32");
            }
            QuantFormat::Ggml(ty) if !k.is_multiple_of(ty.block()) => {
                return refuse("the width is no multiple of a block");
            }
            QuantFormat::Fp8 { rows, columns } => {
                (k, Some(n.div_ceil(rows).saturating_mul(k.div_ceil(columns))))
            }
            QuantFormat::Int4 { group } => (k / 2, Some(n.saturating_mul(k.div_ceil(group)))),
            QuantFormat::Int8 { group } => (k, Some(n.saturating_mul(k.div_ceil(group)))),
            QuantFormat::Mxfp4 => (k / 32 * 17, None),
            QuantFormat::Ggml(ty) => (k / ty.block() * ty.block_bytes(), None),
        };
        let lengths = [data.len(), scales.len(), offsets.len()];
        let floats = expected.unwrap_or(0).saturating_mul(4);
        let may_offset = matches!(format, QuantFormat::Int4 { .. } | QuantFormat::Int8 { .. });
        let wanted =
            [n.saturating_mul(row_bytes), floats, if may_offset && !offsets.is_empty() { floats } else { 0 }];
        if lengths != wanted {
            let what = format!("{name}: bytes of data, scales and offsets");
            return Err(KernelError::Shape {
                op: "weight",
                what,
                got: lengths.into(),
                expected: wanted.into(),
            });
        }
        let (data, scales, offsets) = (data.clone(), scales.clone(), offsets.clone());
        Ok(Coded { format: *format, k, row_bytes, data, scales, offsets })
    }

    /// Decodes row `n` to f32.
    pub(super) fn row_to_f32(&self, host: Host, n: usize) -> Vec<f32> {
        let mut row = vec![0.0_f32; self.k + SLACK];
        // The vector has room for the row and what may be written behind it.
        host.run(DecodeF32 { coded: self, first: n, rows: 1, out: row.as_mut_ptr().cast() });
        row.truncate(self.k);
        row
    }

    fn scale(&self, i: usize) -> f32 {
        float(&self.scales, i)
    }

    fn offset(&self, i: usize) -> f32 {
        if self.offsets.is_empty() { 0.0 } else { float(&self.offsets, i) }
    }
}

fn float(bytes: &[u8], i: usize) -> f32 {
    let at = &bytes[4 * i..4 * i + 4];
    f32::from_le_bytes([at[0], at[1], at[2], at[3]])
}

/// What decoded weights are stored as.
///
/// # Safety
/// of `put`: `out` has room for `LANES` elements.
pub(super) trait Sink<S: Simd>: Copy {
    /// Bytes of an element.
    const SIZE: usize;
    unsafe fn put(self, s: S, out: *mut u8, v: S::F);
}

/// f32.
#[derive(Clone, Copy)]
pub(super) struct ToF32;

impl<S: Simd> Sink<S> for ToF32 {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn put(self, s: S, out: *mut u8, v: S::F) {
        // SAFETY: by the caller's word.
        unsafe { s.store(out.cast(), v) }
    }
}

/// bf16, rounded to the nearest even.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct ToBf16(());

#[cfg(target_arch = "x86_64")]
impl ToBf16 {
    /// # Safety
    /// The CPU has AVX-512-BF16.
    pub(super) unsafe fn new() -> ToBf16 {
        ToBf16(())
    }
}

#[cfg(target_arch = "x86_64")]
impl Sink<super::simd::Avx512> for ToBf16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn put(self, _: super::simd::Avx512, out: *mut u8, v: std::arch::x86_64::__m512) {
        use std::arch::x86_64::{__m256bh, __m256i, _mm256_storeu_si256, _mm512_cvtneps_pbh};
        // SAFETY: `self` exists, so the CPU has the instruction; `__m256bh` is another name for the same 256 bits; there is room for them by
        // the caller's word.
        unsafe {
            let bits = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v));
            _mm256_storeu_si256(out.cast(), bits);
        }
    }
}

/// Decodes `rows` rows from `first` on to f32, one after the other.
///
/// # Safety
/// of running it: the rows are there, and `out` has room for them and [`SLACK`] elements.
pub(super) struct DecodeF32<'a> {
    pub(super) coded: &'a Coded,
    pub(super) first: usize,
    pub(super) rows: usize,
    pub(super) out: *mut u8,
}

impl Job for DecodeF32<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let DecodeF32 { coded, first, rows, out } = self;
        // SAFETY: by the word of whoever runs this.
        unsafe { decode(s, ToF32, coded, first, rows, out) }
    }
}

/// Bytes that the stream of weights is asked for ahead of its use.
const AHEAD: usize = 4096;

/// Decodes `rows` rows from `first` on, one after the other.
///
/// # Safety
/// The rows are there, and `out` has room for them and [`SLACK`] elements.
#[inline(always)]
pub(super) unsafe fn decode<S: Simd, T: Sink<S>>(
    s: S,
    sink: T,
    m: &Coded,
    first: usize,
    rows: usize,
    out: *mut u8,
) {
    for i in 0..rows {
        let at = (first + i) * m.row_bytes;
        let data = &m.data[at..at + m.row_bytes];
        for line in (0..m.row_bytes).step_by(64) {
            prefetch(data.as_ptr().wrapping_add(line + AHEAD));
        }
        let row = Row { m, n: first + i, data };
        // SAFETY: room for this row and what may be written behind it, which the next row overwrites.
        unsafe {
            let out = out.add(i * m.k * T::SIZE);
            match m.format {
                QuantFormat::Fp8 { .. } => groups::fp8(s, sink, row, out),
                QuantFormat::Int4 { group } => groups::int4(s, sink, row, group, out),
                QuantFormat::Int8 { group } => groups::int8(s, sink, row, group, out),
                QuantFormat::Mxfp4 => groups::mxfp4(s, sink, row, out),
                QuantFormat::Ggml(GgmlType::Q4_0) => ggml::q4_0(s, sink, row, out),
                QuantFormat::Ggml(GgmlType::Q8_0) => ggml::q8_0(s, sink, row, out),
                QuantFormat::Ggml(GgmlType::Q4_K) => ggml::q4_k(s, sink, row, out),
                QuantFormat::Ggml(GgmlType::Q5_K) => ggml::q5_k(s, sink, row, out),
                QuantFormat::Ggml(GgmlType::Q6_K) => ggml::q6_k(s, sink, row, out),
            }
        }
    }
}

/// A row to be decoded.
#[derive(Clone, Copy)]
struct Row<'a> {
    m: &'a Coded,
    n: usize,
    data: &'a [u8],
}

/// `out[i] = q[i] * scale + offset` for `i < n`, rounded up to whole vectors.
///
/// # Safety
/// `q` and `out` have room for `n`, rounded up to whole vectors.
#[inline(always)]
unsafe fn widen<S: Simd, T: Sink<S>>(
    s: S,
    sink: T,
    q: *const i8,
    n: usize,
    [scale, offset]: [f32; 2],
    out: *mut u8,
) {
    let (scale, offset) = (s.splat(scale), s.splat(offset));
    let mut i = 0;
    while i < n {
        // SAFETY: by the caller's word.
        unsafe { sink.put(s, out.add(i * T::SIZE), s.fma(s.load_i8(q.add(i)), scale, offset)) };
        i += S::LANES;
    }
}
