//! A mixture of experts.

use crate::{
    KernelError,
    cuda::{
        CudaExperts, CudaOps,
        driver::Result,
        memory::{DeviceBuffer, DeviceMemory},
        ops::{
            LinearEpilogue, MoeCombine, MoeLinear, MoeOrder, MoePermute, MoeRoute, MoeRows, MoeShape,
            check_routing, moe_combine as queue_sums, moe_linear, moe_permute, moe_route as queue_routing,
        },
        words::DeviceWords,
    },
    ops::{Activation, Routing},
    tensor::DType,
};

/// The experts of a step's tokens, their weights, and the order in which the products take the (token, expert) pairs.
pub struct CudaRoutes {
    ids: DeviceMemory,
    weights: DeviceBuffer,
    sorted_pairs: DeviceMemory,
    offsets: DeviceMemory,
    tiles: DeviceMemory,
    shape: MoeShape,
}

impl CudaRoutes {
    fn order(&self, tokens: usize) -> MoeOrder<'_> {
        MoeOrder {
            sorted_pairs: DeviceWords::new(&self.sorted_pairs),
            offsets: DeviceWords::new(&self.offsets),
            tiles: DeviceWords::new(&self.tiles),
            shape: self.shape,
            tokens,
            // By the number of tokens alone: what a graph records serves every step of that number.
            kernel: self.shape.kernel(tokens),
        }
    }

    fn require(&self, op: &'static str, experts: usize, top_k: usize) -> Result<()> {
        let asked = MoeShape { experts, top_k };
        if asked == self.shape {
            return Ok(());
        }
        let detail = format!("{asked:?} with routes for {:?}", self.shape);
        Err(KernelError::Unsupported { op, detail })
    }
}

pub(in crate::cuda) fn routes(ops: &CudaOps, tokens: usize, routing: &Routing) -> Result<CudaRoutes> {
    let shape = check_routing(routing)?;
    let pairs = tokens * shape.top_k;
    let words = |count: usize| DeviceMemory::new(ops.device.driver.clone(), 4 * count, "routes of experts");
    Ok(CudaRoutes {
        ids: words(pairs)?,
        weights: ops.device.buffer(DType::F32, pairs, "weights of experts")?,
        sorted_pairs: words(pairs)?,
        offsets: words(shape.experts + 1)?,
        tiles: words(2 * shape.most_tiles(tokens))?,
        shape,
    })
}

pub(in crate::cuda) fn moe_route(
    ops: &CudaOps,
    routes: &mut CudaRoutes,
    logits: &DeviceBuffer,
    bias: Option<&DeviceBuffer>,
    (routing, tokens): (&Routing, usize),
) -> Result<()> {
    routes.require("moe_route", routing.experts, routing.top_k)?;
    let CudaRoutes { ids, weights, .. } = routes;
    let ids = DeviceWords::new(ids);
    queue_routing(&ops.device, MoeRoute { ids, weights, logits, bias, routing, tokens })?;
    let ids = DeviceWords::new(&routes.ids);
    moe_permute(&ops.device, MoePermute { order: routes.order(tokens), ids })
}

pub(in crate::cuda) fn moe_gated(
    ops: &CudaOps,
    out: &mut DeviceBuffer,
    x: &DeviceBuffer,
    experts: &CudaExperts,
    (routes, tokens, activation): (&CudaRoutes, usize, Activation),
) -> Result<()> {
    routes.require("moe_gated", experts.count, routes.shape.top_k)?;
    let CudaExperts { matrix, bias, n, k, .. } = experts;
    let call = MoeLinear {
        order: routes.order(tokens),
        rows: MoeRows::Tokens,
        out,
        x,
        weight: matrix,
        bias: bias.as_ref(),
        n: n / 2,
        k: *k,
        epilogue: LinearEpilogue::Gated(activation),
    };
    moe_linear(&ops.device, call)
}

pub(in crate::cuda) fn moe_combine(
    ops: &CudaOps,
    (out, scratch): (&mut DeviceBuffer, &mut DeviceBuffer),
    x: &DeviceBuffer,
    experts: &CudaExperts,
    (routes, tokens): (&CudaRoutes, usize),
) -> Result<()> {
    routes.require("moe_combine", experts.count, routes.shape.top_k)?;
    let CudaExperts { matrix, bias, n, k, .. } = experts;
    let call = MoeLinear {
        order: routes.order(tokens),
        rows: MoeRows::Pairs,
        out: scratch,
        x,
        weight: matrix,
        bias: bias.as_ref(),
        n: *n,
        k: *k,
        epilogue: LinearEpilogue::Store,
    };
    moe_linear(&ops.device, call)?;
    let (width, top_k) = (*n, routes.shape.top_k);
    let (rows, weights) = (&*scratch, &routes.weights);
    let call = MoeCombine { out, rows, weights, width, top_k, tokens };
    queue_sums(&ops.device, call)
}
