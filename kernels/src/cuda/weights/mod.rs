//! Weights on their way to the device: through two pinned buffers in turn, so that reading the file and copying overlap.
//!
//! Quantised ones stay quantised (`coded`). Parts of different formats are brought to one that holds them all without loss; or, where there is
//! none, to bf16.

mod coded;
mod ggml;

use half::{bf16, f16};
use rayon::prelude::*;

use self::coded::{Source, common};
use super::{
    Device,
    driver::{DevPtr, Pinned, Result},
    matrix::{CodedMatrix, Coding, Matrix},
    memory::{DeviceBuffer, Event, PinnedMemory},
};
use crate::{
    error::KernelError,
    tensor::{DType, ExpertParts, HostMatrix, HostTensor, f8_to_f32},
};

/// Bytes of one staging buffer: some milliseconds of PCIe.
const STAGING_BYTES: usize = 16 << 20;
/// Elements that one thread converts at a time.
const PIECE: usize = 64 << 10;

/// A matrix `[N, K]` with an optional bias `[N]` in f32.
pub struct CudaWeight {
    pub(super) matrix: Matrix,
    pub(super) bias: Option<DeviceBuffer>,
    pub(super) n: usize,
    pub(super) k: usize,
}

impl CudaWeight {
    /// The matrix as it is kept.
    pub fn matrix(&self) -> &Matrix {
        &self.matrix
    }
}

/// Matrices `[X, N, K]` with optional biases `[X, N]` in f32.
pub struct CudaExperts {
    pub(super) matrix: Matrix,
    pub(super) bias: Option<DeviceBuffer>,
    pub(super) count: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

impl CudaExperts {
    /// The matrices as they are kept.
    pub fn matrix(&self) -> &Matrix {
        &self.matrix
    }
}

/// Copies host tensors to a device.
pub struct Uploader {
    device: Device,
    staging: [Staging; 2],
    next: usize,
}

struct Staging {
    memory: PinnedMemory,
    copied: Event,
    in_flight: bool,
}

impl Uploader {
    /// Allocates what copies go through.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`].
    pub fn new(device: &Device) -> Result<Self> {
        let staging = || -> Result<Staging> {
            let memory = PinnedMemory::new(device.driver.clone(), STAGING_BYTES, Pinned::Upload)?;
            Ok(Staging { memory, copied: Event::new(device.driver.clone())?, in_flight: false })
        };
        Ok(Self { device: device.clone(), staging: [staging()?, staging()?], next: 0 })
    }

    /// [`crate::Ops::weight`]: quantised parts stay quantised.
    ///
    /// # Errors
    /// As there.
    pub fn weight(&mut self, parts: &[HostMatrix], bias: &[HostTensor]) -> Result<CudaWeight> {
        let stacks = [Stack::new("weight", parts, bias)?];
        self.one(&stacks, common_coding(&stacks))
    }

    /// [`crate::Ops::table`]: in bf16.
    ///
    /// # Errors
    /// As there.
    pub fn table(&mut self, matrix: &HostMatrix) -> Result<CudaWeight> {
        self.one(&[Stack::new("table", std::slice::from_ref(matrix), &[])?], None)
    }

