//! A step: its way to the device, its run, its results.

use std::{ops::Range, sync::Arc};

use parking_lot::Mutex;

use crate::{
    KernelError,
    cuda::{
        CudaBatch, CudaOps,
        batch::{Group, Plan, States},
        decoder::lora::LoraStep,
        driver::Result,
        graphs::{GraphKey, GraphLists},
        layout::Layout,
        memory::{DeviceBuffer, Graph},
        ops::{
            AttentionKernels, BlockShape, LoraPlan, PADDING_INDEX, PADDING_SLOT, RESULT_WORDS, Sample,
            decode_results, encode, is_masked, list_words, sample as queue_sampler,
        },
        steps::{Slot, Steps},
        words::DeviceWords,
    },
    ops::{BatchMeta, Extent, StepResults},
    sampling::RowTask,
};

/// A step's results on their way.
pub struct CudaPending {
    pub(in crate::cuda) slot: Arc<Slot>,
    states: Option<States>,
    tasks: Arc<[RowTask]>,
}

pub(in crate::cuda) fn upload(
    ops: &CudaOps,
    meta: Arc<BatchMeta>,
    tasks: Arc<[RowTask]>,
) -> Result<CudaBatch> {
    let mut steps = ops.steps.lock();
    let padded = graph_rows(ops, &steps, &meta, &tasks);
    let extent = match padded {
        Some((rows, _)) => Extent { tokens: rows, logits_rows: rows, state_rows: 0 },
        None => Extent {
            tokens: meta.num_tokens(),
            logits_rows: meta.logits_indices.len(),
            state_rows: meta.state_indices.len(),
        },
    };
    let mut groups = groups(ops, extent, padded.map(|(_, lists)| lists), &tasks)?;
    let room = groups.iter().map(|group| group.shape.words()).sum();
    let layout = Layout::new(extent, room);
    let mut at = layout.tasks;
    for group in &mut groups {
        group.at = at;
        at += group.shape.words();
    }
    let plan = Plan::new(&meta, ops.config.attention.plan(ops.config.block_size), &steps.limits)?;
    let blocks: Vec<_> = groups.iter_mut().map(|g| (g.at, std::mem::take(&mut g.words))).collect();
    let mut words = layout.write(&meta, &blocks, &plan.words, [PADDING_SLOT, PADDING_INDEX]);
    let lora = (!meta.adapters.is_empty()).then(|| {
        let (plan, adapters) = LoraPlan::new(&meta);
        let at = words.len();
        words.extend(adapters);
        LoraStep { at, plan }
    });
    let lists = groups.iter().map(|group| group.shape.list_words).max().unwrap_or(0);
    steps.reserve(words.len(), lists)?;
    steps.send(&words)?;
    let graph = match (padded, groups.first()) {
        (Some((rows, lists)), Some(group)) => Some(GraphKey::new(rows, group.needs, lists)),
        _ => None,
    };
    // A graph holds every kernel that any decode step needs.
    let kernels = if graph.is_some() { AttentionKernels::DECODE } else { plan.kernels };
    let slot = steps.slot()?;
    let (plan_words, states) = (plan.words.len(), Mutex::default());
    Ok(CudaBatch { extent, layout, kernels, plan_words, lora, groups, tasks, graph, slot, states })
}

/// Rows of the graph that a step may run from, and the room for lists that it has.
fn graph_rows(
    ops: &CudaOps,
    steps: &Steps,
    meta: &BatchMeta,
    tasks: &[RowTask],
) -> Option<(usize, GraphLists)> {
    let rows = meta.num_rows();
    let decodes = meta.num_tokens() == rows && meta.logits_indices.len() == rows;
    let lists = GraphLists { masked: tasks.iter().any(is_masked) };
    // Which adapters there are changes what is launched.
    let decodes = decodes && meta.state_indices.is_empty() && meta.adapters.is_empty();
    let fits = list_words(tasks) <= lists.words(rows, ops.config.vocab);
    if decodes && fits { steps.graphs.padded(rows).map(|rows| (rows, lists)) } else { None }
}

