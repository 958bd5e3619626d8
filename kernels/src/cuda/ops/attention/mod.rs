//! `attention.cu` and `attention_f8.cu`.

mod f8;
mod plan;

pub(super) use f8::KERNELS as F8_KERNELS;

pub use plan::{AttentionKernels, PlanKind, PlanLimits, PlanShape, attention_plan};

use super::paged_kv::{KvLayer, check_heads};
use crate::{
    DType, KernelError,
    cuda::{
        Device,
        driver::{DevPtr, LaunchConfig, Result},
        memory::DeviceBuffer,
        table::kernels,
        words::DeviceWords,
    },
    ops::{HeadShape, Scoring},
};

kernels! {
    file "attention";
    /// A warp per item: 16 query rows, D = 64.
    fn attention_split_64(args: AttentionArgs);
    /// A block per item: 64 query rows, D = 64.
    fn attention_block_64(args: AttentionArgs);
    /// A warp per query row of a split item, D = 64.
    fn attention_combine_64(args: AttentionArgs);
    /// D = 16.
    fn attention_split_16(args: AttentionArgs);
    /// D = 16.
    fn attention_block_16(args: AttentionArgs);
    /// D = 16.
    fn attention_combine_16(args: AttentionArgs);
    /// D = 32.
    fn attention_split_32(args: AttentionArgs);
    /// D = 32.
    fn attention_block_32(args: AttentionArgs);
    /// D = 32.
    fn attention_combine_32(args: AttentionArgs);
    /// D = 80.
    fn attention_split_80(args: AttentionArgs);
    /// D = 80.
    fn attention_block_80(args: AttentionArgs);
    /// D = 80.
    fn attention_combine_80(args: AttentionArgs);
    /// D = 96.
    fn attention_split_96(args: AttentionArgs);
    /// D = 96.
    fn attention_block_96(args: AttentionArgs);
    /// D = 96.
    fn attention_combine_96(args: AttentionArgs);
    /// D = 128.
    fn attention_split_128(args: AttentionArgs);
    /// D = 128.
    fn attention_block_128(args: AttentionArgs);
    /// D = 128.
    fn attention_combine_128(args: AttentionArgs);
    /// D = 192.
    fn attention_split_192(args: AttentionArgs);
    /// D = 192.
    fn attention_block_192(args: AttentionArgs);
    /// D = 192.
    fn attention_combine_192(args: AttentionArgs);
    /// D = 256.
    fn attention_split_256(args: AttentionArgs);
    /// D = 256.
    fn attention_block_256(args: AttentionArgs);
    /// D = 256.
    fn attention_combine_256(args: AttentionArgs);
}

const OP: &str = "attention";

/// `AttentionArgs` of the kernels' file.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct AttentionArgs {
    pub out: DevPtr,
    pub qkv: DevPtr,
    pub kv: DevPtr,
    pub plan: DevPtr,
    pub slopes: DevPtr,
    pub sinks: DevPtr,
    pub partial_o: DevPtr,
    pub partial_ml: DevPtr,
    pub num_heads: i32,
    pub num_kv_heads: i32,
    pub block_shift: i32,
    pub window: i32,
    pub scale: f32,
    pub soft_cap: f32,
    pub both_ways: i32,
}

/// Room for the partial results of split rows. One serves all layers and steps of a stream.
pub struct AttentionWorkspace {
    o: DeviceBuffer,
    ml: DeviceBuffer,
    split_tiles: usize,
    head_dim: usize,
}

impl AttentionWorkspace {
    /// Room for `split_tiles` tiles of 16 query rows: `64 * (D + 2) * split_tiles` bytes.
    ///
    /// A step of few rows needs `K * ceil(rows * G / 16) * ceil(context / 128)` to split them all; a step of many rows keeps the device
    /// busy without. 4096 is plenty for a batch of 1 at 64k tokens with 8 key/value heads, or of 64 at 1k.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`].
    pub fn new(device: &Device, split_tiles: usize, head_dim: usize) -> Result<Self> {
        let rows = split_tiles * plan::SPLIT_ROWS;
        let o = device.buffer(DType::F32, rows * head_dim, "partial results of attention")?;
        let ml = device.buffer(DType::F32, rows * 2, "partial sums of attention")?;
        Ok(Self { o, ml, split_tiles, head_dim })
    }

