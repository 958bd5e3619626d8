// Attention over paged keys and values (the paging of Kwon et al. 2023), prompt chunks and decode rows alike.
//
//   out[t, q, :] = sum_j w[j] * v[j, q / G, :],   w = softmax_j(score(t, q, j)),   G = Q / K
//   score = q . k[j] * scale, then soft_cap * tanh(score / soft_cap), then + slope[q] * (j - p)      (each only if given)
// over the positions j <= p of the token's own row, and j > p - window if a window is given. With `both_ways` over all positions of the
// row, whose tokens are all in the step, or those with |p - j| < window. With sinks the denominator of the softmax has one more term, exp(sink[q]).
//
// qkv [T, (Q + 2K) * D], out [T, Q * D] bf16, 16-byte aligned; slopes, sinks [Q] f32.
// kv: one layer of the cache, bf16 or F8E4M3 [blocks, 2, K, block_size, D], keys first; block_size a power of two >= 16. Slots after the last
// token of an item, or before its first token's window, are not read, whatever they hold. What lies between, and one token of the item
// sees but another does not, counts for the latter as a product with zero: it is finite, unless the sequence is lost anyway.
//
// One order of operations for every token, whatever the launch (batch invariance): its keys are cut into tiles of KV_TILE = 128
// positions, aligned to position 0. A tile is computed from nothing by an online softmax (Milakov and Gimelshein 2018) over steps of
// STEP positions, 64 up to D = 128 and 32 beyond, and the tiles are merged in sequence order by `merge_factors`. Positions that a token
// does not see add exact zeros. So it makes no difference who computes a tile: `attention_split` (a warp, 16 query rows) or
// `attention_block` (64 rows share what is loaded), nor whether tiles are merged on the spot or, after a trip through memory, by
// `attention_combine`.
//
// Query rows are packed: row r of a sequence and a key/value head is token r / G, query head head * G + r % G.
//
// plan, u32, 16-byte aligned: a header of 8 words (count and first word of the items of split, block, combine), then items; written by
// `attention_plan` in ops/attention/plan.rs. Grids are free: every kernel strides over its items. Blocks and dynamic shared memory are
// those of `Geometry` in ops/attention/mod.rs.
// F8: the cache is in F8E4M3. Its elements become bf16, exactly, on their way to shared memory, so that results are those of a bf16 cache of the
// same values: loaded to registers a piece or step ahead of their use, as cp.async converts nothing.
// partial_o [slots, 16, D], partial_ml [slots, 16, 2] f32: one slot per tile of a split row, `m` and `l` of each query row.
#pragma once
#include "attention.cuh"

namespace {

// ---- A warp on its own: 16 query rows, keys and values streamed through a ring of pieces of 32 positions.

template <int D>
struct SplitShape {
    static constexpr int STEP = D <= 128 ? 64 : 32;
    static constexpr int PIECES = STEP / 32;         // of keys per step, and as many of values
    static constexpr int STAGES = D <= 128 ? 4 : 3;  // of the ring; all but one are on their way at any time
    static constexpr int PIECE_CHUNKS = 32 * Rows<D>::STRIDE;
};

// The pieces of an item in the order of their use: for each step all of its keys, then all of its values.
template <int D, bool F8>
struct Stream {
    using Shape = SplitShape<D>;
    const AttentionArgs &a;
    const Item &item;
    const Span<Shape::STEP> &span;
    bf16x8 *ring;
    int next, end;

    TM_DEVICE Stream(const AttentionArgs &a_, const Item &item_, const Span<Shape::STEP> &span_, bf16x8 *ring_)
        : a(a_), item(item_), span(span_), ring(ring_), next(0), end((span.end_step - span.first_step) * 2 * Shape::PIECES) {}

    TM_DEVICE void queue() {
        if (next < end) {
            const int step = span.first_step + next / (2 * Shape::PIECES), which = next / Shape::PIECES & 1;
            const int position = step * Shape::STEP + next % Shape::PIECES * 32;
            bf16x8 *piece = ring + next % Shape::STAGES * Shape::PIECE_CHUNKS;
            load_kv<D, 16, F8>(a, item, which, piece, 0, position, span.low, span.high);
            load_kv<D, 16, F8>(a, item, which, piece, 16, position + 16, span.low, span.high);
        }
        cp_async_commit();
        next++;
    }

