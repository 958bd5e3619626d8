//! Weights on their way to the device: through two pinned buffers in turn, so that reading the file and copying overlap.

use half::{bf16, f16};
use rayon::prelude::*;

use super::{
    Device,
    driver::{DevPtr, Pinned, Result},
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

/// A matrix `[N, K]` in bf16 with an optional bias `[N]` in f32.
pub struct CudaWeight {
    pub(super) matrix: DeviceBuffer,
    pub(super) bias: Option<DeviceBuffer>,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// Matrices `[X, N, K]` in bf16 with optional biases `[X, N]` in f32.
pub struct CudaExperts {
    pub(super) matrix: DeviceBuffer,
    pub(super) bias: Option<DeviceBuffer>,
    pub(super) count: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// Parts of a matrix that are stacked along its rows, and their biases.
struct Stack<'a> {
    parts: Vec<&'a HostTensor>,
    bias: &'a [HostTensor],
    rows: usize,
    width: usize,
}

impl<'a> Stack<'a> {
    fn new(op: &'static str, parts: &'a [HostMatrix], bias: &'a [HostTensor]) -> Result<Self> {
        let parts = parts.iter().map(|part| match part {
            HostMatrix::Dense(tensor) => Ok(tensor),
            HostMatrix::Quantized(matrix) => {
                let detail = format!("{} is {:?}", matrix.name, matrix.format);
                Err(KernelError::Unsupported { op, detail })
            }
        });
        let parts = parts.collect::<Result<Vec<&HostTensor>>>()?;
        let width = parts.first().and_then(|part| part.shape.last()).copied().unwrap_or(0);
        for part in &parts {
            check(op, part, &[part.shape.first().copied().unwrap_or(0), width])?;
        }
        if !bias.is_empty() && bias.len() != parts.len() {
            return Err(KernelError::Shape {
                op,
                what: "bias".into(),
                got: vec![bias.len()],
                expected: vec![parts.len()],
            });
        }
        bias.iter().zip(&parts).try_for_each(|(bias, part)| check(op, bias, &part.shape[..1]))?;
        let rows = parts.iter().map(|part| part.shape[0]).sum();
        Ok(Self { parts, bias, rows, width })
    }

    /// The first part's name, for error messages.
    fn name(&self) -> String {
        self.parts.first().map_or(String::new(), |part| part.name.clone())
    }
}

/// Copies host tensors to a device.
pub(super) struct Uploader {
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
    pub(super) fn new(device: &Device) -> Result<Self> {
        let staging = || -> Result<Staging> {
            let memory = PinnedMemory::new(device.driver.clone(), STAGING_BYTES, Pinned::Upload)?;
            Ok(Staging { memory, copied: Event::new(device.driver.clone())?, in_flight: false })
        };
        Ok(Self { device: device.clone(), staging: [staging()?, staging()?], next: 0 })
    }

    /// `Ops::weight`.
    pub(super) fn weight(&mut self, parts: &[HostMatrix], bias: &[HostTensor]) -> Result<CudaWeight> {
        let stack = Stack::new("weight", parts, bias)?;
        let Stack { rows: n, width: k, .. } = stack;
        let (matrix, bias) = self.stacks(&[stack])?;
        Ok(CudaWeight { matrix, bias, n, k })
    }

    /// `Ops::experts`.
    pub(super) fn experts(&mut self, experts: &[ExpertParts]) -> Result<CudaExperts> {
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
        let (matrix, bias) = self.stacks(&stacks)?;
        Ok(CudaExperts { matrix, bias, count: stacks.len(), n, k })
    }

    /// The matrices of all stacks, one after the other, and their biases; all have one shape.
    fn stacks(&mut self, stacks: &[Stack<'_>]) -> Result<(DeviceBuffer, Option<DeviceBuffer>)> {
        let elems = stacks.iter().map(|stack| stack.rows * stack.width).sum();
        let matrix = self.device.buffer(DType::Bf16, elems, "weights")?;
        let mut at = 0;
        for part in stacks.iter().flat_map(|stack| &stack.parts) {
            self.copy(matrix.ptr().offset(2 * at), part)?;
            at += part.elems();
        }
        let bias: Vec<f32> =
            stacks.iter().flat_map(|stack| stack.bias).flat_map(HostTensor::to_f32).collect();
        let bias = if bias.is_empty() { None } else { Some(self.vector(&bias)?) };
        Ok((matrix, bias))
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
