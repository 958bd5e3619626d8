//! `lora.cu`.

use crate::{
    DType,
    cuda::{
        Device,
        driver::{DevPtr, LaunchConfig, Result},
        memory::{DeviceBuffer, DeviceMemory, require_multiple},
        table::kernels,
        words::DeviceWords,
    },
    ops::{BatchMeta, LoraGroup, LoraShape},
};

kernels! {
    file "lora";
    /// A warp for each row of A.
    fn lora_shrink_bf16(
        low: DevPtr, x: DevPtr, a: DevPtr, table: DevPtr, tokens: DevPtr, groups: DevPtr, width: i32, max_rank: i32,
    );
    /// A thread for each row of B.
    fn lora_expand_bf16(
        out: DevPtr, low: DevPtr, b: DevPtr, table: DevPtr, parts: DevPtr, tokens: DevPtr, groups: DevPtr, out_width: i32,
        max_rank: i32,
    );
    /// A block for each token.
    fn lora_restore_bf16(out: DevPtr, from: DevPtr, adapters: DevPtr, width: i32);
}

const OP: &str = "lora_add";
const THREADS: u32 = 256;
/// Tokens that a matrix is read for at once.
const GROUP: usize = 8;

/// Adapters of one matrix on the device; see `lora.cu` for the layout.
pub struct LoraMemory {
    /// Extents.
    pub shape: LoraShape,
    /// `[slots, P, max_rank, K]`.
    pub a: DeviceBuffer,
    /// `[slots, N * max_rank]`.
    pub b: DeviceBuffer,
    /// `[slots, P, 2]`.
    pub table: DeviceMemory,
    /// `[P, 2]`.
    pub parts: DeviceMemory,
}

impl LoraMemory {
    /// Allocates; what is in it is not specified. `table` and `parts` are the caller's to fill.
    ///
    /// # Errors
    /// [`crate::KernelError::OutOfMemory`]; [`crate::KernelError::Unsupported`] for a K that is no multiple of 8.
    pub fn new(device: &Device, shape: &LoraShape) -> Result<Self> {
        require_multiple("lora", "K", shape.k, 8)?;
        let LoraShape { slots, max_rank, k, parts } = shape;
        let words = |words| DeviceMemory::new(device.driver.clone(), 4 * words, "adapters");
        Ok(Self {
            a: device.buffer(DType::Bf16, slots * parts.len() * max_rank * k, "adapters")?,
            b: device.buffer(DType::Bf16, slots * shape.n() * max_rank, "adapters")?,
            table: words(2 * slots * parts.len())?,
            parts: words(2 * parts.len())?,
            shape: shape.clone(),
        })
    }

    /// Words of `parts`.
    pub fn part_words(&self) -> Vec<u32> {
        let mut first = 0;
        let part = |&rows: &usize| {
            first += rows;
            [(first - rows) as u32, rows as u32]
        };
        self.shape.parts.iter().flat_map(part).collect()
    }

    /// Where A of a part begins.
    pub fn a_of(&self, slot: usize, part: usize) -> DevPtr {
        let LoraShape { max_rank, k, parts, .. } = &self.shape;
        self.a.ptr().offset(DType::Bf16.size() * (slot * parts.len() + part) * max_rank * k)
    }

    /// Where B of a part begins, transposed.
    pub fn b_of(&self, slot: usize, part: usize) -> DevPtr {
        let first: usize = self.shape.parts[..part].iter().sum();
        self.b.ptr().offset(DType::Bf16.size() * (slot * self.shape.n() + first) * self.shape.max_rank)
    }
}

/// Which tokens of a step have which adapter, as the kernels read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LoraPlan {
    /// Tokens that have an adapter.
    pub tokens: usize,
    /// G.
    pub groups: usize,
    /// T.
    pub all_tokens: usize,
}

impl LoraPlan {
    /// The words of a step: `tokens`, `groups` `[G, 3]`, and `[T]` the adapter of each token, 0 for none.
    pub fn new(meta: &BatchMeta) -> (Self, Vec<u32>) {
        let (mut tokens, mut groups, mut adapters) = (Vec::new(), Vec::new(), vec![0; meta.num_tokens()]);
        for LoraGroup { slot, tokens: own } in LoraGroup::of(meta) {
            for piece in own.chunks(GROUP) {
                groups.extend([tokens.len() as u32, piece.len() as u32, slot as u32]);
                tokens.extend_from_slice(piece);
            }
            own.iter().for_each(|&token| adapters[token as usize] = slot as u32 + 1);
        }
        let plan = Self { tokens: tokens.len(), groups: groups.len() / 3, all_tokens: adapters.len() };
        tokens.extend(groups);
        tokens.extend(adapters);
        (plan, tokens)
    }

