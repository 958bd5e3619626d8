//! Matrix products with resident weights.
//!
//! Activations are packed once per call into the form in which the inner loop reads them; weights are read where they lie. One output is
//! always the same sum: its products in steps along K, each lane of the step's vector in an accumulator of its own, then the lanes in one fixed
//! tree. Tiles of tokens and rows only say how many of these sums run side by side, so they never show in the bits.

#[cfg(target_arch = "x86_64")]
mod amx;
mod coded;
mod dot;
mod format;

use std::sync::{Mutex, PoisonError};

use self::{
    dot::{Panel, panel},
    format::{Bf16, F16, F32, Format, K_ALIGN, Wide},
};
use super::{
    CpuWeight,
    activation::Function,
    buffer::Arena,
    isa::{Host, Isa, Job},
    pool::{Pool, Shared},
    simd::Simd,
    weight::{Form, Part, Storage},
};
use crate::{
    ops::{Epilogue, Result},
    tensor::DType,
};

#[cfg(target_arch = "x86_64")]
pub(super) use self::amx::works as amx_works;

/// Precision in which activations meet bf16 and quantised weights. Sums are f32 always; f16 and f32 weights always meet f32 activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Compute {
    /// Activations stay f32.
    F32,
    /// Activations are rounded to bf16 (nearest even): the precision of the checkpoint, and twice the speed or more.
    #[default]
    Bf16,
}

/// What the products of one device share: how to compute, and memory for packed activations.
pub(crate) struct Linear {
    host: Host,
    compute: Compute,
    packed: Mutex<Arena>,
}

/// The arguments of one call.
pub(crate) struct Call<'a> {
    pub(crate) out: &'a mut [f32],
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a CpuWeight,
    pub(crate) rows: usize,
    pub(crate) epilogue: Epilogue,
}

/// Weight bytes that a task reads at least: some microseconds of memory bandwidth.
const TASK_BYTES: usize = 48 << 10;

impl Linear {
    pub(crate) fn new(host: Host, compute: Compute) -> Result<Linear> {
        Ok(Linear { host, compute, packed: Mutex::new(Arena::new("packed activations", 0)?) })
    }

    /// `Ops::linear`.
    pub(crate) fn run(&self, pool: &Pool, call: Call) -> Result<()> {
        let Call { out, x, weight, rows, epilogue } = call;
        let function = Function::of(epilogue)?;
        if rows == 0 || weight.n == 0 {
            return Ok(());
        }
        let x = &x[..rows * weight.k];
        let shared = Shared::new(&mut out[..rows * weight.n]);
        let mut packed = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        for parts in weight.parts.chunk_by(|a, b| a.form() == b.form()) {
            let kernel = Kernel::choose(self.host, self.compute, parts[0].form());
            let x_stride = weight.k.next_multiple_of(K_ALIGN) * kernel.x_size();
            if packed.bytes() < rows * x_stride {
                *packed = Arena::new("packed activations", (rows * x_stride).next_power_of_two())?;
            }
            pack(pool, kernel, x, weight.k, packed.as_mut_bytes(), x_stride);

            let packed: &[u8] = packed.as_mut_bytes();
            let chunks: Vec<usize> =
                parts.iter().map(|p| chunk_rows(pool, kernel, weight, p, rows)).collect();
            let tasks = parts.iter().zip(&chunks).map(|(p, chunk)| p.rows.div_ceil(*chunk)).sum();
            let n: usize = parts.iter().map(|p| p.rows).sum();
            // About 16 bytes of weights or 64 multiply-adds a nanosecond.
            let nanos = n * weight.k / 8 * (1 + rows / 8);
            pool.for_each(tasks, nanos, |mut task| {
                for (part, &chunk) in parts.iter().zip(&chunks) {
                    let here = part.rows.div_ceil(chunk);
                    if task >= here {
                        task -= here;
                        continue;
                    }
                    let first = task * chunk;
                    let n = chunk.min(part.rows - first);
                    let row = part.first + first;
                    let panel = Panel {
                        x: packed.as_ptr(),
                        x_stride,
                        tokens: rows,
                        w: std::ptr::null(),
                        rows: n,
                        k: weight.k,
                        // SAFETY: `row` is below N, so this is inside the first of the `rows * N` outputs.
                        out: unsafe { shared.at(row) },
                        out_stride: weight.n,
                        bias: weight.bias.as_ref().map(|b| &b[row..row + n]),
                        add: epilogue == Epilogue::Add,
                    };
                    // SAFETY: the packed rows hold `x_stride` bytes for each token; `first + n` rows of the part exist; columns
                    // `row..row + n` of the outputs are this task's own.
                    unsafe { kernel.part(part, first, panel) };
                    if let Some(function) = function {
                        for t in 0..rows {
                            // SAFETY: these columns are this task's own, and were just written.
                            function.apply(self.host, unsafe { shared.slice(t * weight.n + row, n) });
                        }
                    }
                    return;
                }
            });
        }
        Ok(())
    }
}

/// Weight rows per task: small enough that the threads end together, large enough that taking a task costs nothing.
fn chunk_rows(pool: &Pool, kernel: Kernel, weight: &CpuWeight, part: &Part, rows: usize) -> usize {
    let row_bytes = part.row_bytes(weight.k).max(1);
    let least = (TASK_BYTES / row_bytes / rows.min(8)).max(8);
    weight
        .n
        .div_ceil(pool.threads() * 8)
        .clamp(least, (256 << 10) / row_bytes + 8)
        .next_multiple_of(kernel.row_step())
}