    /// For [`PlanLimits::split_tiles`].
    pub fn split_tiles(&self) -> usize {
        self.split_tiles
    }

    /// Where sums and their `m` and `l` go, if rows have this many elements.
    pub(super) fn checked(&self, op: &'static str, head_dim: usize) -> Result<[DevPtr; 2]> {
        if self.head_dim == head_dim {
            return Ok([self.o.ptr(), self.ml.ptr()]);
        }
        let detail =
            format!("the workspace was made for heads of {}, not {head_dim} elements", self.head_dim);
        Err(KernelError::Unsupported { op, detail })
    }
}

/// Where a plan begins, if it does where items can be read as vectors.
pub(super) fn checked_plan(op: &'static str, plan: DeviceWords<'_>) -> Result<DevPtr> {
    let plan = plan.at_least(op, "plan", plan::ITEM_WORDS)?;
    if !plan.0.is_multiple_of(16) {
        let detail = format!("the plan begins {} bytes off a multiple of 16", plan.0 % 16);
        return Err(KernelError::Unsupported { op, detail });
    }
    Ok(plan)
}

/// Arguments of [`attention`]. Letters as in [`crate::ops`].
pub struct Attention<'a> {
    /// `[T, Q * D]` bf16, written but for the tokens of padding rows.
    pub out: &'a mut DeviceBuffer,
    /// `[T, (Q + 2 K) * D]` bf16: the queries are read.
    pub qkv: &'a DeviceBuffer,
    /// Holds the step's own keys and values already.
    pub kv: KvLayer<'a>,
    /// Q, K and D; D one of 16, 32, 64, 80, 96, 128, 192, 256.
    pub heads: HeadShape,
    /// Made by [`attention_plan`] for these heads and blocks, a window that serves this one, and this workspace; 16-byte aligned.
    pub plan: DeviceWords<'a>,
    /// The kernels that the plan needs, or more.
    pub kernels: AttentionKernels,
    /// For split rows.
    pub workspace: &'a mut AttentionWorkspace,
    /// Scale and options; causal unless the plan is [`PlanKind::BothWays`].
    pub scoring: Scoring<'a, DeviceBuffer>,
    /// T, as the buffers must hold it; 0 does nothing.
    pub tokens: usize,
}

/// Queues the attention of a step's tokens; see [`crate::Ops::paged_attention`].
///
/// Bits do not depend on the plan. Relative to the greatest value, results are within about 3e-3 of exact ones: weights are rounded
/// to bf16.
///
/// # Errors
/// A head size or option that the kernels cannot take; a buffer that is smaller or of another type than the contract says; what the driver
/// reports.
pub fn attention(device: &Device, call: Attention<'_>) -> Result<()> {
    let head_dim = call.heads.head_dim;
    let geometry = Geometry::new(head_dim)?;
    let args = checked(&call)?;
    if call.tokens == 0 {
        return Ok(());
    }
    let [split, block, combine] = launchers(head_dim);
    let [split, block] = if call.kv.is_f8() { f8::launchers(head_dim) } else { [split, block] };
    let (driver, sms) = (device.driver(), device.driver().info().num_sms);
    let config = |blocks: u32, threads, shared_bytes| LaunchConfig {
        grid: [blocks, 1, 1],
        block: [threads, 1, 1],
        shared_bytes,
    };
    if call.kernels.block {
        let config = config(2 * sms, geometry.block_threads, geometry.block_shared);
        // SAFETY: (1) `checked` compared all extents with the buffers; (2) the plan was made for them, as the caller promises;
        // (3) `Geometry` knows this kernel's threads and shared memory.
        unsafe { block(driver, config, args) }?;
    }
    if call.kernels.split {
        // SAFETY: as above.
        unsafe { split(driver, config(8 * sms, 32, geometry.split_shared), args) }?;
    }
    if call.kernels.combine {
        // SAFETY: as above; the partial results were queued before.
        unsafe { combine(driver, config(4 * sms, 128, 0), args) }?;
    }
    Ok(())
}