    /// Words in all.
    pub fn words(&self) -> usize {
        self.tokens + 3 * self.groups + self.all_tokens
    }
}

/// Arguments of [`lora_add`]. Letters as in [`crate::ops`].
pub struct LoraAdd<'a> {
    /// `[T, N]` bf16, added to.
    pub out: &'a mut DeviceBuffer,
    /// `[T, K]` bf16.
    pub x: &'a DeviceBuffer,
    /// The adapters.
    pub lora: &'a LoraMemory,
    /// `[tokens, P, max_rank]` f32, overwritten.
    pub low: &'a DeviceBuffer,
    /// What [`LoraPlan::new`] wrote.
    pub words: DeviceWords<'a>,
    /// Its extents.
    pub plan: LoraPlan,
}

/// Queues `out[t, i] += scale * B_i (A_i x[t])` for the tokens that have an adapter.
///
/// # Errors
/// A buffer that is smaller or of another type than the contract says; what the driver reports.
pub fn lora_add(device: &Device, call: LoraAdd<'_>) -> Result<()> {
    let LoraAdd { out, x, lora, low, words, plan } = call;
    let LoraShape { max_rank, k, parts, .. } = &lora.shape;
    if plan.groups == 0 {
        return Ok(());
    }
    let out = out.at_least(OP, "out", DType::Bf16, plan.all_tokens * lora.shape.n())?;
    let x = x.at_least(OP, "x", DType::Bf16, plan.all_tokens * k)?;
    let low = low.at_least(OP, "low", DType::F32, plan.tokens * parts.len() * max_rank)?;
    let tokens = words.at_least(OP, "words", plan.words())?;
    let groups = words.part(plan.tokens, 3 * plan.groups)?.at_least(OP, "groups", 3 * plan.groups)?;
    let mut config = LaunchConfig::linear(plan.groups, THREADS);
    config.grid[1] = parts.len() as u32;
    config.grid[2] = max_rank.div_ceil(THREADS as usize / 32) as u32;
    let (driver, rank) = (device.driver(), *max_rank as i32);
    let (table, a, b) = (lora.table.ptr(), lora.a.ptr(), lora.b.ptr());
    // SAFETY: the extents of the step's buffers were checked above; those of the adapters are what `LoraMemory::new` allocated, and the
    // tables say no more.
    unsafe { lora_shrink_bf16(driver, config, low, x, a, table, tokens, groups, *k as i32, rank) }?;
    config.grid[2] = parts.iter().max().copied().unwrap_or(0).div_ceil(THREADS as usize) as u32;
    let (parts, width) = (lora.parts.ptr(), lora.shape.n() as i32);
    // SAFETY: as above.
    unsafe { lora_expand_bf16(driver, config, out, low, b, table, parts, tokens, groups, width, rank) }
}

/// Arguments of [`lora_restore`].
pub struct LoraRestore<'a> {
    /// `[T, width]` bf16, written where a token has no adapter.
    pub out: &'a mut DeviceBuffer,
    /// `[T, width]` bf16.
    pub from: &'a DeviceBuffer,
    /// What [`LoraPlan::new`] wrote.
    pub words: DeviceWords<'a>,
    /// Its extents.
    pub plan: LoraPlan,
    /// Elements of a row.
    pub width: usize,
}

/// Queues `out[t, :] = from[t, :]` for the tokens that have no adapter.
///
/// # Errors
/// As [`lora_add`].
pub fn lora_restore(device: &Device, call: LoraRestore<'_>) -> Result<()> {
    let LoraRestore { out, from, words, plan, width } = call;
    let rows = plan.all_tokens;
    let out = out.at_least("lora_restore", "out", DType::Bf16, rows * width)?;
    let from = from.at_least("lora_restore", "from", DType::Bf16, rows * width)?;
    let adapters =
        words.part(plan.tokens + 3 * plan.groups, rows)?.at_least("lora_restore", "words", rows)?;
    let config = LaunchConfig::linear(rows, THREADS);
    // SAFETY: the extents of all buffers were checked above.
    unsafe { lora_restore_bf16(device.driver(), config, out, from, adapters, width as i32) }
}
