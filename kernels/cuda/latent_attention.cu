// Causal latent attention over paged keys (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1), in its absorbed form: all query heads read one
// key of L + R elements per position, whose first L are its value as well.
//
//   out[t, q, :] = sum_j w[j] * key[j, :L],   w = softmax_j((q_latent[t, q, :] . key[j, :L] + q_rope[t, q, :] . key[j, L:]) * scale)
//
// q_latent (`a.qkv`), out [T, Q * L], q_rope [T, Q * R] bf16, 16-byte aligned; L a multiple of 16 up to 512, R of 8 up to 64. kv: one layer of
// the cache, bf16 [blocks, block_size, L + R]; block_size a power of two >= 16. What is read of it, and what a position that one token of an
// item sees counts for another, is as in attention.cu. So are plan (items of 16 query rows, row r of a sequence is token r / Q, head
// r % Q), tiles of 128 positions, their order and their merging: a token has the same bits in any company.
//
// partial_o [slots, 16, L], partial_ml [slots, 16, 2] f32.
//
// latent_attention: a block of 4 warps per item. A step is 32 positions: warp w multiplies the queries with the keys of 8 of them and
// shares the scores in shared memory; then every warp does the whole softmax, and the values' columns 16 (w + 4 i) to 16 further on.
// Dynamic shared memory: 16 queries, two stages of 32 keys, in rows of L + R elements, rounded up to 32, and 8 more; then 16 x 40 scores.
// latent_combine: a warp per query row of a split item. Grids are free: both stride over the items.
#include "attention.cuh"

// The same struct as in ops/latent_attention.rs.
struct LatentArgs {
    AttentionArgs a;
    const bf16 *q_rope;
    int latent_dim;
    int rope_dim;
};

namespace {

constexpr int STEP = 32;
constexpr int WARPS = 4;
constexpr int OCTETS = STEP / 8 / WARPS;     // of positions to a warp
constexpr int MAX_COLS = 512 / WARPS;
constexpr int SCORE_STRIDE = STEP + 8;       // floats: neighbouring rows begin 8 banks apart
static_assert(OCTETS == 1, "a warp multiplies one mma tile of keys");

// Rows in shared memory, in chunks of 16 bytes: whole pairs of mma steps, and one more chunk, so that eight rows of one column lie in
// different banks.
struct LatentRows {
    int chunks, latent, padded, stride;