/// Cuts a step's rows of logits into the groups in which the decoder computes them, each with its encoded tasks.
fn groups(ops: &CudaOps, extent: Extent, graph: Option<GraphLists>, tasks: &[RowTask]) -> Result<Vec<Group>> {
    let mut groups = Vec::new();
    for first in (0..extent.logits_rows).step_by(ops.config.max_logits_rows()) {
        let rows = first..extent.logits_rows.min(first + ops.config.max_logits_rows());
        let tasks = &tasks[first.min(tasks.len())..rows.end.min(tasks.len())];
        let list_words = match graph {
            Some(lists) => lists.words(rows.len(), ops.config.vocab),
            None => list_words(tasks),
        };
        let shape = BlockShape { rows: rows.len(), vocab: ops.config.vocab, list_words };
        let encoded = encode(shape, tasks)?;
        groups.push(Group { rows, shape, words: encoded.words, needs: encoded.needs, at: 0 });
    }
    Ok(groups)
}

pub(in crate::cuda) fn run(
    ops: &CudaOps,
    batch: &CudaBatch,
    mut queue: impl FnMut() -> Result<()> + Send,
) -> Result<()> {
    let Some(key) = batch.graph else { return queue() };
    if ops.steps.lock().graphs.get(key).is_none() {
        match Graph::capture(ops.device.driver.clone(), &mut queue) {
            Ok(graph) => ops.steps.lock().graphs.insert(key, graph),
            // No memory for one more graph is no reason to fail a step.
            Err(KernelError::Device { .. } | KernelError::OutOfMemory { .. }) => return queue(),
            Err(error) => return Err(error),
        }
    }
    let steps = ops.steps.lock();
    match steps.graphs.get(key) {
        // SAFETY: graphs are cleared whenever memory they use moves; weights and buffers live as long as the decoder, whose
        // steps alone come here.
        Some(graph) => unsafe { graph.launch() },
        None => Ok(()),
    }
}

pub(in crate::cuda) fn sample(
    ops: &CudaOps,
    logits: &mut DeviceBuffer,
    batch: &CudaBatch,
    rows: Range<usize>,
) -> Result<()> {
    let mut steps = ops.steps.lock();
    let group = batch.group(&rows)?;
    let Steps { arena, sampler, feedback, .. } = &mut *steps;
    let words = DeviceWords::new;
    queue_sampler(
        &ops.device,
        Sample {
            sampler,
            logits,
            block: words(arena).part(group.at, group.shape.words())?,
            shape: group.shape,
            feedback: words(feedback).part(rows.start, rows.len())?,
            needs: group.needs,
        },
    )?;
    // The next group overwrites the results. A graph has one group, and a slot changes from step to step.
    if batch.graph.is_none() { steps.fetch(&batch.slot, rows.start, rows.len()) } else { Ok(()) }
}

pub(in crate::cuda) fn states(
    ops: &CudaOps,
    x: &DeviceBuffer,
    batch: &CudaBatch,
    width: usize,
) -> Result<()> {
    let elems = batch.extent.state_rows * width;
    let memory = ops.steps.lock().fetch_states(x, elems)?;
    *batch.states.lock() = Some(States { memory, elems });
    Ok(())
}

pub(in crate::cuda) fn results(ops: &CudaOps, batch: CudaBatch) -> Result<CudaPending> {
    if batch.graph.is_some() {
        ops.steps.lock().fetch(&batch.slot, 0, batch.tasks.len())?;
    }
    batch.slot.sent()?;
    Ok(CudaPending { slot: batch.slot, states: batch.states.into_inner(), tasks: batch.tasks })
}

pub(in crate::cuda) fn wait(pending: CudaPending) -> Result<StepResults> {
    pending.slot.wait()?;
    let words = pending.tasks.len() * RESULT_WORDS;
    // SAFETY: the slot holds the rows of the largest step; its copy was waited for; nobody else has the slot.
    let words = unsafe { std::slice::from_raw_parts(pending.slot.memory.ptr().cast::<u32>(), words) };
    let states = pending.states.map_or(Vec::new(), |States { memory, elems }| {
        // SAFETY: the copy of so many was queued before the event that was waited for above.
        unsafe { memory.read(elems) }
    });
    Ok(StepResults { sampled: decode_results(words, &pending.tasks), states })
}
