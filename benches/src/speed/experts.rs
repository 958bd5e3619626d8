//! A mixture of experts, one layer at a time: routing, sorting, both grouped products and the sum. Only GPUs have these ops.

use std::time::Duration;

use tidemill_kernels::{
    DType, KernelError,
    cuda::{
        Device,
        memory::{DeviceBuffer, DeviceMemory},
        ops::{
            ActivationKind, LinearEpilogue, MoeCombine, MoeLinear, MoeOrder, MoePermute, MoeRoute, MoeRows,
            MoeShape, moe_combine, moe_linear, moe_permute, moe_route,
        },
        words::DeviceWords,
    },
    ops::{ExpertScoring, Routing},
};

use super::{clock::Work, cuda::CudaMachine, machine::Machine, random::RandomTensors, table::Cost};

/// Sets of router logits: a step after another one meets other experts.
const SETS: usize = 8;

/// Extents of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    /// H.
    pub hidden: usize,
    /// I of one expert.
    pub inter: usize,
    /// E.
    pub experts: usize,
    /// Experts of a token.
    pub top_k: usize,
}

impl Experts {
    /// Of Qwen3-30B-A3B.
    pub const QWEN3_30B_A3B: Self = Self { hidden: 2048, inter: 768, experts: 128, top_k: 8 };
    /// For a dry run.
    pub const TINY: Self = Self { hidden: 64, inter: 32, experts: 6, top_k: 2 };

    fn expert_elems(self) -> usize {
        3 * self.inter * self.hidden
    }

    /// Weights of the experts that `tokens` tokens are expected to meet when they choose evenly, activations in and out, and
    /// the operations of all pairs.
    pub fn cost(self, tokens: usize) -> Cost {
        let (pairs, experts) = ((tokens * self.top_k) as f64, self.experts as f64);
        let met = experts * (1.0 - (1.0 - 1.0 / experts).powf(pairs));
        let bytes = 2.0 * (met * self.expert_elems() as f64 + 2.0 * (tokens * self.hidden) as f64);
        Cost { bytes, flops: 2.0 * pairs * self.expert_elems() as f64 }
    }
}

/// Seconds of one layer over `tokens` tokens.
///
/// # Errors
/// What an op or the device returned.
pub fn layer(
    machine: &CudaMachine,
    extents: Experts,
    tokens: usize,
    budget: Duration,
) -> Result<f64, KernelError> {
    let mut layer = Layer::new(machine, extents, tokens)?;
    let work: &mut dyn Work = &mut layer;
    Ok(machine.clock().seconds(work, budget)? / SETS as f64)
}

struct Layer {
    device: Device,
    extents: Experts,
    tokens: usize,
    logits: Vec<DeviceBuffer>,
    x: DeviceBuffer,
    gate_up: DeviceBuffer,
    down: DeviceBuffer,
    ids: DeviceMemory,
    weights: DeviceBuffer,
    sorted_pairs: DeviceMemory,
    offsets: DeviceMemory,
    tiles: DeviceMemory,
    inner: DeviceBuffer,
    rows: DeviceBuffer,
    out: DeviceBuffer,
}

impl Layer {
    fn new(machine: &CudaMachine, extents: Experts, tokens: usize) -> Result<Self, KernelError> {
        let Experts { hidden, inter, experts, top_k } = extents;
        let device = Device::new(machine.driver());
        let (pairs, shape) = (tokens * top_k, MoeShape { experts, top_k });
        let random =
            RandomTensors::new((2 * experts * inter * hidden).max(tokens * hidden.max(experts)), 1.0);
        let bf16 = |rows: usize, columns: usize| -> Result<DeviceBuffer, KernelError> {
            let buffer = device.buffer(DType::Bf16, rows * columns, "benchmark")?;
            fill(&device, &buffer, &random.matrix(rows, columns).data)?;
            Ok(buffer)
        };
        let logits = || -> Result<DeviceBuffer, KernelError> {
            let buffer = device.buffer(DType::F32, tokens * experts, "benchmark")?;
            let values = random.matrix(tokens, experts).to_f32();
            fill(&device, &buffer, &values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())?;
            Ok(buffer)
        };
        let words = |count: usize| DeviceMemory::new(machine.driver(), 4 * count, "benchmark");
        Ok(Self {
            logits: (0..SETS).map(|_| logits()).collect::<Result<_, _>>()?,
            x: bf16(tokens, hidden)?,
            gate_up: bf16(experts * 2 * inter, hidden)?,
            down: bf16(experts * hidden, inter)?,
            ids: words(pairs)?,
            weights: device.buffer(DType::F32, pairs, "benchmark")?,
            sorted_pairs: words(pairs)?,
            offsets: words(experts + 1)?,
            tiles: words(2 * shape.max_tiles(tokens, shape.kernel(tokens)))?,
            inner: device.buffer(DType::Bf16, pairs * inter, "benchmark")?,
            rows: device.buffer(DType::Bf16, pairs * hidden, "benchmark")?,
            out: device.buffer(DType::Bf16, tokens * hidden, "benchmark")?,
            device: device.clone(),
            extents,
            tokens,
        })
    }

    fn queue_one(&mut self, set: usize) -> Result<(), KernelError> {
        let Self { device, extents, tokens, .. } = self;
        let Experts { hidden, inter, experts, top_k } = *extents;
        let (shape, tokens) = (MoeShape { experts, top_k }, *tokens);
        let order = MoeOrder {
            sorted_pairs: DeviceWords::new(&self.sorted_pairs),
            offsets: DeviceWords::new(&self.offsets),
            tiles: DeviceWords::new(&self.tiles),
            shape,
            tokens,
            kernel: shape.kernel(tokens),
        };
        let ids = DeviceWords::new(&self.ids);
        let (weights, logits) = (&mut self.weights, &self.logits[set]);
        let routing = Routing {
            experts,
            top_k,
            scoring: ExpertScoring::Softmax,
            groups: None,
            renormalize: true,
            scale: 1.0,
        };
        moe_route(device, MoeRoute { ids, weights, logits, bias: None, routing: &routing, tokens })?;
        moe_permute(device, MoePermute { order, ids })?;
        let first = MoeLinear {
            order,
            rows: MoeRows::Tokens,
            out: &mut self.inner,
            x: &self.x,
            weight: &self.gate_up,
            bias: None,
            n: inter,
            k: hidden,
            epilogue: LinearEpilogue::Gated(ActivationKind::Silu),
        };
        moe_linear(device, first)?;
        let last = MoeLinear {
            order,
            rows: MoeRows::Pairs,
            out: &mut self.rows,
            x: &self.inner,
            weight: &self.down,
            bias: None,
            n: hidden,
            k: inter,
            epilogue: LinearEpilogue::Store,
        };
        moe_linear(device, last)?;
        let sum = MoeCombine {
            out: &mut self.out,
            rows: &self.rows,
            weights: &self.weights,
            width: hidden,
            top_k,
            tokens,
        };
        moe_combine(device, sum)
    }
}

impl Work for Layer {
    fn queue(&mut self) -> Result<(), KernelError> {
        (0..SETS).try_for_each(|set| self.queue_one(set))
    }
}

fn fill(device: &Device, buffer: &DeviceBuffer, bytes: &[u8]) -> Result<(), KernelError> {
    assert_eq!(bytes.len(), buffer.elems() * buffer.dtype().size());
    // SAFETY: the buffer holds as many bytes; pageable memory is read before the call returns.
    unsafe { device.driver().copy_to_device(buffer.ptr(), bytes.as_ptr(), bytes.len()) }
}