    TM_DEVICE LatentRows(const LatentArgs &l)
        : chunks((l.latent_dim + l.rope_dim) / 8), latent(l.latent_dim / 8), padded((chunks + 3) & ~3), stride(padded + 1) {}
};

TM_DEVICE int warp_id() { return (int)(threadIdx.x / 32); }

// Queues the copy of an item's queries, by all warps; rows it does not have, and what fills a row up, become zeros.
TM_DEVICE void load_latent_queries(const LatentArgs &l, const LatentRows &rows, const Item &item, bf16x8 *q) {
    const bf16x8 *latents = (const bf16x8 *)l.a.qkv, *ropes = (const bf16x8 *)l.q_rope;
    for (int r = warp_id(); r < MMA_ROWS; r += WARPS) {
        const size_t row = (size_t)item.token * l.a.num_heads + item.first + r;
        for (int chunk = lane_id(); chunk < rows.padded; chunk += 32) {
            const bool is_latent = chunk < rows.latent, valid = r < item.rows() && chunk < rows.chunks;
            const bf16x8 *from = is_latent ? latents + row * rows.latent + chunk
                                           : ropes + row * (rows.chunks - rows.latent) + (chunk - rows.latent);
            cp_async16(q + r * rows.stride + chunk, valid ? from : latents, valid);
        }
    }
}

// Queues the copy of a step's keys, eight to a warp; nothing past the last step. Positions outside of [low, high] become zeros.
TM_DEVICE void load_keys(const LatentArgs &l, const LatentRows &rows, const Item &item, const Span<STEP> &span, int step, bf16x8 *stages) {
    if (step < span.end_step) {
        const int row0 = 8 * warp_id(), position = step * STEP + row0;
        bf16x8 *to = stages + ((step & 1) * STEP + row0) * rows.stride;
        const bf16x8 *from = (const bf16x8 *)l.a.kv;
        if (position <= span.high) {
            const size_t block = l.a.plan[item.table + (position >> l.a.block_shift)];
            from += ((block << l.a.block_shift) + (position & ((1 << l.a.block_shift) - 1))) * rows.chunks;
        }
        for (int r = 0; r < 8; r++)
            for (int chunk = lane_id(); chunk < rows.padded; chunk += 32) {
                const bool valid = position + r <= span.high && chunk < rows.chunks;
                cp_async16(to + r * rows.stride + chunk, valid ? from + r * rows.chunks + chunk : (const bf16x8 *)l.a.kv, valid);
            }
    }
    cp_async_commit();
}

// Scores of the 16 queries and this warp's eight keys, to `shared` [16][SCORE_STRIDE]. Every second mma adds to a sum of its own.
TM_DEVICE void share_scores(const LatentRows &rows, const bf16x8 *q, const bf16x8 *stage, float *shared) {
    const int lane = lane_id();
    float even[4] = {0.0f, 0.0f, 0.0f, 0.0f}, odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const bf16x8 *query = q + (lane & 15) * rows.stride + (lane >> 4);
    const bf16x8 *key = stage + (8 * warp_id() + (lane & 7)) * rows.stride + (lane >> 3);
    TM_UNROLL_BY(2)
    for (int chunk = 0; chunk < rows.padded; chunk += 4) {
        uint32_t x[4], y[4];
        ldmatrix_x4(y, key + chunk);
        ldmatrix_x4(x, query + chunk);
        mma_bf16(even, x, y[0], y[1]);
        ldmatrix_x4(x, query + chunk + 2);
        mma_bf16(odd, x, y[2], y[3]);
    }
    float *to = shared + (lane >> 2) * SCORE_STRIDE + 8 * warp_id() + 2 * (lane & 3);
    *(float2 *)to = make_float2(even[0] + odd[0], even[1] + odd[1]);
    *(float2 *)(to + 8 * SCORE_STRIDE) = make_float2(even[2] + odd[2], even[3] + odd[3]);
}

// The scores of all of a step's positions in the layout of mma results.
TM_DEVICE void take_scores(float (&s)[STEP / 8][4], const float *shared) {
    const float *from = shared + (lane_id() >> 2) * SCORE_STRIDE + 2 * (lane_id() & 3);
    TM_UNROLL
    for (int n = 0; n < STEP / 8; n++) {
        const float2 low = *(const float2 *)(from + 8 * n), high = *(const float2 *)(from + 8 * SCORE_STRIDE + 8 * n);
        s[n][0] = low.x, s[n][1] = low.y, s[n][2] = high.x, s[n][3] = high.y;
    }
}

// First column of the warp's i-th tile of 16.
TM_DEVICE int tile_column(int i) { return 16 * (warp_id() + WARPS * i); }

TM_DEVICE void add_latents(const LatentArgs &l, const LatentRows &rows, const float (&s)[STEP / 8][4], const bf16x8 *stage,
                           Sum<MAX_COLS> &sum) {
    const bf16x8 *from = stage + (lane_id() & 15) * rows.stride + (lane_id() >> 4);
    TM_UNROLL
    for (int half = 0; half < STEP / 16; half++) {
        uint32_t p[4];
        weights(p, s + 2 * half);
        TM_UNROLL
        for (int i = 0; i < MAX_COLS / 16; i++) {
            if (tile_column(i) >= l.latent_dim) break;
            uint32_t y[4];
            ldmatrix_x4_trans(y, from + 16 * half * rows.stride + tile_column(i) / 8);
            mma_bf16(sum.o[2 * i], p, y[0], y[1]);
            mma_bf16(sum.o[2 * i + 1], p, y[2], y[3]);
        }
    }
}

// Calls `put(row, column, values)` for each pair of neighbouring columns that this lane holds: rows and columns of the item.
template <class Put>
TM_DEVICE void each_pair(const LatentArgs &l, const Item &item, const float (&o)[MAX_COLS / 8][4], Put put) {
    TM_UNROLL
    for (int r = 0; r < 2; r++) {
        const int row = lane_id() / 4 + 8 * r;
        if (row >= item.rows()) continue;
        TM_UNROLL
        for (int n = 0; n < MAX_COLS / 8; n++)
            if (tile_column(n / 2) < l.latent_dim)
                put(row, r, tile_column(n / 2) + 8 * (n & 1) + 2 * (lane_id() & 3), o[n][2 * r], o[n][2 * r + 1]);
    }
}

TM_DEVICE void attend_latent_item(const LatentArgs &l, const LatentRows &layout, const Item item, float c, bf16x8 *shared) {
    // What latent attention has no use for, known to the compiler.
    AttentionArgs a = l.a;
    a.window = a.both_ways = 0;
    a.soft_cap = 0.0f;
    a.slopes = a.sinks = nullptr;
    const int group = a.num_heads;
    const QueryRows rows(a, item, group, 0);
    const Span<STEP> span(a, item, group);
    bf16x8 *q = shared, *stages = shared + MMA_ROWS * layout.stride;
    float *shared_scores = (float *)(stages + 2 * STEP * layout.stride);
    __syncthreads();  // every warp is done with the item before
    load_latent_queries(l, layout, item, q);
    load_keys(l, layout, item, span, span.first_step, stages);

    Sum<MAX_COLS> total, tile;
    total.clear();
    int step = span.first_step;
    for (uint32_t i = 0; i < item.tiles; i++) {
        tile.clear();
        const int end = min(span.end_step, (int)(item.tile + i + 1) * (KV_TILE / STEP));
        for (; step < end; step++) {
            const bf16x8 *stage = stages + (step & 1) * STEP * layout.stride;
            // The first barrier shows this step's keys, and that those of the step before and its scores are read.
            cp_async_wait<0>();
            __syncthreads();
            load_keys(l, layout, item, span, step + 1, stages);
            share_scores(layout, q, stage, shared_scores);
            __syncthreads();
            float s[STEP / 8][4];
            take_scores(s, shared_scores);
            softmax_step(a, rows, c, s, tile, step * STEP);
            add_latents(l, layout, s, stage, tile);
        }
        close(tile);
        if (item.slot != DIRECT) {
            const size_t slot = (size_t)(item.slot + i) * MMA_ROWS;
            each_pair(l, item, tile.o, [&](int row, int, int column, float x, float y) {
                *(float2 *)(a.partial_o + (slot + row) * l.latent_dim + column) = make_float2(x, y);
            });
            TM_UNROLL
            for (int r = 0; r < 2; r++) {
                const int row = lane_id() / 4 + 8 * r;
                if (threadIdx.x % 4 == 0 && warp_id() == 0 && row < item.rows())
                    *(float2 *)(a.partial_ml + (slot + row) * 2) = make_float2(tile.m[r], tile.l[r]);
            }
            continue;
        }
        float factor[2][2];
        merge_rows(total.m, total.l, tile.m, tile.l, c, factor);
        TM_UNROLL
        for (int n = 0; n < MAX_COLS / 8; n++)
            TM_UNROLL
            for (int e = 0; e < 4; e++) total.o[n][e] = merged(total.o[n][e], tile.o[n][e], factor[e / 2]);
    }
    if (item.slot != DIRECT) return;
    const float scale[2] = {normaliser(a, total.m[0], total.l[0], c, 0), normaliser(a, total.m[1], total.l[1], c, 0)};
    const size_t first = (size_t)item.token * a.num_heads + item.first;
    each_pair(l, item, total.o, [&](int row, int r, int column, float x, float y) {
        *(uint32_t *)(a.out + (first + row) * l.latent_dim + column) = pack_bf16(x * scale[r], y * scale[r]);
    });
}

}  // namespace

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) latent_attention(const __grid_constant__ LatentArgs args) {
    DYN_SHARED(bf16x8, shared);
    const LatentRows layout(args);
    const float c = exponent_scale(args.a);
    const Items items(args.a, 0);
    for (int i = blockIdx.x; i < items.count; i += gridDim.x) attend_latent_item(args, layout, items.at[i], c, shared);
}
KERNEL(latent_attention);

