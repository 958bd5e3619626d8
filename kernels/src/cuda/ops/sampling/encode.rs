//! Tasks as words: the block that the sampler's kernels read.
//!
//! ```text
//! [rows] tasks of 20 words each, as `Task` in sampling.cuh has them (rows without a task: zeros)
//! lists of all rows, one row after the other:
//!     (token, bias as f32)     num_biases times
//!     (token, count)           num_counts times
//!     token                    num_forbidden times
//!     bits of allowed tokens   ceil(V / 32) words, lowest token in the lowest bit; only rows with a mask
//! ```
//!
//! The lists' room is fixed when a graph is captured, as the block's size is. A step that needs more is refused by [`encode`]; its caller,
//! who can ask [`list_words`] beforehand, splits the step or runs it with a larger block outside of the graph.

use super::{MAX_TOP, OP};
use crate::{
    KernelError,
    cuda::driver::Result,
    sampling::{RowTask, SampleSpec},
};

const TASK_WORDS: usize = 20;

const ACTIVE: u32 = 1;
const SCORE: u32 = 2;
const GREEDY: u32 = 4;
const FILTERED: u32 = 8;
const EDITED: u32 = 16;
const MASKED: u32 = 32;
const LOGPROBS: u32 = 64;

/// Extents of a block of tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockShape {
    /// R, padding rows included.
    pub rows: usize,
    /// V.
    pub vocab: usize,
    /// Words for the lists of all rows together.
    pub list_words: usize,
}

impl BlockShape {
    /// Words of a whole block.
    pub fn words(self) -> usize {
        self.rows * TASK_WORDS + self.list_words
    }
}

/// Which kernels a step needs beyond those that every step needs. A row's result does not depend on what others need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs {
    /// A row has top-k, top-p or min-p.
    pub filters: bool,
    /// A row asks for log-probabilities.
    pub logprobs: bool,
}

impl Needs {
    /// What a graph is captured with that shall serve every step.
    pub const ALL: Needs = Needs { filters: true, logprobs: true };
}

/// A step's tasks, ready for the device.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// The block: at most [`BlockShape::words`]; what it lacks of them is never read.
    pub words: Vec<u32>,
    /// What its tasks need.
    pub needs: Needs,
}

/// Words that the lists of `tasks` take, masks included.
pub fn list_words(tasks: &[RowTask]) -> usize {
    let lists = |task: &RowTask| match task {
        RowTask::Score(..) => 0,
        RowTask::Sample(spec, _) => {
            let mask = spec.allowed.as_ref().map_or(0, |mask| mask.len());
            2 * spec.logit_bias.len() + 2 * spec.token_counts.len() + spec.forbidden.len() + mask
        }
    };
    tasks.iter().map(lists).sum()
}

/// Words of one row's mask.
pub fn mask_words(vocab: usize) -> usize {
    vocab.div_ceil(32)
}

/// Whether a task has a mask.
pub fn is_masked(task: &RowTask) -> bool {
    matches!(task, RowTask::Sample(SampleSpec { allowed: Some(_), .. }, _))
}

/// Encodes `tasks`, at most `shape.rows` of them. A task's `logit_bias` and `token_counts` name each token once.
///
/// # Errors
/// [`KernelError::Shape`] when there are more tasks than rows, the lists have no room, or a mask has another length;
/// [`KernelError::Unsupported`] when a token is not below V, or more than [`MAX_TOP`] log-probabilities are asked for.
pub fn encode(shape: BlockShape, tasks: &[RowTask]) -> Result<Encoded> {
    let refuse = |what: &str, got: usize, expected: usize| {
        Err(KernelError::Shape { op: OP, what: what.into(), got: vec![got], expected: vec![expected] })
    };
    if tasks.len() > shape.rows {
        return refuse("tasks", tasks.len(), shape.rows);
    }
    let lists = list_words(tasks);
    if lists > shape.list_words {
        return refuse("lists of the tasks", lists, shape.list_words);
    }
    let mut block = Block {
        vocab: shape.vocab,
        words: vec![0; shape.rows * TASK_WORDS],
        saved: 0,
        needs: Needs::default(),
    };
    block.words.reserve_exact(lists);
    for (row, task) in tasks.iter().enumerate() {
        if let RowTask::Sample(SampleSpec { allowed: Some(mask), .. }, _) = task
            && mask.len() != mask_words(shape.vocab)
        {
            return refuse("words of allowed tokens", mask.len(), mask_words(shape.vocab));
        }
        let record = match task {
            RowTask::Score(token, top) => block.score(*token, *top)?,
            RowTask::Sample(spec, top) => block.sample(spec, *top)?,
        };
        block.words[row * TASK_WORDS..][..TASK_WORDS].copy_from_slice(&record);
    }
    Ok(Encoded { words: block.words, needs: block.needs })
}

