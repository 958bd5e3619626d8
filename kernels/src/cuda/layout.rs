//! A step's metadata: one array of words, sent to one place on the device in one copy.
//!
//! Kernels that run from a graph were recorded with fixed addresses, so a section begins at a place that the step's [`Extent`] alone
//! decides. The sections whose length varies from step to step come last; what lies in them is found through offsets.

use crate::ops::{BatchMeta, Extent};

/// Sections begin at multiples of 16 bytes.
const ALIGN: usize = 4;

/// Where the sections of a step begin, in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// `[T]`.
    pub token_ids: usize,
    /// `[T]`.
    pub positions: usize,
    /// `[T]`, 0 where the step names none.
    pub segments: usize,
    /// `[T]`.
    pub slot_mapping: usize,
    /// `[R]`, and behind them the `[E]` of the hidden states.
    pub logits_indices: usize,
    /// The encoded tasks of the first group of rows of logits.
    pub tasks: usize,
    /// The attention plan.
    pub plan: usize,
}

impl Layout {
    /// `task_words`: the room for encoded tasks.
    pub fn new(extent: Extent, task_words: usize) -> Self {
        let mut end = 0;
        let mut section = |words: usize| {
            let start = end;
            end += words.next_multiple_of(ALIGN);
            start
        };
        Self {
            token_ids: section(extent.tokens),
            positions: section(extent.tokens),
            segments: section(extent.tokens),
            slot_mapping: section(extent.tokens),
            logits_indices: section(extent.logits_rows + extent.state_rows),
            tasks: section(task_words),
            plan: section(0),
        }
    }

    /// Writes the sections. `tasks` are encoded tasks, each with the word at which it begins; padding tokens go to `no_slot`, padding
    /// rows read `no_row`.
    pub fn write(
        &self,
        meta: &BatchMeta,
        tasks: &[(usize, Vec<u32>)],
        plan: &[u32],
        [no_slot, no_row]: [u32; 2],
    ) -> Vec<u32> {
        let mut words = vec![0; self.plan];
        words[self.slot_mapping..self.logits_indices].fill(no_slot);
        words[self.logits_indices..self.tasks].fill(no_row);
        let mut put = |at: usize, values: &[u32]| words[at..at + values.len()].copy_from_slice(values);
        put(self.token_ids, &meta.token_ids);
        put(self.positions, &meta.positions);
        put(self.segments, &meta.segments);
        put(self.slot_mapping, &meta.slot_mapping);
        put(self.logits_indices, &meta.logits_indices);
        // Where there are any the step is not padded.
        put(self.logits_indices + meta.logits_indices.len(), &meta.state_indices);
        tasks.iter().for_each(|(at, tasks)| put(*at, tasks));
        words.extend_from_slice(plan);
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_touches_nothing_and_the_plan_stands_where_the_extent_says() {
        let meta = BatchMeta {
            token_ids: vec![7, 8, 9],
            positions: vec![5, 0, 3],
            slot_mapping: vec![21, 48, 3],
            segments: vec![1, 0, 1],
            logits_indices: vec![0, 2],
            ..BatchMeta::default()
        };
        let layout = Layout::new(Extent { tokens: 6, logits_rows: 4, state_rows: 0 }, 7);
        let words = layout.write(&meta, &[(layout.tasks, vec![1, 2, 3])], &[4, 5], [88, 99]);
        assert_eq!(words[layout.token_ids..][..6], [7, 8, 9, 0, 0, 0]);
        assert_eq!(words[layout.positions..][..6], [5, 0, 3, 0, 0, 0]);
        assert_eq!(words[layout.segments..][..6], [1, 0, 1, 0, 0, 0]);
        assert_eq!(words[layout.slot_mapping..][..6], [21, 48, 3, 88, 88, 88]);
        assert_eq!(words[layout.logits_indices..][..4], [0, 2, 99, 99]);
        assert_eq!(words[layout.tasks..][..7], [1, 2, 3, 0, 0, 0, 0]);
        assert_eq!(words[layout.plan..], [4, 5]);
        let Layout { token_ids, positions, segments, slot_mapping, tasks, plan, .. } = layout;
        let sections = [token_ids, positions, segments, slot_mapping, tasks, plan];
        assert!(sections.iter().all(|at| at % ALIGN == 0));
    }

    #[test]
    fn hidden_states_are_gathered_by_what_stands_behind_the_rows_of_logits() {
        let meta =
            BatchMeta { logits_indices: vec![5, 2], state_indices: vec![1, 4, 6], ..BatchMeta::default() };
        let layout = Layout::new(Extent { tokens: 7, logits_rows: 2, state_rows: 3 }, 0);
        let words = layout.write(&meta, &[], &[], [88, 99]);
        assert_eq!(words[layout.logits_indices..][..5], [5, 2, 1, 4, 6]);
        assert!(layout.tasks >= layout.logits_indices + 5);
    }
}