extern "C" __global__ void __launch_bounds__(128) latent_combine(const __grid_constant__ LatentArgs args) {
    constexpr int VECTORS = 512 / 128;
    const AttentionArgs &a = args.a;
    const int vectors = args.latent_dim / 4, warps = (int)(gridDim.x * blockDim.x) / 32;
    const float c = exponent_scale(a);
    const Items items(args.a, 2);
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x) / 32; i < items.count * MMA_ROWS; i += warps) {
        const Item &item = items.at[i / MMA_ROWS];
        const int r = i % MMA_ROWS;
        if (r >= item.rows()) continue;
        float m = empty_max(), l = 0.0f;
        float4 total[VECTORS];
        TM_UNROLL
        for (int v = 0; v < VECTORS; v++) total[v] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (uint32_t t = 0; t < item.tiles; t++) {
            const size_t row = (size_t)(item.slot + t) * MMA_ROWS + r;
            const float2 ml = *(const float2 *)(a.partial_ml + row * 2);
            const float4 *o = (const float4 *)(a.partial_o + row * args.latent_dim);
            const float both = fmaxf(m, ml.x);
            float factor[2];
            merge_factors(m, ml.x, both, c, factor);
            m = both;
            l = merged(l, ml.y, factor);
            TM_UNROLL
            for (int v = 0; v < VECTORS; v++) {
                if (lane_id() + 32 * v >= vectors) break;
                const float4 x = o[lane_id() + 32 * v];
                total[v].x = merged(total[v].x, x.x, factor);
                total[v].y = merged(total[v].y, x.y, factor);
                total[v].z = merged(total[v].z, x.z, factor);
                total[v].w = merged(total[v].w, x.w, factor);
            }
        }
        const float scale = normaliser(a, m, l, c, 0);
        uint2 *out = (uint2 *)(a.out + ((size_t)item.token * a.num_heads + item.first + r) * args.latent_dim);
        TM_UNROLL
        for (int v = 0; v < VECTORS; v++)
            if (lane_id() + 32 * v < vectors)
                out[lane_id() + 32 * v] = make_uint2(pack_bf16(total[v].x * scale, total[v].y * scale),
                                                     pack_bf16(total[v].z * scale, total[v].w * scale));
    }
}
KERNEL(latent_combine);
