//! What must hold between steps.

use super::{Scheduler, sequence::Place};

impl Scheduler {
    /// Checks what must hold between steps: limits kept, the batch in order of rank, every sequence in one place, every reference accounted for.
    ///
    /// # Panics
    /// When it does not hold: a bug of the scheduler, never of a request.
    pub fn check(&self) {
        assert!(self.running.len() <= self.limits.max_num_seqs, "more rows than max_num_seqs");
        assert!(
            self.running.is_sorted_by_key(|id| self.rank(&self.seqs[id].turn)),
            "the batch is kept in order of rank"
        );
        assert!(self.pool.is_consistent(), "a block is in two states, or in none");
        let counts = self.pool.counts();
        assert_eq!(counts.free + counts.owned + counts.cached, counts.total);
        let mut references = vec![0; counts.total];
        for id in self.seqs.values().flat_map(|seq| seq.table.ids()) {
            references[id.0 as usize] += 1;
        }
        for (block, &references) in (0..).map(crate::ids::BlockId).zip(&references) {
            assert_eq!(self.pool.references(block), references, "{block:?} is owned by nobody, or twice");
        }
        let in_place = |place| self.seqs.values().filter(|seq| seq.place == place).count();
        assert_eq!(in_place(Place::Queue), self.waiting.len());
        assert_eq!(in_place(Place::Parked), self.num_parked);
        assert_eq!(in_place(Place::Held), self.num_held);
        assert_eq!(in_place(Place::Batch), self.running.len());
        for (id, seq) in &self.seqs {
            let running = seq.place == Place::Batch;
            assert_eq!(running, self.place_in_batch(&seq.turn).is_ok(), "{id:?} is in the wrong place");
            assert!(running || seq.table.ids().is_empty(), "a waiting sequence holds blocks");
            assert!(seq.place != Place::Parked || seq.is_unread, "parked, though its client reads");
            assert!(seq.table.capacity() >= seq.num_planned, "a planned token has no slot");
            assert!(seq.num_computed <= seq.num_planned, "computed, but never planned");
            assert!(!seq.is_in_flight() || (running && self.num_in_flight > 0), "planned, but in no step");
            assert!(seq.num_sampling() <= self.num_in_flight, "a step samples one token of a sequence");
            self.check_content(seq);
        }
    }

    /// What others can find in a sequence's blocks is what it has computed.
    fn check_content(&self, seq: &super::Sequence) {
        let size = self.pool.block_size();
        for (at, &block) in seq.table.ids().iter().enumerate() {
            if let Some(tokens) = self.pool.tokens_of(block) {
                let end = (at + 1) * size;
                assert!(end <= seq.num_computed, "a block can be found before it is computed");
                assert_eq!(
                    seq.tokens[at * size..end],
                    tokens,
                    "a block is found by other tokens than it holds"
                );
            }
        }
    }
}
