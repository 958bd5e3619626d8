//! The prefix cache as requests and watchers see it.

use std::collections::BTreeSet;

use tidemill_engine::{
    KvWatch, RequestError,
    kv::{BlockHash, KvEvent},
    request::GenerateRequest,
};

use crate::rig::{BLOCK_SIZE, BLOCKS, Bench, block_on, collect, request, submit};

fn bench() -> Bench {
    let bench = Bench::with(|options| options.engine.scheduling.enable_kv_cache_events = true);
    bench.finish_steps(5000);
    bench
}

fn run(bench: &Bench, asked: GenerateRequest) -> usize {
    let (_, last) = collect(submit(&bench.handle(), asked)).unwrap();
    last.finish.unwrap().usage.cached_tokens
}

/// What a watcher believes to be cached, by what it was told.
struct View {
    watch: KvWatch,
    sequence: u64,
    stored: BTreeSet<BlockHash>,
    removed: usize,
    cleared: usize,
}

impl View {
    fn new(bench: &Bench) -> Self {
        let mut watch = block_on(bench.handle().watch_kv()).unwrap();
        let first = block_on(watch.next()).unwrap();
        assert!(first.is_snapshot);
        let mut view =
            Self { watch, sequence: first.sequence, stored: BTreeSet::new(), removed: 0, cleared: 0 };
        first.events.into_iter().for_each(|event| view.take(event));
        view
    }

    fn take(&mut self, event: KvEvent) {
        match event {
            KvEvent::Stored { hash, parent, tokens } => {
                assert_eq!(tokens.len(), BLOCK_SIZE);
                assert!(
                    parent.is_none_or(|parent| self.stored.contains(&parent)),
                    "a block before its parent"
                );
                assert!(self.stored.insert(hash), "stored twice");
            }
            KvEvent::Removed { hash } => {
                self.removed += 1;
                assert!(self.stored.remove(&hash), "removed, but never stored");
            }
            KvEvent::Cleared => {
                self.cleared += 1;
                self.stored.clear();
            }
        }
    }

    /// Takes in everything that was sent before an answer of the engine.
    fn catch_up(&mut self, bench: &Bench) {
        // Its answer comes after the batches of everything before it.
        let mut mark = block_on(bench.handle().watch_kv()).unwrap();
        let until = block_on(mark.next()).unwrap().sequence;
        while self.sequence < until {
            let batch = block_on(self.watch.next()).unwrap();
            assert!(!batch.is_snapshot && batch.sequence == self.sequence + 1, "a gap");
            self.sequence = batch.sequence;
            batch.events.into_iter().for_each(|event| self.take(event));
        }
    }
}

#[test]
fn a_prompt_that_was_read_is_found_by_the_same_credential_and_salt_alone() {
    let bench = bench();
    let prompt: Vec<u32> = (1..=10).collect();
    let asked = |id: &str| request(id, &prompt, 2);
    assert_eq!(run(&bench, asked("first")), 0);
    assert_eq!(run(&bench, asked("same")), 8, "two full blocks of four");
    let other_key = GenerateRequest { credential: "other".into(), ..asked("key") };
    assert_eq!(run(&bench, other_key.clone()), 0);
    assert_eq!(run(&bench, GenerateRequest { cache_salt: "salt".into(), ..asked("salt") }), 0);
    assert_eq!(run(&bench, other_key), 8);
    let off = Bench::with(|options| options.engine.scheduling.enable_prefix_caching = false);
    off.finish_steps(100);
    assert_eq!([run(&off, asked("a")), run(&off, asked("b"))], [0, 0]);
    assert_eq!(off.handle().stats().kv_blocks.free, BLOCKS);
}

#[test]
fn a_watcher_sees_what_is_stored_removed_and_cleared() {
    let bench = bench();
    let handle = bench.handle();
    let mut early = View::new(&bench);
    assert!(early.stored.is_empty());
    run(&bench, request("a", &(1..=9).collect::<Vec<_>>(), 1));
    early.catch_up(&bench);
    assert_eq!(early.stored.len(), 2);
    let mut late = View::new(&bench);
    assert_eq!((&late.stored, late.sequence), (&early.stored, early.sequence));
    // Others fill the cache and drive the oldest out.
    for other in 1..8u32 {
        run(&bench, request("b", &(0..12).map(|n| 100 + other * 20 + n).collect::<Vec<_>>(), 1));
    }
    for view in [&mut early, &mut late] {
        view.catch_up(&bench);
        assert!(view.removed > 0 && view.cleared == 0);
        assert_eq!(view.stored.len(), handle.stats().kv_blocks.cached);
    }
    let cached = handle.stats().kv_blocks.cached;
    assert_eq!(block_on(handle.reset_prefix_cache()).unwrap(), cached);
    early.catch_up(&bench);
    assert_eq!((early.cleared, handle.stats().kv_blocks.free), (1, BLOCKS));
}

#[test]
fn a_watcher_that_lags_is_cut_off_and_nobody_waits_for_it() {
    let bench = bench();
    let handle = bench.handle();
    let mut lagging = block_on(handle.watch_kv()).unwrap();
    let mut reading = View::new(&bench);
    for _ in 0..1200 {
        block_on(handle.reset_prefix_cache()).unwrap();
        reading.catch_up(&bench);
    }
    let mut batches = 0;
    while block_on(lagging.next()).is_some() {
        batches += 1;
    }
    assert!((1000..1200).contains(&batches), "{batches}");
    assert!(reading.cleared >= 1200, "whoever reads is not cut off");
}

#[test]
fn without_events_there_is_nothing_to_watch() {
    let bench = Bench::new();
    let refused = block_on(bench.handle().watch_kv()).map(drop).unwrap_err();
    assert!(matches!(&refused, RequestError::Unsupported(why) if why.contains("--enable-kv-cache-events")));
}
