//! Requests come in: what an arrival's data say becomes prompts and sequences.

use std::sync::Arc;

use tidemill_engine::{
    adapter::{Adapter, AdapterId},
    constraint::Constraint,
    ids::{SeqId, TenantId, TokenId},
    kv::BlockHash,
    sampling::Sampling,
    scheduler::{NewSequence, Policy},
};

use crate::{
    forms::Fake,
    model::{EOS, Fate, Part, Script, VOCAB, mix},
    sampling,
    scenario::{Arrival, Whom},
    sim::{Live, Request, Sim, Where, pin},
};

impl Sim {
    /// What an ended request read and wrote.
    fn conversation(&self, whom: Whom) -> Vec<TokenId> {
        let mut ended = self.conversations.iter();
        let found = match whom {
            Whom::Request(id) => ended.find(|(request, _)| *request == id),
            Whom::Any(back) => ended.nth(usize::from(back)),
        };
        pin(found.map(|&(request, _)| request));
        found.map(|(_, tokens)| tokens.clone()).unwrap_or_default()
    }

    fn prompt(&self, arrival: &Arrival) -> Vec<TokenId> {
        let mut prompt = arrival.follows.map_or(Vec::new(), |whom| self.conversation(whom));
        let size = self.config.block_size as u64;
        let token = |of: u64| TokenId((mix(of) % u64::from(VOCAB)) as u32);
        prompt.extend((0..u64::from(arrival.shared)).map(|at| match (arrival.family, at) {
            // As below, but for the first token.
            (4, 0) => token(4),
            // Every block has the same tokens, so only what came before tells them apart.
            (3 | 4, at) => token(at % size),
            // As family 0, but for the first token.
            (1, 0) => token(1 << 32),
            (0 | 1, at) => token(at),
            (family, at) => token(u64::from(family) << 40 | at),
        }));
        let own = mix(self.config.key ^ u64::from(arrival.id));
        prompt.extend((0..u64::from(arrival.tail)).map(|at| token(own ^ at)));
        prompt
    }

    pub fn arrive(&mut self, arrival: &Arrival) {
        let prompt = self.prompt(arrival);
        let max_tokens = if arrival.pooling.is_some() { 1 } else { usize::from(arrival.max_tokens) };
        let n = if arrival.pooling.is_some() { 1 } else { u64::from(arrival.n) };
        let mine = self.live.values().filter(|live| live.tenant == usize::from(arrival.tenant)).count();
        let flood = self.config.policy == Policy::Fair && mine >= self.config.max_live.div_ceil(2);
        if flood || self.live.len() >= self.config.max_live || prompt.is_empty() {
            return;
        }
        let room = self.config.blocks * self.config.block_size;
        let fits = self.scheduler.fits(prompt.len(), max_tokens);
        assert_eq!(fits, prompt.len() + max_tokens - 1 <= room, "I5: what fits is known at admission");
        // Follow-ups grow without end.
        if !fits || prompt.len() > 120 {
            self.seen.refused += 1;
            return;
        }
        let first = SeqId(self.next_seq);
        let prompt: Arc<[TokenId]> = prompt.into();
        let (root, domain) = self.root(arrival);
        let seqs: Vec<SeqId> = (0..n).map(|index| SeqId(first.0 + index)).collect();
        self.next_seq += n;
        for &id in &seqs {
            let live = self.sequence(arrival, &prompt, id, Origin { first, domain });
            self.scheduler.add(NewSequence {
                id,
                prompt: prompt.clone(),
                sampling: live.sampling.clone(),
                seed: seed_of(arrival, id, first),
                prompt_of: live.prompt_of,
                priority: live.priority,
                tenant: tenant_id(live.tenant),
                pooling: live.pooling,
                is_whole: live.whole,
                segments: None,
                root,
                adapter: adapter(live.adapter),
                constraint: arrival.form.then(|| Fake::new(seed_of(arrival, id, first)).fork()),
            });
            if live.prompt_of.is_none() {
                self.service.queue(id, live.tenant);
            }
            self.live.insert(id, live);
        }
        let deadline = arrival.patience.map(|patience| self.now + u64::from(patience));
        self.requests.insert(arrival.id, Request { seqs, deadline });
    }

    /// The beginning of a request's chain of blocks, and what stands for it here.
    fn root(&self, arrival: &Arrival) -> (BlockHash, u64) {
        let salt = ["", "salt"][usize::from(arrival.salt > 0)];
        let adapter = arrival.adapter.to_string();
        let root = self.pool.prefix_root(&["model", &adapter, salt], u64::from(arrival.id));
        let domain = match self.config.caching {
            true => u64::from(arrival.adapter) << 8 | u64::from(arrival.salt),
            false => 1 << 32 | u64::from(arrival.id),
        };
        (root, domain)
    }

    fn sequence(&mut self, arrival: &Arrival, prompt: &[TokenId], id: SeqId, origin: Origin) -> Live {
        let prompt_of = (id != origin.first).then_some(origin.first);
        let part = Part {
            seed: seed_of(arrival, id, origin.first),
            fate: arrival.fate,
            min_tokens: usize::from(arrival.min_tokens),
            max_tokens: usize::from(arrival.max_tokens),
            ignore_eos: arrival.ignore_eos,
            penalties: arrival.penalties,
            pooling: arrival.pooling,
            form: arrival.form,
            adapter: u64::from(arrival.adapter),
        };
        let mut sampling = sampling(part.max_tokens, part.min_tokens);
        sampling.presence_penalty = if part.penalties { 0.5 } else { 0.0 };
        // The first completion reports the prompt.
        sampling.prompt_logprobs = (arrival.prompt_logprobs && prompt_of.is_none()).then_some(0);
        sampling.eos_token_ids = if part.ignore_eos { Vec::new() } else { vec![EOS] };
        if part.pooling.is_some() {
            sampling = Sampling::of_embedding();
        }
        if part.fate != Fate::Healthy {
            self.wires.borrow_mut().fates.insert(id, part.fate);
        }
        Live {
            request: arrival.id,
            script: Script::alone(prompt, &part),
            sampling: Arc::new(sampling),
            known: prompt.len(),
            formed: arrival.form,
            scored: 0,
            pooling: part.pooling,
            whole: part.pooling.is_some()
                && arrival.whole
                && prompt.len() <= self.config.max_num_batched_tokens,
            pooled: 0,
            priority: i32::from(arrival.priority),
            tenant: usize::from(arrival.tenant),
            domain: origin.domain,
            adapter: part.adapter,
            prompt_of,
            place: Where::Waiting,
            admitted: false,
            in_flight: 0,
            unread: false,
        }
    }
}

fn adapter(number: u64) -> Option<Adapter> {
    let name = number.to_string();
    (number > 0).then(|| Adapter { id: AdapterId(number), name: name.into(), weights: Arc::new(()) })
}

/// What a sequence has from its request.
struct Origin {
    first: SeqId,
    domain: u64,
}

/// Key of a completion's random stream: it stays the same when other requests are left out.
fn seed_of(arrival: &Arrival, id: SeqId, first: SeqId) -> u64 {
    u64::from(arrival.id) << 8 | (id.0 - first.0)
}

pub fn tenant_id(tenant: usize) -> TenantId {
    TenantId::new(["a", "b", "c", "d"][tenant])
}
