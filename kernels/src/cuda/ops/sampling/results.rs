//! Results as words: what the sampler's kernels write for each row.

use super::MAX_TOP;
use crate::sampling::{Logprobs, RowTask, Sampled};

/// Words of one row's result: token, finite, log-probability, rank, number of largest tokens, three unused, [`MAX_TOP`] tokens,
/// as many log-probabilities. Without log-probabilities the rank is 0 and
/// the rest is not written.
pub const RESULT_WORDS: usize = 8 + 2 * MAX_TOP;

/// Reads the results of `tasks` from `words`, `[R, RESULT_WORDS]` with R at least the number of tasks.
///
/// # Panics
/// When there are fewer words.
pub fn decode_results(words: &[u32], tasks: &[RowTask]) -> Vec<Sampled> {
    assert!(words.len() >= tasks.len() * RESULT_WORDS, "a result for each task");
    tasks.iter().zip(words.chunks_exact(RESULT_WORDS)).map(|(task, words)| one(words, task)).collect()
}

fn one(words: &[u32], task: &RowTask) -> Sampled {
    let (token, finite) = (words[0], words[1] != 0);
    let asked = !matches!(task, RowTask::Sample(_, None));
    let there = words[3] != 0;
    let logprobs = (asked && finite && there).then(|| {
        let (ids, values) = words[8..].split_at(MAX_TOP);
        let top = ids.iter().zip(values).take((words[4] as usize).min(MAX_TOP));
        Logprobs {
            logprob: f32::from_bits(words[2]),
            rank: words[3],
            top: top.map(|(&id, &value)| (id, f32::from_bits(value))).collect(),
        }
    });
    Sampled { token, logprobs, finite }
}