/// Packs `[tokens, k]` activations, in parallel when there are many.
fn pack(pool: &Pool, kernel: Kernel, x: &[f32], k: usize, out: &mut [u8], stride: usize) {
    let tokens = x.len() / k.max(1);
    let chunk = (16_384 / k.max(1)).max(1).next_multiple_of(kernel.group());
    let shared = Shared::new(out);
    pool.for_each(tokens.div_ceil(chunk), x.len() / 8, |task| {
        let end = tokens.min((task + 1) * chunk);
        for t in (task * chunk..end).step_by(kernel.group()) {
            let x = &x[t * k..(t + kernel.group()).min(end) * k];
            // SAFETY: each of these tokens has `stride` bytes of room, which are this task's own.
            unsafe { kernel.pack(x, k, shared.at(t * stride)) };
        }
    });
}

/// The inner loops for one form of weights on one instruction set.
#[derive(Clone, Copy)]
enum Kernel {
    /// Widened weights times f32; activations are rounded to bf16 first where `round` says so.
    Wide { host: Host, dtype: DType, round: bool },
    /// bf16 pairs in vectors.
    #[cfg(target_arch = "x86_64")]
    Bf16Dot(format::Bf16Dot),
    /// bf16 pairs in tiles.
    #[cfg(target_arch = "x86_64")]
    Amx(amx::Amx),
}

impl Kernel {
    fn choose(host: Host, compute: Compute, form: Form) -> Kernel {
        let bf16 = matches!(form, Form::Dense(DType::Bf16) | Form::Coded) && compute == Compute::Bf16;
        #[cfg(target_arch = "x86_64")]
        match host.isa() {
            // SAFETY: the host was found to have working tiles.
            Isa::Amx if bf16 => return Kernel::Amx(unsafe { amx::Amx::new() }),
            // SAFETY: the host was found to have AVX-512-BF16.
            Isa::Avx512Bf16 if bf16 => return Kernel::Bf16Dot(unsafe { format::Bf16Dot::new() }),
            _ => {}
        }
        // Without instructions for bf16 there is no use in rounding decoded weights to it.
        let dtype = if let Form::Dense(dtype) = form { dtype } else { DType::F32 };
        Kernel::Wide { host, dtype, round: bf16 }
    }

    /// The product with rows `first..first + p.rows` of a part; `p.w` is not looked at.
    ///
    /// # Safety
    /// The rows are there; otherwise see [`Panel`].
    unsafe fn part(self, part: &Part, first: usize, p: Panel) {
        // SAFETY: by the caller's word.
        unsafe {
            match &part.storage {
                Storage::Dense(dtype, data) => {
                    self.panel(Panel { w: data[first * p.k * dtype.size()..].as_ptr(), ..p });
                }
                Storage::Coded(coded) => self.coded(coded, first, p),
            }
        }
    }

    /// Bytes of a packed activation.
    fn x_size(self) -> usize {
        match self {
            Kernel::Wide { .. } => 4,
            #[cfg(target_arch = "x86_64")]
            Kernel::Bf16Dot(_) | Kernel::Amx(_) => 2,
        }
    }

    /// Tokens that are packed together.
    fn group(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Kernel::Amx(_) => amx::GROUP,
            _ => 1,
        }
    }

    /// Weight rows that tasks should be multiples of.
    fn row_step(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Kernel::Amx(_) => amx::ROWS,
            _ => 8,
        }
    }

    /// Packs up to `group` tokens.
    ///
    /// # Safety
    /// `out` has room for `k`, rounded up to [`K_ALIGN`], times `x_size` bytes for each.
    unsafe fn pack(self, x: &[f32], k: usize, out: *mut u8) {
        match self {
            Kernel::Wide { host, dtype, round } => host.run(PackRow { dtype, round, x: x.as_ptr(), k, out }),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: by the caller's word; the value proves the instructions.
            Kernel::Bf16Dot(dot) => unsafe { pack_bf16_dot(dot, x.as_ptr(), k, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Kernel::Amx(amx) => unsafe { amx.pack(x, k, out) },
        }
    }

    /// # Safety
    /// See [`Panel`].
    unsafe fn panel(self, p: Panel) {
        match self {
            Kernel::Wide { host, dtype, .. } => host.run(WidePanel { dtype, p }),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: by the caller's word; the value proves the instructions.
            Kernel::Bf16Dot(dot) => unsafe { panel_bf16_dot(dot, p) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Kernel::Amx(amx) => unsafe { amx.panel(p) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn pack_bf16_dot(dot: format::Bf16Dot, x: *const f32, k: usize, out: *mut u8) {
    // SAFETY: by the caller's word.
    unsafe { dot.pack(x, k, out, false) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn panel_bf16_dot(dot: format::Bf16Dot, p: Panel) {
    // SAFETY: by the caller's word.
    unsafe { panel(dot, p) }
}

struct PackRow {
    dtype: DType,
    round: bool,
    x: *const f32,
    k: usize,
    out: *mut u8,
}

impl Job for PackRow {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let PackRow { dtype, round, x, k, out } = self;
        // SAFETY: `Kernel::pack` has the caller's word for the pointers.
        unsafe {
            match dtype {
                DType::Bf16 => Wide::<S, Bf16>::new(s).pack(x, k, out, round),
                _ => Wide::<S, F32>::new(s).pack(x, k, out, round),
            }
        }
    }
}

struct WidePanel<'a> {
    dtype: DType,
    p: Panel<'a>,
}

impl Job for WidePanel<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: `Kernel::panel` has the caller's word for the pointers.
        unsafe {
            match self.dtype {
                DType::Bf16 => panel(Wide::<S, Bf16>::new(s), self.p),
                DType::F16 => panel(Wide::<S, F16>::new(s), self.p),
                _ => panel(Wide::<S, F32>::new(s), self.p),
            }
        }
    }
}
