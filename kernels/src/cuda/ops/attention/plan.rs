//! Cuts a step's attention into work items, on the host, as a part of the step's metadata.
//!
//! Kernels run over whatever items the plan holds, so that a captured graph fits steps of any lengths. Nothing here
//! changes a bit of the results: the arithmetic follows positions alone (see `attention.cu`); a plan only says who does it.

use crate::{
    KernelError,
    cuda::driver::Result,
    ops::{BatchMeta, HeadShape},
};

/// Positions per tile; `KV_TILE` of the kernels.
const KV_TILE: usize = 128;
/// Query rows of an item of the split kernel; `MMA_ROWS` there.
pub(super) const SPLIT_ROWS: usize = 16;
/// Query rows of an item of the block kernel; `BLOCK_ROWS` there.
const BLOCK_ROWS: usize = 64;
/// Tokens that a row may bring to the split kernel however many heads share a key.
const SPLIT_TOKENS: usize = 4;
/// Warps per multiprocessor that bring memory to its bandwidth: below that, rows are split.
const WARPS_PER_SM: usize = 4;
/// Words of the header and of an item.
pub(super) const ITEM_WORDS: usize = 8;
/// Slot of an item that has all tiles of its rows.
const DIRECT: u32 = u32::MAX;

const OP: &str = "attention_plan";

/// Who sees what, and in how large items: what a plan is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlanKind {
    /// For [`super::attention`]: a token sees those before it.
    Causal,
    /// For [`super::attention`]: a token sees its whole row, which is in the step from its first token on.
    BothWays,
    /// For [`super::super::attend_latents`], causal.
    Latent,
}

/// The attention that a plan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanShape {
    /// Q, K and D.
    pub heads: HeadShape,
    /// Tokens per KV block.
    pub block_size: usize,
    /// The layers' window. A plan without serves layers with any; one with a window serves layers of that window alone.
    pub window: Option<usize>,
    /// Whose.
    pub kind: PlanKind,
}

/// What a plan may not exceed, so that buffers are allocated once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanLimits {
    /// T, tokens of a step.
    pub max_tokens: usize,
    /// S, rows of a step.
    pub max_rows: usize,
    /// Partial results that the workspace has room for; see [`super::AttentionWorkspace`]. With none, no row is split.
    pub split_tiles: usize,
    /// Streaming multiprocessors of the device.
    pub num_sms: usize,
}

/// Which kernels a step needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionKernels {
    /// Rows of few tokens.
    pub split: bool,
    /// Prompt chunks.
    pub block: bool,
    /// Rows whose tiles were computed apart.
    pub combine: bool,
}

impl AttentionKernels {
    /// What any step needs whose rows have up to four tokens each: what a captured decode graph holds.
    pub const DECODE: Self = Self { split: true, block: false, combine: true };
}

/// Query rows of one sequence and key/value head, with the tiles they meet.
#[derive(Clone, Copy)]
struct Unit {
    row: u32,
    token: u32,
    position: u32,
    head: u32,
    first: u32,
    rows: u32,
    tile: u32,
    tiles: u32,
}

impl Unit {
    fn words(&self, tile: u32, tiles: u32, slot: u32) -> [u32; ITEM_WORDS] {
        [self.row, self.token, self.position, self.head | self.rows << 16, self.first, tile, tiles, slot]
    }
}

/// Writes the plan of a step into `plan`.
///
/// Of `meta`, reads `cu_seqlens_q`, `context_lens` and the block tables, of which it takes what the contexts use: items refer to them
/// by word, so that a captured graph fits tables of any length. Rows without tokens or with a context of 0 are padding and get no work.
/// The plan is to lie 16-byte aligned in device memory. Items come longest first.
///
/// # Errors
/// [`KernelError::Unsupported`] for more tokens or rows than the limits allow, a row with more new tokens than context, or one whose
/// tokens see later ones and that is not in the step entire.
pub fn attention_plan(
    plan: &mut Vec<u32>,
    meta: &BatchMeta,
    shape: &PlanShape,
    limits: &PlanLimits,
) -> Result<AttentionKernels> {
    super::super::paged_kv::check_heads(OP, shape.heads)?;
    let (split, mut blocks) = units(meta, shape, limits)?;
    let (mut split, combine) = share_out(split, limits);
    split.sort_by_key(|item| std::cmp::Reverse(item[6]));
    blocks.sort_by_key(|unit| std::cmp::Reverse(unit.tiles));
    let blocks: Vec<_> = blocks.iter().map(|unit| unit.words(unit.tile, unit.tiles, DIRECT)).collect();

    plan.clear();
    plan.resize(ITEM_WORDS, 0);
    for (kind, items) in [&split, &blocks, &combine].into_iter().enumerate() {
        plan[2 * kind] = items.len() as u32;
        plan[2 * kind + 1] = plan.len() as u32;
        plan.extend(items.iter().flatten());
    }
    append_tables(plan, meta, shape.block_size);
    Ok(AttentionKernels { split: !split.is_empty(), block: !blocks.is_empty(), combine: !combine.is_empty() })
}

