//! What the steps of a device share: where their metadata goes, what they sample with, how results come back.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use super::{
    CudaConfig, Device,
    driver::{DevPtr, Pinned, Result},
    graphs::Graphs,
    memory::{DeviceBuffer, DeviceMemory, Event, PinnedMemory},
    ops::{AttentionWorkspace, BlockShape, PlanLimits, RESULT_WORDS, Sampler, mask_words},
    words::DeviceWords,
};
use crate::tensor::DType;

/// Words for the lists of a step's tasks at first, beside a mask for each row; grows when a step needs more.
const LIST_WORDS: usize = 16 << 10;
/// Tiles of 128 positions whose attention may be computed apart.
const SPLIT_TILES: usize = 4096;

/// Memory that serves one step after the other.
pub(super) struct Steps {
    device: Device,
    /// Where a step's words lie on the device. One is enough: the stream orders its copies and readers.
    pub arena: DeviceMemory,
    staging: Vec<Staging>,
    slots: Vec<Arc<Slot>>,
    slot_words: usize,
    /// Empty until a step wants hidden states: most servers never see one.
    state_memories: Vec<Arc<StateMemory>>,
    pub sampler: Sampler,
    pub workspace: AttentionWorkspace,
    /// `[R]` the tokens sampled last.
    pub feedback: DeviceMemory,
    pub limits: PlanLimits,
    pub graphs: Graphs,
}

/// Pinned memory that a step's words are sent from.
struct Staging {
    memory: PinnedMemory,
    sent: Event,
}

/// Pinned memory that a step's results come to.
pub(super) struct Slot {
    pub memory: PinnedMemory,
    arrived: Event,
    /// The event was recorded and has not been waited for.
    under_way: AtomicBool,
}

impl Slot {
    /// Queues the event behind everything that the step writes.
    pub fn sent(&self) -> Result<()> {
        self.under_way.store(true, Relaxed);
        self.arrived.record()
    }

    /// Waits until everything is there.
    pub fn wait(&self) -> Result<()> {
        self.arrived.wait()?;
        self.under_way.store(false, Relaxed);
        Ok(())
    }

    /// Whether everything is there.
    pub fn is_there(&self) -> Result<bool> {
        self.arrived.is_reached()
    }
}

// SAFETY: a slot's memory is read by the one holder of its step's results, after the event; the device writes it before.
unsafe impl Sync for Slot {}

/// Pinned memory that a step's hidden states come to.
pub(super) struct StateMemory(PinnedMemory);

impl StateMemory {
    /// The first `elems` states, bf16 as they come from the device.
    ///
    /// # Safety
    /// The copy of the step that holds this memory, of at least so many states, was waited for.
    pub unsafe fn read(&self, elems: usize) -> Vec<f32> {
        // SAFETY: the memory holds them (`Steps::fetch_states`), they were written, and nobody writes now.
        let words = unsafe { std::slice::from_raw_parts(self.0.ptr().cast::<u16>(), elems) };
        words.iter().map(|&bits| half::bf16::from_bits(bits).to_f32()).collect()
    }
}

// SAFETY: as for `Slot`.
unsafe impl Sync for StateMemory {}

impl Steps {
    pub fn new(device: &Device, config: &CudaConfig, max_logits_rows: usize) -> Result<Self> {
        let driver = &device.driver;
        // Growing costs all graphs, and the first step with masks should not.
        let masks = max_logits_rows * mask_words(config.vocab);
        let list_words = LIST_WORDS + masks;
        let shape = BlockShape { rows: max_logits_rows, vocab: config.vocab, list_words };
        let limits = PlanLimits {
            max_tokens: config.max_tokens,
            max_rows: config.max_rows,
            split_tiles: SPLIT_TILES,
            num_sms: driver.info().num_sms as usize,
        };
        Ok(Self {
            arena: DeviceMemory::new(driver.clone(), 4 * (usual_words(config) + masks), "step metadata")?,
            staging: Vec::new(),
            slots: Vec::new(),
            state_memories: Vec::new(),
            slot_words: config.max_tokens.max(max_logits_rows) * RESULT_WORDS,
            sampler: Sampler::new(device, shape)?,
            workspace: AttentionWorkspace::new(device, SPLIT_TILES, config.attention.value_dim())?,
            // A prompt whose every position is scored has a row of logits per token.
            feedback: DeviceMemory::new(
                driver.clone(),
                4 * config.max_tokens.max(max_logits_rows),
                "sampled tokens",
            )?,
            limits,
            graphs: if config.graphs && config.attention.decodes() {
                Graphs::new(config.max_rows.min(config.max_tokens).min(max_logits_rows))
            } else {
                Graphs::off()
            },
            device: device.clone(),
        })
    }

    /// Makes room for a step of `words` words whose tasks have `list_words` words of lists.
    ///
    /// # Errors
    /// [`crate::KernelError::OutOfMemory`]; what steps before have left.
    pub fn reserve(&mut self, words: usize, list_words: usize) -> Result<()> {
        let shape = self.sampler.shape();
        if 4 * words <= self.arena.bytes() && list_words <= shape.list_words {
            return Ok(());
        }
        // Steps in flight and graphs use what is about to move.
        self.device.driver().synchronize()?;
        self.graphs.clear();
        if 4 * words > self.arena.bytes() {
            let bytes = 4 * words.next_power_of_two();
            self.arena = DeviceMemory::new(self.device.driver.clone(), bytes, "step metadata")?;
        }
        if list_words > shape.list_words {
            let shape = BlockShape { list_words: list_words.next_power_of_two(), ..shape };
            self.sampler = Sampler::new(&self.device, shape)?;
        }
        Ok(())
    }