type Launcher = unsafe fn(&dyn crate::cuda::driver::Driver, LaunchConfig, AttentionArgs) -> Result<()>;

/// The split, block and combine kernels for a head size that [`Geometry::new`] knows.
fn launchers(head_dim: usize) -> [Launcher; 3] {
    match head_dim {
        16 => [attention_split_16, attention_block_16, attention_combine_16],
        32 => [attention_split_32, attention_block_32, attention_combine_32],
        64 => [attention_split_64, attention_block_64, attention_combine_64],
        80 => [attention_split_80, attention_block_80, attention_combine_80],
        96 => [attention_split_96, attention_block_96, attention_combine_96],
        128 => [attention_split_128, attention_block_128, attention_combine_128],
        192 => [attention_split_192, attention_block_192, attention_combine_192],
        _ => [attention_split_256, attention_block_256, attention_combine_256],
    }
}

/// Threads and shared memory of the kernels for a head size; mirrors `Rows`, `SplitShape` and `BlockShape` of the kernels.
struct Geometry {
    split_shared: u32,
    block_threads: u32,
    block_shared: u32,
}

impl Geometry {
    fn new(head_dim: usize) -> Result<Self> {
        if ![16, 32, 64, 80, 96, 128, 192, 256].contains(&head_dim) {
            let detail = format!(
                "D is {head_dim}; the CUDA kernels take 16, 32, 64, 80, 96, 128, 192 and 256 (use --device cpu)"
            );
            return Err(KernelError::Unsupported { op: OP, detail });
        }
        let chunks = head_dim / 8;
        let row_bytes = 16 * if chunks.is_multiple_of(8) { chunks } else { chunks + 1 };
        let (step, stages, sharers) = if head_dim <= 128 { (64, 4, 1) } else { (32, 3, 2) };
        Ok(Self {
            split_shared: ((16 + stages * 32) * row_bytes + 16 * head_dim * 4) as u32,
            block_threads: 128 * sharers,
            block_shared: ((64 + 4 * step) * row_bytes) as u32,
        })
    }
}

/// Refuses head layouts that the kernels cannot take, before anything is loaded for them.
///
/// # Errors
/// [`KernelError::Unsupported`].
pub fn check_model(heads: HeadShape) -> Result<()> {
    check_heads(OP, heads)?;
    Geometry::new(heads.head_dim).map(drop)
}

fn checked(call: &Attention<'_>) -> Result<AttentionArgs> {
    let HeadShape { num_heads, num_kv_heads, head_dim } = call.heads;
    check_heads(OP, call.heads)?;
    let Scoring { scale, window, soft_cap, slopes, sinks, causal } = call.scoring;
    let positive = |x: f32| x.is_finite() && x > 0.0;
    if !positive(scale) || !soft_cap.is_none_or(positive) || window == Some(0) {
        let detail = format!("scale {scale}, soft cap {soft_cap:?} and window {window:?} must be positive");
        return Err(KernelError::Unsupported { op: OP, detail });
    }
    let [partial_o, partial_ml] = call.workspace.checked(OP, head_dim)?;
    let per_head = |what, buffer: Option<&DeviceBuffer>| match buffer {
        Some(buffer) => buffer.at_least(OP, what, DType::F32, num_heads),
        None => Ok(DevPtr::NULL),
    };
    Ok(AttentionArgs {
        out: call.out.at_least(OP, "out", DType::Bf16, call.tokens * num_heads * head_dim)?,
        qkv: call.qkv.at_least(OP, "qkv", DType::Bf16, call.tokens * call.heads.qkv_width())?,
        kv: call.kv.checked(OP, call.heads)?,
        plan: checked_plan(OP, call.plan)?,
        slopes: per_head("slopes", slopes)?,
        sinks: per_head("sinks", sinks)?,
        partial_o,
        partial_ml,
        num_heads: num_heads as i32,
        num_kv_heads: num_kv_heads as i32,
        block_shift: call.kv.block_shift(),
        window: window.map_or(0, |window| window.min(1 << 30) as i32),
        scale,
        soft_cap: soft_cap.unwrap_or(0.0),
        both_ways: i32::from(!causal),
    })
}