/// A block in the making: records first, lists behind them.
struct Block {
    vocab: usize,
    words: Vec<u32>,
    /// List entries so far: each has a place for its raw logit on the device.
    saved: u32,
    needs: Needs,
}

impl Block {
    fn token(&self, token: u32) -> Result<u32> {
        if (token as usize) < self.vocab {
            return Ok(token);
        }
        let detail = format!("token {token} is outside of the vocabulary of {}", self.vocab);
        Err(KernelError::Unsupported { op: OP, detail })
    }

    fn top(&mut self, top: u32) -> Result<u32> {
        self.needs.logprobs = true;
        if top as usize <= MAX_TOP {
            return Ok(top);
        }
        let detail = format!("{top} log-probabilities are asked for; at most {MAX_TOP} are given");
        Err(KernelError::Unsupported { op: OP, detail })
    }

    fn score(&mut self, token: u32, top: u32) -> Result<[u32; TASK_WORDS]> {
        let mut record = [0; TASK_WORDS];
        record[..3].copy_from_slice(&[ACTIVE | SCORE | LOGPROBS, self.token(token)?, self.top(top)?]);
        Ok(record)
    }

    fn sample(&mut self, spec: &SampleSpec, top: Option<u32>) -> Result<[u32; TASK_WORDS]> {
        let mask = spec.allowed.as_deref();
        // As many as there are tokens, or more, are all of them.
        let top_k = if (spec.top_k as usize) < self.vocab { spec.top_k } else { 0 };
        let filtered = top_k > 0 || spec.top_p < 1.0 || spec.min_p > 0.0;
        let mut flags = ACTIVE;
        if spec.temperature == 0.0 {
            flags |= GREEDY;
        } else if filtered {
            flags |= FILTERED;
            self.needs.filters = true;
        }
        let (top, wanted) = match top {
            Some(top) => (self.top(top)?, LOGPROBS),
            None => (0, 0),
        };
        let lists = self.words.len() as u32;
        let [num_biases, num_counts, num_forbidden] = self.lists(spec)?;
        let (saved, entries) = (self.saved, num_biases + num_counts + num_forbidden);
        self.saved += entries;
        flags |= wanted | if entries > 0 { EDITED } else { 0 } | if mask.is_some() { MASKED } else { 0 };
        let mask_at = self.words.len() as u32;
        self.words.extend_from_slice(mask.unwrap_or_default());
        Ok([
            flags,
            0,
            top,
            spec.temperature.to_bits(),
            top_k,
            spec.top_p.to_bits(),
            spec.min_p.to_bits(),
            spec.seed as u32,
            (spec.seed >> 32) as u32,
            spec.position,
            spec.repetition_penalty.to_bits(),
            spec.presence_penalty.to_bits(),
            spec.frequency_penalty.to_bits(),
            lists,
            num_biases,
            num_counts,
            num_forbidden,
            mask_at,
            saved,
            0,
        ])
    }