    /// Queues the copy of a step's words to the arena, which has room for them.
    pub fn send(&mut self, words: &[u32]) -> Result<()> {
        let bytes = 4 * words.len();
        // The buffer used longest ago: its copy is over unless the host is several steps ahead.
        let mut staging = if self.staging.len() < 3 {
            self.new_staging(bytes)?
        } else {
            let oldest = self.staging.remove(0);
            oldest.sent.wait()?;
            if oldest.memory.bytes() < bytes { self.new_staging(bytes)? } else { oldest }
        };
        // SAFETY: its last copy was waited for, or it has none yet.
        let target = unsafe { staging.memory.bytes_mut() };
        for (target, word) in target.chunks_exact_mut(4).zip(words) {
            target.copy_from_slice(&word.to_le_bytes());
        }
        // SAFETY: the arena holds the bytes (`reserve`); the source is left alone until its event was waited for.
        unsafe { self.device.driver().copy_to_device(self.arena.ptr(), staging.memory.ptr(), bytes) }?;
        staging.sent.record()?;
        self.staging.push(staging);
        Ok(())
    }

    fn new_staging(&self, bytes: usize) -> Result<Staging> {
        let bytes = bytes.next_power_of_two().max(64 << 10);
        let memory = PinnedMemory::new(self.device.driver.clone(), bytes, Pinned::Upload)?;
        Ok(Staging { memory, sent: Event::new(self.device.driver.clone())? })
    }

    /// Memory for a step's results that no other step holds.
    pub fn slot(&mut self) -> Result<Arc<Slot>> {
        if let Some(slot) = self.slots.iter().find(|slot| Arc::strong_count(slot) == 1) {
            // Its step was given up, and nobody has waited.
            if slot.under_way.load(Relaxed) {
                slot.wait()?;
            }
            return Ok(slot.clone());
        }
        let driver = &self.device.driver;
        let memory = PinnedMemory::new(driver.clone(), 4 * self.slot_words, Pinned::Readback)?;
        let slot = Arc::new(Slot {
            memory,
            arrived: Event::new(driver.clone())?,
            under_way: AtomicBool::new(false),
        });
        self.slots.push(slot.clone());
        Ok(slot)
    }

    /// Queues the copy of the sampler's results of `rows` rows to `slot`, as the rows from `first` on.
    pub fn fetch(&self, slot: &Slot, first: usize, rows: usize) -> Result<()> {
        let bytes = 4 * rows * RESULT_WORDS;
        let src: DevPtr = self.sampler.results().at_least("results", "results", rows * RESULT_WORDS)?;
        // SAFETY: a slot has room for the rows of the largest step, and is read only after its event.
        unsafe {
            let dst = slot.memory.ptr().add(4 * first * RESULT_WORDS);
            self.device.driver().copy_to_host(dst, src, bytes)
        }
    }

    /// Queues the copy of `elems` hidden states, bf16, to memory that no other step holds.
    pub fn fetch_states(&mut self, x: &DeviceBuffer, elems: usize) -> Result<Arc<StateMemory>> {
        let src = x.at_least("states", "x", DType::Bf16, elems)?;
        let memory = self.state_memory(elems * DType::Bf16.size())?;
        // SAFETY: both ranges were checked above; nobody else holds the memory, and its step reads it after the event.
        unsafe { self.device.driver().copy_to_host(memory.0.ptr(), src, elems * DType::Bf16.size()) }?;
        Ok(memory)
    }

    /// Sizes double, so all that is kept is less than twice what the steps in flight have needed at most.
    fn state_memory(&mut self, bytes: usize) -> Result<Arc<StateMemory>> {
        let free = |memory: &&Arc<StateMemory>| Arc::strong_count(memory) == 1;
        if let Some(memory) = self.state_memories.iter().filter(free).find(|m| m.0.bytes() >= bytes) {
            return Ok(memory.clone());
        }
        let bytes = bytes.next_power_of_two().max(64 << 10);
        let memory = PinnedMemory::new(self.device.driver.clone(), bytes, Pinned::Readback)?;
        let memory = Arc::new(StateMemory(memory));
        self.state_memories.push(memory.clone());
        Ok(memory)
    }

    /// `[R]` the tokens sampled last.
    pub fn feedback(&self) -> DeviceWords<'_> {
        DeviceWords::new(&self.feedback)
    }

    /// A part of the arena.
    pub fn words(&self, at: usize, words: usize) -> Result<DeviceWords<'_>> {
        DeviceWords::new(&self.arena).part(at, words)
    }
}

/// Words of the largest step without long lists of tasks: metadata, attention items, and block tables of full contexts. A step that
/// needs more grows the arena, which costs all graphs.
fn usual_words(config: &CudaConfig) -> usize {
    let tables = config.max_rows * config.max_model_len.div_ceil(config.block_size);
    let heads = config.attention.heads();
    let items =
        heads.num_kv_heads * config.max_rows + 2 * SPLIT_TILES + config.max_tokens * heads.num_heads / 16;
    5 * config.max_tokens + 64 * config.max_rows + 8 * items + tables
}

impl Drop for Steps {
    fn drop(&mut self) {
        // Pinned memory and graphs must outlive what is queued. A lost device runs nothing any more.
        let _ = self.device.driver().synchronize();
    }
}