    // The next piece, arrived; the one before it makes room for another.
    TM_DEVICE const bf16x8 *take() {
        const int current = next - (Shape::STAGES - 1);
        cp_async_wait<Shape::STAGES - 2>();
        __syncwarp();
        queue();
        return ring + current % Shape::STAGES * Shape::PIECE_CHUNKS;
    }
};

template <int D, bool F8>
TM_DEVICE void attend_split_item(const AttentionArgs &a, const Item item, int group, float c, bf16x8 *shared) {
    using Shape = SplitShape<D>;
    const QueryRows rows(a, item, group, 0);
    const Span<Shape::STEP> span(a, item, group);
    bf16x8 *q = shared;
    bf16x8 *ring = shared + MMA_ROWS * Rows<D>::STRIDE;
    Stream<D, F8> stream(a, item, span, ring);
    float4 *total = (float4 *)(ring + Shape::STAGES * Shape::PIECE_CHUNKS);
    __syncwarp();  // every lane is done with the item before
    load_queries<D, MMA_ROWS, 32>(a, item, group, q);
    for (int i = 0; i < Shape::STAGES - 1; i++) stream.queue();

    Sum<D> tile;
    float total_m[2] = {empty_max(), empty_max()}, total_l[2] = {0.0f, 0.0f};
    int step = span.first_step;
    for (uint32_t i = 0; i < item.tiles; i++) {
        tile.clear();
        const int end = min(span.end_step, (int)(item.tile + i + 1) * (KV_TILE / Shape::STEP));
        for (; step < end; step++) {
            float s[Shape::STEP / 8][4];
            TM_UNROLL
            for (int j = 0; j < Shape::PIECES; j++) scores<D, 2>(s + 4 * j, q, 0, stream.take(), 0);
            softmax_step(a, rows, c, s, tile, step * Shape::STEP);
            TM_UNROLL
            for (int j = 0; j < Shape::PIECES; j++) {
                const bf16x8 *v = stream.take();
                TM_UNROLL
                for (int half = 0; half < 2; half++) {
                    uint32_t p[4];
                    weights(p, s + 4 * j + 2 * half);
                    add_values<D, D>(tile.o, p, v, 16 * half, 0);
                }
            }
        }
        close(tile);
        if (item.slot != DIRECT) {
            store_partial(a, rows, tile, item.slot + i);
            continue;
        }
        // The total rests in shared memory, each lane's part in a place of its own: registers hold one tile only.
        float factor[2][2];
        merge_rows(total_m, total_l, tile.m, tile.l, c, factor);
        TM_UNROLL
        for (int n = 0; n < D / 8; n++) {
            float4 &place = total[32 * n + lane_id()];
            if (i > 0) {
                tile.o[n][0] = merged(place.x, tile.o[n][0], factor[0]);
                tile.o[n][1] = merged(place.y, tile.o[n][1], factor[0]);
                tile.o[n][2] = merged(place.z, tile.o[n][2], factor[1]);
                tile.o[n][3] = merged(place.w, tile.o[n][3], factor[1]);
            }
            if (i + 1 < item.tiles) place = make_float4(tile.o[n][0], tile.o[n][1], tile.o[n][2], tile.o[n][3]);
        }
    }
    if (item.slot == DIRECT) store<D, D>(a, item, 0, tile.o, total_m, total_l, c, 0);
    cp_async_wait<0>();
}

template <int D, bool F8>
TM_DEVICE void attend_split(const AttentionArgs &a) {
    DYN_SHARED(bf16x8, shared);
    const int group = a.num_heads / a.num_kv_heads;
    const float c = exponent_scale(a);
    const Items items(a, 0);
    for (int i = blockIdx.x; i < items.count; i += gridDim.x) attend_split_item<D, F8>(a, items.at[i], group, c, shared);
}

// ---- A block: 64 query rows, 16 to a warp, that share what is loaded. From D = 192 on two warps share 16 rows, each with the scores of
// all positions and half of the columns: tile and total would not fit a thread's registers otherwise.

template <int D>
struct BlockShape {
    static constexpr int STEP = D <= 128 ? 64 : 32;
    static constexpr int SHARERS = D <= 128 ? 1 : 2;
    static constexpr int COLS = D / SHARERS;
    static constexpr int WARPS = BLOCK_ROWS / MMA_ROWS * SHARERS;
    static constexpr int STAGE_CHUNKS = STEP * Rows<D>::STRIDE;
};

template <int COLS>
TM_DEVICE void merge(Sum<COLS> &total, const Sum<COLS> &tile, float c) {
    float factor[2][2];
    merge_rows(total.m, total.l, tile.m, tile.l, c, factor);
    TM_UNROLL
    for (int n = 0; n < COLS / 8; n++)
        TM_UNROLL
        for (int i = 0; i < 4; i++) total.o[n][i] = merged(total.o[n][i], tile.o[n][i], factor[i / 2]);
}

// Queues one step's keys or values; nothing past the last step.
template <int D, bool F8>
TM_DEVICE void load_step(const AttentionArgs &a, const Item &item, const Span<BlockShape<D>::STEP> &span, int which, int step,
                         bf16x8 *stages) {
    using Shape = BlockShape<D>;
    if (step < span.end_step) {
        constexpr int ROWS = Shape::STEP / Shape::WARPS;
        const int row0 = (int)(threadIdx.x / 32) * ROWS;
        bf16x8 *stage = stages + (2 * which + (step & 1)) * Shape::STAGE_CHUNKS;
        load_kv<D, ROWS, F8>(a, item, which, stage, row0, step * Shape::STEP + row0, span.low, span.high);
    }
    cp_async_commit();
}

template <int D, bool F8>
TM_DEVICE void attend_block_item(const AttentionArgs &a, const Item item, int group, float c, bf16x8 *shared) {
    using Shape = BlockShape<D>;
    const int warp = (int)(threadIdx.x / 32), row0 = warp / Shape::SHARERS * MMA_ROWS;
    const int column = warp % Shape::SHARERS * (Shape::COLS / 8);
    const QueryRows rows(a, item, group, row0);
    const Span<Shape::STEP> span(a, item, group);
    bf16x8 *q = shared, *stages = shared + BLOCK_ROWS * Rows<D>::STRIDE;
    __syncthreads();  // every warp is done with the item before
    load_queries<D, BLOCK_ROWS, 32 * Shape::WARPS>(a, item, group, q);
    load_step<D, F8>(a, item, span, 0, span.first_step, stages);
    load_step<D, F8>(a, item, span, 1, span.first_step, stages);

    Sum<Shape::COLS> total, tile;
    total.clear();
    tile.clear();
    for (int step = span.first_step; step < span.end_step; step++) {
        // Two barriers a step. The first shows this step's keys, and that the values of the step before are read; the second shows its
        // values, and that its keys are read.
        load_step<D, F8>(a, item, span, 0, step + 1, stages);
        cp_async_wait<2>();
        __syncthreads();
        load_step<D, F8>(a, item, span, 1, step + 1, stages);
        const bool seen = step * Shape::STEP <= rows.newest;
        uint32_t p[Shape::STEP / 16][4];
        if (seen) {
            float s[Shape::STEP / 8][4];
            scores<D, Shape::STEP / 16>(s, q, row0, stages + (step & 1) * Shape::STAGE_CHUNKS, 0);
            softmax_step(a, rows, c, s, tile, step * Shape::STEP);
            TM_UNROLL
            for (int j = 0; j < Shape::STEP / 16; j++) weights(p[j], s + 2 * j);
        }
        cp_async_wait<2>();
        __syncthreads();
        if (seen) {
            const bf16x8 *v = stages + (2 + (step & 1)) * Shape::STAGE_CHUNKS;
            TM_UNROLL
            for (int j = 0; j < Shape::STEP / 16; j++) add_values<D, Shape::COLS>(tile.o, p[j], v, 16 * j, column);
            if ((step + 1) % (KV_TILE / Shape::STEP) == 0 || step + 1 == span.end_step || (step + 1) * Shape::STEP > rows.newest) {
                close(tile);
                merge(total, tile, c);
                tile.clear();
            }
        }
    }
    store<D, Shape::COLS>(a, item, row0, total.o, total.m, total.l, c, 8 * column);
    cp_async_wait<0>();
}

template <int D, bool F8>
TM_DEVICE void attend_block(const AttentionArgs &a) {
    DYN_SHARED(bf16x8, shared);
    const int group = a.num_heads / a.num_kv_heads;
    const float c = exponent_scale(a);
    const Items items(a, 1);
    // Items come longest first and are dealt out back and forth, so that no block gets the longest of every round.
    for (int round = 0; round * (int)gridDim.x < items.count; round++) {
        const int place = round & 1 ? (int)(gridDim.x - 1 - blockIdx.x) : (int)blockIdx.x, i = round * (int)gridDim.x + place;
        if (i < items.count) attend_block_item<D, F8>(a, items.at[i], group, c, shared);
    }
}

// ---- Merges the partial results of split rows: a warp per query row, four columns to a lane.

// `total` with the tiles first.. of a row merged into it, at most 32; `m`, `l` hold the total's.
template <int D, int VECTORS>
TM_DEVICE void combine_tiles(const AttentionArgs &a, size_t first, int tiles, float c, float &m, float &l, float4 (&total)[VECTORS]) {
    const int lane = lane_id();
    float2 ml = make_float2(empty_max(), 0.0f);
    if (lane < tiles) ml = *(const float2 *)(a.partial_ml + (first + (size_t)lane * MMA_ROWS) * 2);
    // Greatest score after this lane's tile: the greatest over the lanes up to it, and what was there before.
    float after = ml.x;
    for (int offset = 1; offset < 32; offset *= 2) {
        const float other = __shfl_up_sync(0xffffffffu, after, offset);
        if (lane >= offset) after = fmaxf(after, other);
    }
    after = fmaxf(after, m);
    float before = __shfl_up_sync(0xffffffffu, after, 1);
    if (lane == 0) before = m;
    m = __shfl_sync(0xffffffffu, after, 31);
    float mine[2];
    merge_factors(before, ml.x, after, c, mine);
    constexpr int BATCH = 8;  // tiles whose loads are in flight together
    for (int t0 = 0; t0 < tiles; t0 += BATCH) {
        float4 o[BATCH][VECTORS];
        TM_UNROLL
        for (int t = 0; t < BATCH; t++)
            TM_UNROLL
            for (int v = 0; v < VECTORS; v++)
                if (t0 + t < tiles && 4 * (lane + 32 * v) < D)
                    o[t][v] = ((const float4 *)(a.partial_o + (first + (size_t)(t0 + t) * MMA_ROWS) * D))[lane + 32 * v];
        TM_UNROLL
        for (int t = 0; t < BATCH; t++) {
            if (t0 + t >= tiles) continue;
            const float factor[2] = {__shfl_sync(0xffffffffu, mine[0], t0 + t), __shfl_sync(0xffffffffu, mine[1], t0 + t)};
            l = merged(l, __shfl_sync(0xffffffffu, ml.y, t0 + t), factor);
            TM_UNROLL
            for (int v = 0; v < VECTORS; v++) {
                total[v].x = merged(total[v].x, o[t][v].x, factor);
                total[v].y = merged(total[v].y, o[t][v].y, factor);
                total[v].z = merged(total[v].z, o[t][v].z, factor);
                total[v].w = merged(total[v].w, o[t][v].w, factor);
            }
        }
    }
}

template <int D>
TM_DEVICE void combine(const AttentionArgs &a) {
    constexpr int VECTORS = (D + 127) / 128;
    const int group = a.num_heads / a.num_kv_heads, warps = (int)(gridDim.x * blockDim.x) / 32;
    const float c = exponent_scale(a);
    const Items items(a, 2);
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x) / 32; i < items.count * MMA_ROWS; i += warps) {
        const Item &item = items.at[i / MMA_ROWS];
        const int r = i % MMA_ROWS;
        if (r >= item.rows()) continue;
        float m = empty_max(), l = 0.0f;
        float4 total[VECTORS];
        TM_UNROLL
        for (int v = 0; v < VECTORS; v++) total[v] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int t = 0; t < (int)item.tiles; t += 32)
            combine_tiles<D>(a, (size_t)(item.slot + t) * MMA_ROWS + r, min(32, (int)item.tiles - t), c, m, l, total);
        const int packed = (int)item.first + r, head = item.head() * group + packed % group;
        const float scale = normaliser(a, m, l, c, head);
        uint2 *out = (uint2 *)(a.out + ((size_t)(item.token + packed / group) * a.num_heads + head) * D);
        TM_UNROLL
        for (int v = 0; v < VECTORS; v++)
            if (4 * (lane_id() + 32 * v) < D)
                out[lane_id() + 32 * v] = make_uint2(pack_bf16(total[v].x * scale, total[v].y * scale),
                                                     pack_bf16(total[v].z * scale, total[v].w * scale));
    }
}

}  // namespace

// Bounds on blocks tell ptxas how many registers it may take: by its own guess some variants spill a few.
#define ATTENTION_KERNELS(D, F8, SUFFIX)                                                                                           \
    extern "C" __global__ void __launch_bounds__(32, 8) attention_split_##D##SUFFIX(const AttentionArgs args) {                    \
        attend_split<D, F8>(args);                                                                                                 \
    }                                                                                                                              \
    KERNEL(attention_split_##D##SUFFIX);                                                                                           \
    extern "C" __global__ void __launch_bounds__(32 * BlockShape<D>::WARPS) attention_block_##D##SUFFIX(const AttentionArgs args) { \
        attend_block<D, F8>(args);                                                                                                 \
    }                                                                                                                              \
    KERNEL(attention_block_##D##SUFFIX);
