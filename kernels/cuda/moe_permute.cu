// Brings the (token, expert) pairs of a mixture of experts into the order of their experts: a stable counting sort.
//
// ids [P] u32: expert of pair p, below E; pair p belongs to token p / k. Written:
//   sorted_pairs [P]      the pairs, by expert, then by number
//   offsets [E + 1]       where each expert's pairs begin in it
//   tiles [max_tiles]     for the grouped products of linear.cuh: each expert's pairs in tiles of at most `tile_tokens`, as (expert, first
//                         position); unused entries at the end say NO_EXPERT. There are at most P / tile_tokens + E, and at most P.
// Grid (E), block 512: block e counts all pairs and places its own. No atomics but on integers, so the result is one and the same.
#include "linear.cuh"

using namespace tidemill;

static constexpr uint32_t THREADS = 512, WARPS = THREADS / 32, ITEMS = 8, FULL = 0xffffffffu;
static constexpr uint32_t MAX_EXPERTS = 512;

// Exclusive prefix sum over the block; `sum` receives the total. `partial` is in use until the next barrier.
TM_DEVICE uint32_t block_scan(uint32_t v, uint32_t (&partial)[WARPS], uint32_t &sum) {
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    uint32_t inclusive = v;
    TM_UNROLL
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        const uint32_t below = __shfl_up_sync(FULL, inclusive, distance);
        if (lane >= distance) inclusive += below;
    }
    if (lane == 31) partial[warp] = inclusive;
    __syncthreads();
    uint32_t before = 0;
    sum = 0;
    TM_UNROLL
    for (uint32_t w = 0; w < WARPS; w++) {
        if (w < warp) before += partial[w];
        sum += partial[w];
    }
    return before + inclusive - v;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    moe_permute_u32(uint32_t *sorted_pairs, uint32_t *offsets, uint2 *tiles, const uint32_t *ids, uint32_t pairs, uint32_t experts,
                uint32_t tile_tokens, uint32_t max_tiles) {
    SHARED(uint32_t, count, [MAX_EXPERTS]);
    SHARED(uint32_t, partial_a, [WARPS]);
    SHARED(uint32_t, partial_b, [WARPS]);
    const uint32_t expert = blockIdx.x, thread = threadIdx.x;
    if (thread < MAX_EXPERTS) count[thread] = 0;
    __syncthreads();
    for (uint32_t p = thread; p < pairs; p += THREADS) atomicAdd(&count[ids[p]], 1u);
    __syncthreads();

    // Pairs and tiles of the experts before this one, and all tiles.
    const uint32_t others = thread < experts ? count[thread] : 0, others_tiles = (others + tile_tokens - 1) / tile_tokens;
    uint32_t begin, tile, all_tiles;
    // The arrays take turns: everybody who has come to a scan's barrier has read what the scan before left.
    block_scan(thread < expert ? others : 0, partial_a, begin);
    block_scan(thread < expert ? others_tiles : 0, partial_b, tile);
    block_scan(others_tiles, partial_a, all_tiles);
    const uint32_t mine = count[expert];
    for (uint32_t i = thread; i * tile_tokens < mine; i += THREADS) tiles[tile + i] = make_uint2(expert, begin + i * tile_tokens);
    if (thread == 0) offsets[expert] = begin;
    if (expert == experts - 1) {
        if (thread == 0) offsets[experts] = pairs;
        for (uint32_t i = all_tiles + thread; i < max_tiles; i += THREADS) tiles[i] = make_uint2(NO_EXPERT, 0);
    }

    // Eight neighbours per thread and round, so that the scan keeps their order.
    uint32_t position = begin;
    for (uint32_t base = 0; base < pairs; base += THREADS * ITEMS) {
        const uint32_t first = base + thread * ITEMS;
        uint32_t matches = 0, round;
        TM_UNROLL
        for (uint32_t i = 0; i < ITEMS; i++)
            if (first + i < pairs && ids[first + i] == expert) matches |= 1u << i;
        __syncthreads();
        uint32_t to = position + block_scan((uint32_t)__popc(matches), partial_b, round);
        TM_UNROLL
        for (uint32_t i = 0; i < ITEMS; i++)
            if (matches >> i & 1) sorted_pairs[to++] = first + i;
        position += round;
    }
}
KERNEL(moe_permute_u32);
