//! Results come back: I4 (one end, and nothing after it) and I8 (each stream is the one of the same request alone).

use tidemill_engine::{
    ids::SeqId,
    scheduler::{Effect, RowResult},
};

use crate::{
    model::{End, Fate},
    sim::Sim,
};

impl Sim {
    pub fn resolve(&mut self) {
        let (plan, output) = self.steps.finish().expect("the simulated device is never lost");
        for (row, result) in plan.rows.iter().zip(&output.rows) {
            let Some(live) = self.live.get_mut(&row.seq) else {
                self.seen.late_rows += 1;
                continue;
            };
            live.in_flight -= 1;
            if !row.pool_at.is_empty() && matches!(result, RowResult::Done(_)) {
                live.pooled = row.pool_at.end;
            }
        }
        self.flights.pop_front();
        let mut effects = std::mem::take(&mut self.effects);
        let sampled =
            plan.rows.iter().filter(|row| row.sample.is_some() && self.live.contains_key(&row.seq)).count();
        self.scheduler.resolve(plan, output, &mut effects);
        let tokens = effects.iter().filter(|effect| matches!(effect, Effect::Token { .. })).count();
        self.seen.forced += tokens.saturating_sub(sampled) as u64;
        self.take_notes();
        for effect in effects.drain(..) {
            self.commit(effect);
        }
        self.effects = effects;
    }

    /// I8: everything that a request gives is what it gives alone.
    fn commit(&mut self, effect: Effect) {
        match effect {
            Effect::Token { seq, token, finish, .. } => {
                let live = self.live(seq);
                let expected = live.script.tokens.get(live.known).copied();
                assert_eq!(Some(token), expected, "I8: {seq:?} differs from the same request alone");
                live.known += 1;
                let tenant = live.tenant;
                self.service.generated(seq, tenant);
                if let Some((reason, _)) = finish {
                    self.end(seq, End::Finished(reason));
                    self.seen.finished += 1;
                }
            }
            Effect::PromptLogprobs { seq, logprobs } => {
                let live = self.live(seq);
                for scored in logprobs {
                    let at = live.scored;
                    let expected = (live.script.prompt().get(at + 1), live.script.scores.get(at));
                    let given = (Some(&scored.token), Some(&scored.logprob));
                    assert_eq!(given, expected, "I8: {seq:?}: a prompt token is scored as alone, once");
                    live.scored += 1;
                }
            }
            Effect::Embedding { seq, values, .. } => {
                let live = self.live(seq);
                let expected = live.pooling.map(|pooling| live.script.embedding(pooling));
                assert_eq!(Some(values), expected, "I8: {seq:?} has another embedding than alone");
                let whole = live.whole;
                self.end(seq, End::Embedded);
                self.seen.embedded += 1;
                self.seen.whole += u64::from(whole);
            }
            Effect::Complete { seq } => {
                self.end(seq, End::Complete);
                self.seen.complete += 1;
            }
            Effect::Unformed { seq, .. } => {
                // Where no token that is allowed is finite, that is what its client hears.
                let end = self.live(seq).script.end;
                assert!(matches!(end, End::Unformed | End::Broken(Fate::NotFinite(_))), "{seq:?}: {end:?}");
                self.end(seq, end);
                self.seen.unformed += 1;
            }
            Effect::Failed { seq, error, .. } => {
                let fate = self.wires.borrow().fates.get(&seq).copied().unwrap_or_default();
                assert_eq!(matches!(fate, Fate::NotFinite(_)), error.is_none(), "{seq:?}: {error:?}");
                self.end(seq, End::Broken(fate));
                self.seen.broken += 1;
            }
        }
    }

    fn end(&mut self, seq: SeqId, end: End) {
        let live = self.live.remove(&seq).expect("I4: a second end");
        assert_eq!(
            (end, live.known),
            (live.script.end, live.script.tokens.len()),
            "I8: {seq:?} ends otherwise than alone"
        );
        if live.sampling.prompt_logprobs.is_some() && live.known > live.script.prompt_len {
            assert_eq!(live.scored + 1, live.script.prompt_len, "I8: every prompt token is scored");
        }
        assert!(self.scheduler.get(seq).is_none(), "I3: it has ended and is still there");
        self.close(live.request, seq);
        self.forget(seq, live.tenant);
        self.conversations.push_front((live.request, live.script.tokens));
        self.conversations.truncate(16);
    }

    /// I4: a completion ends once, and its request with the last of them.
    pub fn close(&mut self, request: u32, id: SeqId) {
        let open = self.requests.get_mut(&request).expect("I4: the request had ended");
        let at = open.seqs.iter().position(|&seq| seq == id).expect("I4: the completion had ended");
        open.seqs.remove(at);
        if open.seqs.is_empty() {
            self.requests.remove(&request);
        }
    }
}
