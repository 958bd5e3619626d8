//! `moe_route.cu`.

use super::MoeShape;
use crate::{
    DType, KernelError,
    cuda::{
        Device,
        driver::{DevPtr, LaunchConfig, Result},
        memory::DeviceBuffer,
        table::kernels,
        words::DeviceWords,
    },
    ops::{ExpertGroups, ExpertScoring, Routing},
};

kernels! {
    file "moe_route";
    /// One warp per token.
    fn moe_route_f32(args: Args);
}

const OP: &str = "moe_route";
const THREADS: u32 = 128;
const TOKENS_PER_BLOCK: usize = 4;
/// Most groups.
const MAX_GROUPS: usize = 32;

// Bits of the kernel's file.
const SIGMOID: u32 = 1;
const RENORMALIZE: u32 = 2;
const TOP_TWO: u32 = 4;

/// `RouteArgs` of the kernel's file.
#[repr(C)]
struct Args {
    ids: DevPtr,
    weights: DevPtr,
    logits: DevPtr,
    bias: DevPtr,
    tokens: u32,
    experts: u32,
    k: u32,
    groups: u32,
    top_groups: u32,
    flags: u32,
    scale: f32,
}

/// Arguments of [`moe_route`].
pub struct MoeRoute<'a> {
    /// `[T, k]` written: the experts of each token, the best first, the lowest id first among equals.
    pub ids: DeviceWords<'a>,
    /// `[T, k]` f32, written: their weights.
    pub weights: &'a mut DeviceBuffer,
    /// `[T, E]` f32.
    pub logits: &'a DeviceBuffer,
    /// `[E]` f32, added to the scores that are compared.
    pub bias: Option<&'a DeviceBuffer>,
    /// E, k, and how scores come about. At most 32 groups.
    pub routing: &'a Routing,
    /// T; 0 does nothing.
    pub tokens: usize,
}

/// Queues the routing; see [`crate::Ops::moe_route`].
///
/// # Errors
/// What [`check_routing`] refuses; a buffer that is smaller or of another type than the contract says; what the driver reports.
pub fn moe_route(device: &Device, call: MoeRoute<'_>) -> Result<()> {
    let MoeRoute { ids, weights, logits, bias, routing, tokens } = call;
    let MoeShape { experts, top_k } = check_routing(routing)?;
    if tokens == 0 {
        return Ok(());
    }
    let ids = ids.at_least(OP, "ids", tokens * top_k)?;
    let weights = weights.at_least(OP, "weights", DType::F32, tokens * top_k)?;
    let logits = logits.at_least(OP, "logits", DType::F32, tokens * experts)?;
    let bias = bias.map_or(Ok(DevPtr::NULL), |bias| bias.at_least(OP, "bias", DType::F32, experts))?;
    let flag = |bit, set: bool| if set { bit } else { 0 };
    let groups = routing.groups;
    let args = Args {
        ids,
        weights,
        logits,
        bias,
        tokens: tokens as u32,
        experts: experts as u32,
        k: top_k as u32,
        groups: groups.map_or(0, |groups| groups.count as u32),
        top_groups: groups.map_or(0, |groups| groups.top as u32),
        flags: flag(SIGMOID, routing.scoring == ExpertScoring::Sigmoid)
            | flag(RENORMALIZE, routing.renormalize)
            | flag(TOP_TWO, groups.is_some_and(|groups| groups.by_top_two)),
        scale: routing.scale,
    };
    let config = LaunchConfig::linear(tokens.div_ceil(TOKENS_PER_BLOCK), THREADS);
    // SAFETY: the extents of all buffers were checked above, and the routing is within what a warp holds.
    unsafe { moe_route_f32(device.driver(), config, args) }
}

/// Refuses what the kernels cannot route to.
///
/// # Errors
/// [`KernelError::Unsupported`].
pub fn check_routing(routing: &Routing) -> Result<MoeShape> {
    let Routing { experts, top_k, groups, .. } = *routing;
    let shape = MoeShape { experts, top_k };
    shape.check(OP)?;
    if let Some(ExpertGroups { count, top, by_top_two }) = groups {
        let size = experts.checked_div(count).unwrap_or(0);
        let fits = count <= MAX_GROUPS && size * count == experts && (1..=count).contains(&top);
        if !fits || top * size < top_k || (by_top_two && size < 2) {
            let detail = format!(
                "{top} of {count} groups of {experts} experts for {top_k}; at most {MAX_GROUPS} equal groups (use --device cpu)"
            );
            return Err(KernelError::Unsupported { op: OP, detail });
        }
    }
    Ok(shape)
}
