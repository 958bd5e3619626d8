//! The engine at work: who is in the batch, who waits, which block is whose, and what was aborted lately.

use std::time::Duration;

use crate::{ids::RequestId, output::AbortReceipt, scheduler::Stage};

/// The engine between two steps. Made when somebody asks, on the engine thread: its size and the work for it are bounded.
#[derive(Debug, Clone, PartialEq)]
pub struct Activity {
    /// Steps run since the start.
    pub steps: u64,
    /// Since the start.
    pub uptime: Duration,
    /// Rows that the batch can have.
    pub max_num_seqs: usize,
    /// The batch, in order of rank; at most [`Activity::MAX_ROWS`].
    pub rows: Vec<ActiveRow>,
    /// Rows of the batch that are not listed.
    pub rows_left_out: usize,
    /// Completions that wait for a row.
    pub num_waiting: usize,
    /// The first of them, at most [`Activity::MAX_WAITING`]: in the order in which they are served, but by arrival under fair shares,
    /// where whose turn it is comes out when a row is free. Completions for which another one reads the prompt are not listed.
    pub waiting: Vec<Waiter>,
    /// Which block is whose.
    pub blocks: BlockMap,
    /// What was aborted, oldest first; at most [`Activity::MAX_ABORTS`].
    pub aborts: Vec<PastAbort>,
}

impl Activity {
    /// Rows that are listed at most.
    pub const MAX_ROWS: usize = 256;
    /// Waiting completions that are listed at most.
    pub const MAX_WAITING: usize = 16;
    /// Aborts that are remembered.
    pub const MAX_ABORTS: usize = 32;
}

/// One completion in the batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ActiveRow {
    /// Its request.
    pub id: RequestId,
    /// Which of the request's completions.
    pub index: u32,
    /// [`Stage::Prefill`] or [`Stage::Decode`].
    pub stage: Stage,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens whose keys and values are in the KV cache.
    pub computed_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// KV blocks that it references, shared ones included.
    pub kv_blocks: usize,
}

/// One completion that waits for a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiter {
    /// Its request.
    pub id: RequestId,
    /// Which of the request's completions.
    pub index: u32,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated before it lost its row.
    pub completion_tokens: usize,
    /// It had a row before, and lost it to others or because its client did not read.
    pub is_resumed: bool,
}

/// What is in the KV blocks, in a form that can be drawn.
///
/// A cell stands for `blocks_per_cell` neighbouring blocks: 1, or as many as it takes to need no more than [`BlockMap::MAX_CELLS`] cells.
/// It says what is the busiest of them, so that nothing which is in use disappears: a row's before cached before free, and of several rows
/// the first. How many blocks are in which state is in [`EngineStats::kv_blocks`](crate::EngineStats::kv_blocks).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockMap {
    /// All blocks.
    pub total: usize,
    /// Blocks that a cell stands for; the last cell may stand for fewer.
    pub blocks_per_cell: usize,
    /// [`FREE`](Self::FREE), [`CACHED`](Self::CACHED), [`UNLISTED`](Self::UNLISTED), or [`FIRST_ROW`](Self::FIRST_ROW) `+ i` for
    /// what row `i` of [`Activity::rows`] references.
    pub cells: Vec<u16>,
}

impl BlockMap {
    /// Cells at most.
    pub const MAX_CELLS: usize = 4096;
    /// Nobody references it, and nothing is in it.
    pub const FREE: u16 = 0;
    /// Nobody references it, and its content is kept for reuse.
    pub const CACHED: u16 = 1;
    /// Referenced by rows that are not listed.
    pub const UNLISTED: u16 = 2;
    /// Referenced by the first row that is listed.
    pub const FIRST_ROW: u16 = 3;

    /// Blocks that a cell stands for in a pool of so many.
    pub(crate) fn blocks_per_cell(total: usize) -> usize {
        total.div_ceil(Self::MAX_CELLS).max(1)
    }
}

/// An abort that freed something.
#[derive(Debug, Clone, PartialEq)]
pub struct PastAbort {
    /// Rises by one from abort to abort.
    pub number: u64,
    /// When it took effect, since the start of the engine.
    pub at: Duration,
    /// Who asked for it.
    pub cause: AbortCause,
    /// What it freed.
    pub receipt: AbortReceipt,
}

/// How an abort came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AbortCause {
    /// Somebody called for it by the request's id.
    Called,
    /// The stream was dropped: its client cancelled it or went away.
    Dropped,
}
