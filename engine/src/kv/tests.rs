use super::*;
use crate::ids::TokenId;

const CACHE: CacheConfig = CacheConfig { key: [7; 32], events: true, host_blocks: 0 };

fn tokens(range: std::ops::Range<u32>) -> Vec<TokenId> {
    range.map(TokenId).collect()
}

/// A table that holds these tokens, registered, and how many of them it found.
fn hold(pool: &BlockPool, salt: &str, tokens: &[TokenId]) -> (BlockTable, usize) {
    let mut table = pool.table(pool.prefix_root(&["model", salt], 0));
    let found = table.match_prefix(tokens, tokens.len() - 1);
    assert!(table.reserve(tokens.len()));
    table.register(tokens);
    assert!(pool.is_consistent());
    (table, found)
}

#[test]
fn without_a_cache_blocks_come_back_on_drop() {
    let pool = BlockPool::new(4, 16);
    let root = pool.prefix_root(&[], 0);
    let mut a = pool.table(root);
    assert!(a.reserve(33));
    a.register(&tokens(0..33));
    assert_eq!(pool.counts(), BlockCounts { free: 1, owned: 3, cached: 0, total: 4 });
    let mut sibling = pool.table(root);
    assert_eq!(sibling.match_prefix(&tokens(0..33), 32), 32, "completions of one request share");
    let mut stranger = pool.table(pool.prefix_root(&[], 1));
    assert_eq!(stranger.match_prefix(&tokens(0..33), 32), 0, "requests do not");
    assert_eq!(a.release(), 1, "two of its three blocks are its sibling's too");
    drop(sibling);
    assert_eq!(pool.counts().free, 4);
    assert!(pool.is_consistent());
}

#[test]
fn reserve_takes_all_or_nothing() {
    let pool = BlockPool::new(3, 4);
    let mut a = pool.table(pool.prefix_root(&[], 0));
    assert!(!a.reserve(13));
    assert_eq!((a.ids().len(), pool.counts().free), (0, 3));
    assert!(a.reserve(12) && a.reserve(5), "what is there already is not taken again");
    assert_eq!(a.ids(), [BlockId(0), BlockId(1), BlockId(2)]);
}

#[test]
fn a_beginning_is_found_while_it_is_used_and_after_but_never_with_another_salt() {
    let pool = BlockPool::with_cache(16, 4, CACHE);
    let all = tokens(0..13);
    let (first, found) = hold(&pool, "a", &all);
    assert_eq!(found, 0);
    assert_eq!(hold(&pool, "a", &all).1, 12, "shared while it is used");
    drop(first);
    assert_eq!(pool.counts().cached, 3, "the unfinished block is not kept");
    assert_eq!(hold(&pool, "a", &tokens(0..12)).1, 8, "the last token is always computed");
    assert_eq!(hold(&pool, "a", &tokens(0..9)).1, 8);
    assert_eq!(hold(&pool, "b", &all).1, 0);
    let mut other = tokens(0..13);
    other[5] = TokenId(99);
    assert_eq!(hold(&pool, "a", &other).1, 4);
}

#[test]
fn the_end_of_the_least_recently_used_chain_is_given_up_first() {
    let pool = BlockPool::with_cache(6, 4, CACHE);
    let (old, new) = (tokens(0..13), tokens(100..113));
    drop(hold(&pool, "a", &old));
    drop(hold(&pool, "a", &new[..9]));
    // Five are cached, one is free.
    let mut third = pool.table(pool.prefix_root(&["model", "b"], 0));
    assert!(third.reserve(8));
    let mut fit = pool.table(pool.prefix_root(&["model", "a"], 0));
    assert_eq!(
        fit.probe(&old, 12, &[]),
        Fit { needed: 2 + 2, available: 4, cached_tokens: 8 },
        "two found, two missing"
    );
    assert_eq!(hold(&pool, "a", &new[..9]).1, 8);
    assert!(!third.reserve(28));
}

#[test]
fn events_tell_what_is_stored_and_what_is_not_any_more() {
    let pool = BlockPool::with_cache(3, 4, CACHE);
    drop(hold(&pool, "a", &tokens(0..9)));
    let mut events = Vec::new();
    pool.take_events(&mut events);
    let [KvEvent::Stored { hash, parent: None, tokens: first }, KvEvent::Stored { parent, .. }] = &events[..]
    else {
        panic!("{events:?}")
    };
    assert_eq!((parent, first), (&Some(*hash), &tokens(0..4)));
    assert_eq!(pool.snapshot(), events);
    events.clear();
    let (_table, _) = hold(&pool, "b", &tokens(0..8));
    pool.take_events(&mut events);
    assert!(matches!(events[..], [KvEvent::Removed { .. }, KvEvent::Stored { .. }, KvEvent::Stored { .. }]));
    assert_eq!(pool.clear_cache(), 1, "the rest is in use");
    events.clear();
    pool.take_events(&mut events);
    assert_eq!((events, pool.snapshot()), (vec![KvEvent::Cleared], Vec::new()));
    assert!(pool.is_consistent());
}

#[test]
fn what_is_given_up_goes_to_the_host_and_comes_back() {
    let pool = BlockPool::with_cache(3, 4, CacheConfig { host_blocks: 2, ..CACHE });
    let copies = || {
        let (mut saves, mut loads) = (Vec::new(), Vec::new());
        pool.take_copies(&mut saves, &mut loads);
        (saves, loads)
    };
    let old = tokens(0..13);
    drop(hold(&pool, "a", &old[..12]));
    let (new, _) = hold(&pool, "b", &old[..8]);
    let (saves, loads) = copies();
    assert_eq!((saves.len(), loads.len()), (2, 0), "the last two of the chain were given up");
    drop(new);
    let (back, found) = hold(&pool, "a", &old[..12]);
    assert_eq!(found, 8, "one on the device, one from the host");
    let (more, loads) = copies();
    assert_eq!(loads.len(), 1);
    assert_eq!(loads[0].1, back.ids()[1]);
    // The place that is read is not written to before it is read.
    assert!(more.iter().all(|&(_, host)| host != loads[0].0));
    pool.loaded(&loads);
    assert!(pool.is_consistent());
}

#[test]
fn a_chain_on_the_host_is_not_given_up_to_load_itself() {
    let pool = BlockPool::with_cache(3, 4, CacheConfig { host_blocks: 2, ..CACHE });
    let chain = tokens(0..13);
    drop(hold(&pool, "a", &chain[..12]));
    // The last two of the chain go to the host; two others are cached in their place.
    drop(hold(&pool, "b", &tokens(50..58)));
    let mut back = pool.table(pool.prefix_root(&["model", "a"], 0));
    assert_eq!(back.match_prefix(&chain, 12), 12);
    for (at, &block) in back.ids().iter().enumerate() {
        assert_eq!(pool.tokens_of(block), Some(chain[at * 4..][..4].to_vec()));
    }
    assert!(pool.is_consistent());
}