/// Puts the rows' block tables behind the items, and in each item the place of its row's table in place of the row.
fn append_tables(plan: &mut Vec<u32>, meta: &BatchMeta, block_size: usize) {
    let items = plan.len();
    let mut starts = Vec::with_capacity(meta.num_rows());
    for (row, &context) in meta.context_lens.iter().enumerate() {
        starts.push(plan.len() as u32);
        let table = row * meta.max_blocks;
        plan.extend_from_slice(&meta.block_tables[table..table + (context as usize).div_ceil(block_size)]);
    }
    for item in plan[ITEM_WORDS..items].chunks_exact_mut(ITEM_WORDS) {
        item[0] = starts[item[0] as usize];
    }
}

/// The units of all rows: first those for the split kernel, then those for the block kernel.
fn units(meta: &BatchMeta, shape: &PlanShape, limits: &PlanLimits) -> Result<(Vec<Unit>, Vec<Unit>)> {
    let (mut split, mut blocks) = (Vec::new(), Vec::new());
    let group = shape.heads.num_heads / shape.heads.num_kv_heads;
    let tokens = meta.cu_seqlens_q.last().map_or(0, |&t| t as usize);
    if tokens > limits.max_tokens || meta.num_rows() > limits.max_rows {
        let detail = format!(
            "{tokens} tokens in {} rows; the buffers hold {} in {}",
            meta.num_rows(),
            limits.max_tokens,
            limits.max_rows
        );
        return Err(KernelError::Unsupported { op: OP, detail });
    }
    for (row, (ends, &context)) in meta.cu_seqlens_q.windows(2).zip(&meta.context_lens).enumerate() {
        let (token, new) = (ends[0], ends[1].saturating_sub(ends[0]) as usize);
        if new == 0 || context == 0 {
            continue;
        }
        let before = (context as usize).checked_sub(new);
        let both_ways = shape.kind == PlanKind::BothWays;
        let Some(before) = before.filter(|&before| before == 0 || !both_ways) else {
            let detail = format!("row {row} has {new} new tokens in a context of {context}");
            return Err(KernelError::Unsupported { op: OP, detail });
        };
        // What `Item` calls position.
        let position = if both_ways { context } else { before as u32 };
        let packed = new * group;
        let narrow = shape.kind == PlanKind::Latent || packed <= BLOCK_ROWS || new <= SPLIT_TOKENS;
        let (units, most) = if narrow { (&mut split, SPLIT_ROWS) } else { (&mut blocks, BLOCK_ROWS) };
        for first in (0..packed).step_by(most) {
            let rows = most.min(packed - first);
            let (oldest, newest) = (before + first / group, before + (first + rows - 1) / group);
            let low = shape.window.map_or(0, |window| (oldest + 1).saturating_sub(window));
            let last = context as usize - 1;
            let high = match shape.window {
                _ if !both_ways => newest,
                Some(window) => last.min(newest + window - 1),
                None => last,
            };
            let (tile, end) = (low / KV_TILE, high / KV_TILE + 1);
            units.extend((0..shape.heads.num_kv_heads).map(|head| Unit {
                row: row as u32,
                token,
                position,
                head: head as u32,
                first: first as u32,
                rows: rows as u32,
                tile: tile as u32,
                tiles: (end - tile) as u32,
            }));
        }
    }
    Ok((split, blocks))
}

/// Splits the longest units, while there is room for their partial results, so that no item is longer than the share of one warp of
/// [`WARPS_PER_SM`]. Returns the items of the split kernel and those of the combine kernel.
fn share_out(mut units: Vec<Unit>, limits: &PlanLimits) -> (Vec<[u32; ITEM_WORDS]>, Vec<[u32; ITEM_WORDS]>) {
    units.sort_by_key(|unit| std::cmp::Reverse(unit.tiles));
    let total: usize = units.iter().map(|unit| unit.tiles as usize).sum();
    let share = total.div_ceil(WARPS_PER_SM * limits.num_sms.max(1)).max(1) as u32;
    let (mut split, mut combine) = (Vec::with_capacity(units.len()), Vec::new());
    let mut used = 0;
    for unit in units {
        if unit.tiles <= share || used + unit.tiles as usize > limits.split_tiles {
            split.push(unit.words(unit.tile, unit.tiles, DIRECT));
            continue;
        }
        let slot = used as u32;
        let parts = unit.tiles.div_ceil(share);
        for part in 0..parts {
            let (from, to) = (unit.tiles * part / parts, unit.tiles * (part + 1) / parts);
            split.push(unit.words(unit.tile + from, to - from, slot + from));
        }
        combine.push(unit.words(unit.tile, unit.tiles, slot));
        used += unit.tiles as usize;
    }
    (split, combine)
}