    /// Appends the three lists and returns their lengths.
    fn lists(&mut self, spec: &SampleSpec) -> Result<[u32; 3]> {
        for &(token, bias) in &spec.logit_bias {
            let token = self.token(token)?;
            self.words.extend([token, bias.to_bits()]);
        }
        for &(token, count) in &spec.token_counts {
            let token = self.token(token)?;
            self.words.extend([token, count]);
        }
        // Twice the same would keep the edited logit as the raw one.
        let mut forbidden = spec.forbidden.clone();
        forbidden.sort_unstable();
        forbidden.dedup();
        for &token in &forbidden {
            let token = self.token(token)?;
            self.words.push(token);
        }
        Ok([spec.logit_bias.len() as u32, spec.token_counts.len() as u32, forbidden.len() as u32])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn spec() -> SampleSpec {
        SampleSpec {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0x0123_4567_89ab_cdef,
            position: 7,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            token_counts: vec![(3, 2), (4, 0)],
            logit_bias: vec![(5, 1.5)],
            forbidden: vec![9, 1, 9],
            allowed: None,
        }
    }

    fn masked(allowed: &[u32]) -> SampleSpec {
        SampleSpec { allowed: Some(allowed.into()), ..spec() }
    }

    const SHAPE: BlockShape = BlockShape { rows: 3, vocab: 40, list_words: 12 };

    #[test]
    fn lists_follow_the_records_and_padding_rows_are_zeros() {
        let tasks = [RowTask::Score(8, 4), RowTask::Sample(masked(&[6, 7]), None)];
        let Encoded { words, needs } = encode(SHAPE, &tasks).unwrap();
        assert_eq!(needs, Needs { filters: false, logprobs: true });
        assert_eq!(words[..3], [ACTIVE | SCORE | LOGPROBS, 8, 4]);
        assert_eq!(words[20], ACTIVE | EDITED | MASKED);
        assert_eq!(words[27..30], [0x89ab_cdef, 0x0123_4567, 7]);
        assert_eq!(words[33..39], [60, 1, 2, 2, 68, 0]);
        assert_eq!(words[40..60], [0; 20]);
        assert_eq!(words[60..], [5, 1.5_f32.to_bits(), 3, 2, 4, 0, 1, 9, 6, 7]);
        assert!(words.len() <= SHAPE.words());
    }

    #[test]
    fn a_top_k_of_the_whole_vocabulary_is_no_filter() {
        let needs = |spec: SampleSpec| encode(SHAPE, &[RowTask::Sample(spec, None)]).unwrap().needs;
        assert!(!needs(SampleSpec { top_k: 40, ..spec() }).filters);
        assert!(needs(SampleSpec { top_k: 39, ..spec() }).filters);
        assert!(needs(SampleSpec { top_p: 0.9, ..spec() }).filters);
        assert!(needs(SampleSpec { min_p: 0.1, ..spec() }).filters);
        assert!(!needs(SampleSpec { min_p: 0.1, temperature: 0.0, ..spec() }).filters);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let one = [RowTask::Sample(masked(&[0, 0]), Some(20))];
        assert_eq!(list_words(&one), 11);
        let shape = |list_words| BlockShape { list_words, ..SHAPE };
        assert!(encode(shape(11), &one).is_ok());
        let refused = |result| matches!(result, Err(KernelError::Shape { op: "sample", .. }));
        assert!(refused(encode(shape(10), &one)));
        assert!(refused(encode(SHAPE, &[RowTask::Sample(masked(&[0]), None)])));
        assert!(refused(encode(SHAPE, &vec![RowTask::Score(0, 0); 4])));
        let unsupported =
            |task| matches!(encode(SHAPE, &[task]), Err(KernelError::Unsupported { op: "sample", .. }));
        assert!(unsupported(RowTask::Score(40, 0)));
        assert!(unsupported(RowTask::Score(0, 21)));
        assert!(unsupported(RowTask::Sample(SampleSpec { forbidden: vec![40], ..spec() }, None)));
        assert!(unsupported(RowTask::Sample(SampleSpec { logit_bias: vec![(40, 0.0)], ..spec() }, None)));
        assert!(unsupported(RowTask::Sample(SampleSpec { token_counts: vec![(40, 0)], ..spec() }, None)));
    }
}
