use super::{
    prefix::{Link, NodeId, Place, PrefixIndex},
    *,
};
use crate::{activity::BlockMap, ids::TokenId};

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

#[test]
fn chains_part_where_their_tokens_do() {
    let pool = BlockPool::with_cache(16, 4, CACHE);
    let one = tokens(0..9);
    let other = [tokens(0..4), tokens(50..55)].concat();
    drop(hold(&pool, "a", &one));
    assert_eq!(hold(&pool, "a", &other).1, 4);
    assert_eq!(
        [hold(&pool, "a", &one).1, hold(&pool, "a", &other).1],
        [8, 8],
        "neither took the other's place"
    );
}

/// A chain of two blocks whose first was given up while the second, which somebody else had computed, is still there.
fn without_its_beginning(host_blocks: usize) -> (BlockPool, BlockTable) {
    let pool = BlockPool::with_cache(8, 4, CacheConfig { host_blocks, ..CACHE });
    let chain = tokens(0..8);
    let root = pool.prefix_root(&["model", "a"], 0);
    let [mut first, mut second] = [pool.table(root), pool.table(root)];
    // Both compute the same at the same time.
    assert!(first.reserve(8) && second.reserve(8));
    first.register(&chain[..4]);
    second.register(&chain);
    drop(first);
    let mut other = pool.table(pool.prefix_root(&["model", "b"], 0));
    assert!(other.reserve(6 * 4), "the beginning is given up");
    drop(other);
    (pool, second)
}

#[test]
fn the_end_of_a_chain_is_not_found_without_its_beginning_and_makes_room_when_it_is_computed_anew() {
    for is_referenced in [true, false] {
        let (pool, second) = without_its_beginning(0);
        assert_eq!((pool.counts().free, pool.snapshot().len()), (6, 1));
        let second = is_referenced.then_some(second);
        let (_anew, found) = hold(&pool, "a", &tokens(0..8));
        assert_eq!((found, pool.snapshot().len()), (0, 2));
        let owned = if is_referenced { 4 } else { 2 };
        assert_eq!(pool.counts(), BlockCounts { free: 8 - owned, owned, cached: 0, total: 8 });
        assert_eq!(hold(&pool, "a", &tokens(0..9)).1, 8);
        drop(second);
        assert_eq!(pool.counts().owned, 2);
    }
}

#[test]
fn the_end_of_a_chain_that_went_to_the_host_without_its_beginning_is_not_saved_any_more() {
    let (pool, second) = without_its_beginning(1);
    drop(second);
    let mut other = pool.table(pool.prefix_root(&["model", "b"], 0));
    assert!(other.reserve(8 * 4), "the end goes to the host, in the beginning's place");
    assert_eq!(pool.num_host_blocks_used(), 1);
    drop(other);
    let _anew = hold(&pool, "a", &tokens(0..8));
    let (mut saves, mut loads) = (Vec::new(), Vec::new());
    pool.take_copies(&mut saves, &mut loads);
    assert_eq!((saves, loads, pool.num_host_blocks_used()), (Vec::new(), Vec::new(), 0));
}

/// A pool of three blocks and two in host memory, which hold the last two of the chain of three `0..12`. Their saves were taken.
fn on_the_host() -> BlockPool {
    let pool = BlockPool::with_cache(3, 4, CacheConfig { host_blocks: 2, ..CACHE });
    drop(hold(&pool, "a", &tokens(0..12)));
    let mut other = pool.table(pool.prefix_root(&["model", "b"], 0));
    assert!(other.reserve(8));
    let (mut saves, mut loads) = (Vec::new(), Vec::new());
    pool.take_copies(&mut saves, &mut loads);
    assert_eq!((saves.len(), loads.len(), pool.num_host_blocks_used()), (2, 0, 2));
    pool
}

#[test]
fn a_place_on_the_host_is_free_again_when_its_copy_back_is_done() {
    let pool = on_the_host();
    let (mut saves, mut loads) = (Vec::new(), Vec::new());
    drop(hold(&pool, "a", &tokens(0..12)));
    pool.take_copies(&mut saves, &mut loads);
    // The last token is computed, so its block is not loaded.
    assert_eq!((saves.len(), loads.len()), (0, 1));
    let mut other = pool.table(pool.prefix_root(&["model", "b"], 0));
    pool.loaded(&loads);
    loads.clear();
    assert!(other.reserve(12), "all three are given up");
    pool.take_copies(&mut saves, &mut loads);
    assert_eq!((saves.len(), pool.num_host_blocks_used()), (2, 2));
    assert_ne!(saves[0].1, saves[1].1, "to both places");
}

#[test]
fn a_block_that_is_forgotten_before_it_was_loaded_is_not_loaded() {
    let pool = on_the_host();
    let mut back = pool.table(pool.prefix_root(&["model", "a"], 0));
    assert_eq!(back.match_prefix(&tokens(0..13), 12), 12);
    drop(back);
    assert_eq!(pool.clear_cache(), 3);
    let (mut saves, mut loads) = (Vec::new(), Vec::new());
    pool.take_copies(&mut saves, &mut loads);
    assert_eq!((saves, loads), (Vec::new(), Vec::new()));
    drop(hold(&pool, "c", &tokens(0..12)));
    let mut other = pool.table(pool.prefix_root(&["model", "b"], 0));
    assert!(other.reserve(12));
    assert_eq!(pool.num_host_blocks_used(), 2, "both places are free for others");
}

#[test]
fn a_map_of_a_large_pool_shows_the_busiest_block_of_each_cell() {
    let total = 3 * BlockMap::MAX_CELLS - 1;
    let pool = BlockPool::with_cache(total, 1, CACHE);
    // Free blocks are handed out by number: 0 and 1, then 2 to 4, then 5.
    let (held, _) = hold(&pool, "a", &tokens(0..2));
    let (cached, _) = hold(&pool, "b", &tokens(0..3));
    let (newest, _) = hold(&pool, "c", &tokens(0..1));
    drop(cached);
    let map = pool.map();
    assert_eq!((map.total, map.blocks_per_cell, map.cells.len()), (total, 3, BlockMap::MAX_CELLS));
    assert_eq!(map.cells[..3], [BlockMap::UNLISTED, BlockMap::UNLISTED, BlockMap::FREE]);
    drop(newest);
    assert_eq!(pool.map().cells[..3], [BlockMap::UNLISTED, BlockMap::CACHED, BlockMap::FREE]);
    drop(held);
    pool.clear_cache();
    assert!(pool.map().cells.iter().all(|&cell| cell == BlockMap::FREE));
}

#[test]
fn a_collision_of_hashes_is_a_miss() {
    let mut index = PrefixIndex::new([7; 32], 2, 4, 0);
    let (root, other_root) = (index.root(&[b"a"]), index.root(&[b"b"]));
    let pair = tokens(0..2);
    let link = Link { root, parent: NodeId::ROOT, parent_hash: None, hash: root, tokens: &pair };
    let node = index.insert(link, 0).unwrap();
    assert_eq!(index.find(link), Some((node, Place::Device(0))));
    assert_eq!(index.find(Link { root: other_root, ..link }), None);
    assert_eq!(index.find(Link { parent: node, ..link }), None);
    assert_eq!(index.find(Link { tokens: &tokens(1..3), ..link }), None);
    assert_eq!(index.insert(Link { parent: node, ..link }, 1), Err(Place::Device(0)), "one of a hash");
    let child = index.insert(Link { parent: node, hash: other_root, ..link }, 1).unwrap();
    assert!(child != node && node != NodeId::ROOT);
}