    fn one(&mut self, stacks: &[Stack<'_>; 1], coding: Option<Coding>) -> Result<CudaWeight> {
        let Stack { rows: n, width: k, .. } = stacks[0];
        let (matrix, bias) = self.stacks(stacks, coding)?;
        Ok(CudaWeight { matrix, bias, n, k })
    }

    /// [`crate::Ops::experts`]: as [`Self::weight`].
    ///
    /// # Errors
    /// As there.
    pub fn experts(&mut self, experts: &[ExpertParts]) -> Result<CudaExperts> {
        const OP: &str = "experts";
        let stacks = experts.iter().map(|expert| Stack::new(OP, &expert.parts, &expert.bias));
        let stacks = stacks.collect::<Result<Vec<_>>>()?;
        let (n, k) = stacks.first().map_or((0, 0), |first| (first.rows, first.width));
        for stack in &stacks {
            let (got, expected) = (vec![stack.rows, stack.width], vec![n, k]);
            if got != expected || stack.bias.is_empty() != stacks[0].bias.is_empty() {
                return Err(KernelError::Shape { op: OP, what: stack.name(), got, expected });
            }
        }
        let (matrix, bias) = self.stacks(&stacks, common_coding(&stacks))?;
        Ok(CudaExperts { matrix, bias, count: stacks.len(), n, k })
    }

    /// The matrices of all stacks, one after the other, and their biases; all have one shape. Coded alike, or in bf16.
    fn stacks(
        &mut self,
        stacks: &[Stack<'_>],
        coding: Option<Coding>,
    ) -> Result<(Matrix, Option<DeviceBuffer>)> {
        let parts: Vec<&Part<'_>> = stacks.iter().flat_map(|stack| &stack.parts).collect();
        let rows = stacks.iter().map(|stack| stack.rows).sum();
        let width = stacks.first().map_or(0, |stack| stack.width);
        let matrix = match coding {
            Some(coding) => Matrix::Coded(self.coded(&parts, coding, [rows, width])?),
            None => Matrix::Bf16(self.widened(&parts, rows * width)?),
        };
        let bias: Vec<f32> =
            stacks.iter().flat_map(|stack| stack.bias).flat_map(HostTensor::to_f32).collect();
        let bias = if bias.is_empty() { None } else { Some(self.vector(&bias)?) };
        Ok((matrix, bias))
    }

    fn widened(&mut self, parts: &[&Part<'_>], elems: usize) -> Result<DeviceBuffer> {
        let matrix = self.device.buffer(DType::Bf16, elems, "weights")?;
        let mut at = matrix.ptr();
        for part in parts {
            let [rows, k] = part.shape();
            match part {
                Part::Dense(tensor) => self.copy(at, tensor)?,
                Part::Coded(source) => self.rows(at, [rows, 2 * k], |row, out| source.widen(row, out))?,
            }
            at = at.offset(rows * k * DType::Bf16.size());
        }
        Ok(matrix)
    }

    fn coded(&mut self, parts: &[&Part<'_>], coding: Coding, shape: [usize; 2]) -> Result<CodedMatrix> {
        let matrix = CodedMatrix::new(&self.device.driver, coding, shape)?;
        let (mut codes, mut scales) = (matrix.codes.ptr(), matrix.scales.ptr());
        let (code_bytes, scale_bytes) = (coding.code_bytes(shape[1]), coding.scale_bytes(shape[1]));
        for part in parts {
            let rows = part.shape()[0];
            if let Part::Coded(source) = part {
                self.rows(codes, [rows, code_bytes], |row, out| source.codes(row, coding, out))?;
                self.rows(scales, [rows, scale_bytes], |row, out| source.scales(row, coding, out))?;
            }
            (codes, scales) = (codes.offset(rows * code_bytes), scales.offset(rows * scale_bytes));
        }
        Ok(matrix)
    }

    /// Copies rows of so many bytes, which `fill` makes.
    fn rows(
        &mut self,
        dst: DevPtr,
        [rows, bytes]: [usize; 2],
        fill: impl Fn(usize, &mut [u8]) + Sync,
    ) -> Result<()> {
        if bytes > STAGING_BYTES {
            let detail = format!("a row of {bytes} bytes; at most {STAGING_BYTES} are copied at a time");
            return Err(KernelError::Unsupported { op: "weight", detail });
        }
        let per_copy = STAGING_BYTES / bytes.max(1);
        for first in (0..rows).step_by(per_copy) {
            let here = per_copy.min(rows - first);
            self.stage(dst.offset(first * bytes), here * bytes, |out| {
                out.par_chunks_mut(bytes.max(1)).enumerate().for_each(|(row, out)| fill(first + row, out));
            })?;
        }
        Ok(())
    }

    /// `Ops::vector`.
    pub(super) fn vector(&mut self, values: &[f32]) -> Result<DeviceBuffer> {
        let buffer = self.device.buffer(DType::F32, values.len(), "weights")?;
        let per_copy = STAGING_BYTES / 4;
        for (i, piece) in values.chunks(per_copy).enumerate() {
            self.stage(buffer.ptr().offset(i * STAGING_BYTES), 4 * piece.len(), |out| {
                out.chunks_exact_mut(4).zip(piece).for_each(|(out, v)| out.copy_from_slice(&v.to_le_bytes()));
            })?;
        }
        Ok(buffer)
    }

    /// Copies words, fewer than a staging buffer holds.
    pub(super) fn words(&mut self, dst: DevPtr, words: &[u32]) -> Result<()> {
        self.stage(dst, 4 * words.len(), |out| {
            out.chunks_exact_mut(4)
                .zip(words)
                .for_each(|(out, word)| out.copy_from_slice(&word.to_le_bytes()));
        })
    }

    /// Copies a tensor as bf16, rounding to nearest even where it is stored in more bits.
    pub(super) fn copy(&mut self, dst: DevPtr, tensor: &HostTensor) -> Result<()> {
        let size = tensor.dtype.size();
        let per_copy = STAGING_BYTES / 2;
        for (i, source) in tensor.data.chunks(per_copy * size).enumerate() {
            let bytes = source.len() / size * 2;
            self.stage(dst.offset(i * STAGING_BYTES), bytes, |out| {
                out.par_chunks_mut(2 * PIECE)
                    .zip(source.par_chunks(size * PIECE))
                    .for_each(|(out, source)| to_bf16(out, source, tensor.dtype));
            })?;
        }
        Ok(())
    }

    /// Fills the next staging buffer and queues its copy.
    fn stage(&mut self, dst: DevPtr, bytes: usize, fill: impl FnOnce(&mut [u8])) -> Result<()> {
        let staging = &mut self.staging[self.next];
        self.next = 1 - self.next;
        if staging.in_flight {
            staging.copied.wait()?;
        }
        // SAFETY: the last copy from it was waited for.
        fill(&mut unsafe { staging.memory.bytes_mut() }[..bytes]);
        // SAFETY: both sides hold `bytes` bytes; the source is left alone until the event is waited for.
        unsafe { self.device.driver().copy_to_device(dst, staging.memory.ptr(), bytes) }?;
        staging.in_flight = true;
        staging.copied.record()
    }
}

/// A coding for all parts, if there is one that loses nothing.
fn common_coding(stacks: &[Stack<'_>]) -> Option<Coding> {
    stacks.iter().flat_map(|stack| &stack.parts).map(Part::coding).reduce(|a, b| common(a?, b?)).flatten()
}

/// Parts of a matrix that are stacked along its rows, and their biases.
struct Stack<'a> {
    parts: Vec<Part<'a>>,
    bias: &'a [HostTensor],
    rows: usize,
    width: usize,
}

impl<'a> Stack<'a> {
    fn new(op: &'static str, parts: &'a [HostMatrix], bias: &'a [HostTensor]) -> Result<Self> {
        let parts = parts.iter().map(|part| Part::new(op, part)).collect::<Result<Vec<_>>>()?;
        let width = parts.first().map_or(0, |part| part.shape()[1]);
        for part in &parts {
            let [rows, k] = part.shape();
            if k != width {
                let (what, got, expected) = (part.name().to_owned(), vec![rows, k], vec![rows, width]);
                return Err(KernelError::Shape { op, what, got, expected });
            }
        }
        if !bias.is_empty() && bias.len() != parts.len() {
            let (got, expected) = (vec![bias.len()], vec![parts.len()]);
            return Err(KernelError::Shape { op, what: "bias".into(), got, expected });
        }
        bias.iter().zip(&parts).try_for_each(|(bias, part)| check(op, bias, &part.shape()[..1]))?;
        let rows = parts.iter().map(|part| part.shape()[0]).sum();
        Ok(Self { parts, bias, rows, width })
    }

    /// The first part's name, for error messages.
    fn name(&self) -> String {
        self.parts.first().map_or(String::new(), |part| part.name().to_owned())
    }
}

/// A part of a matrix, whose extents were checked.
enum Part<'a> {
    Dense(&'a HostTensor),
    Coded(Source<'a>),
}

impl<'a> Part<'a> {
    fn new(op: &'static str, matrix: &'a HostMatrix) -> Result<Self> {
        match matrix {
            HostMatrix::Quantized(matrix) => Ok(Part::Coded(Source::new(op, matrix)?)),
            HostMatrix::Dense(tensor) => {
                let rows = tensor.shape.first().copied().unwrap_or(0);
                check(op, tensor, &[rows, tensor.shape.last().copied().unwrap_or(0)])?;
                Ok(Part::Dense(tensor))
            }
        }
    }

    fn name(&self) -> &str {
        match self {
            Part::Dense(tensor) => &tensor.name,
            Part::Coded(source) => source.name(),
        }
    }

    fn shape(&self) -> [usize; 2] {
        match self {
            Part::Dense(tensor) => [tensor.shape[0], tensor.shape[1]],
            Part::Coded(source) => source.shape(),
        }
    }

    fn coding(&self) -> Option<Coding> {
        match self {
            Part::Dense(_) => None,
            Part::Coded(source) => source.coding(),
        }
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        // The staging buffers must outlive their copies. A lost device copies nothing any more.
        let _ = self.device.driver().synchronize();
    }
}

fn check(op: &'static str, tensor: &HostTensor, expected: &[usize]) -> Result<()> {
    if tensor.shape == expected {
        return Ok(());
    }
    Err(KernelError::Shape {
        op,
        what: tensor.name.clone(),
        got: tensor.shape.clone(),
        expected: expected.to_vec(),
    })
}

/// Converts elements of `dtype` to bf16; both sides little-endian, as the device is.
fn to_bf16(out: &mut [u8], source: &[u8], dtype: DType) {
    match dtype {
        DType::Bf16 => out.copy_from_slice(source),
        DType::F16 => out.chunks_exact_mut(2).zip(source.chunks_exact(2)).for_each(|(out, b)| {
            let value = f16::from_le_bytes([b[0], b[1]]).to_f32();
            out.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
        }),
        DType::F8E4M3 => out
            .chunks_exact_mut(2)
            .zip(source)
            .for_each(|(out, &b)| out.copy_from_slice(&bf16::from_f32(f8_to_f32(b)).to_le_bytes())),
        DType::F32 => out.chunks_exact_mut(2).zip(source.chunks_exact(4)).for_each(|(out, b)| {
            let value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            out.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
        }),
    }
}
