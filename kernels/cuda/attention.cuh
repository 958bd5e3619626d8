// The arithmetic of attention.cu, shared by its kernels so that each gives the same bits. See there for the order of operations.
#pragma once
#include "primitives.cuh"

using namespace tidemill;

// Everything but the outputs is read only. The same struct as in ops/attention/mod.rs.
struct AttentionArgs {
    bf16 *out;
    const bf16 *qkv;
    const void *kv;  // bf16 or F8E4M3
    const uint32_t *plan;
    const float *slopes;
    const float *sinks;
    float *partial_o;
    float *partial_ml;
    int num_heads;
    int num_kv_heads;
    int block_shift;
    int window;      // 0: none
    float scale;
    float soft_cap;  // 0: none
    int both_ways;   // 1: a token sees later positions too
};

// Partly unrolled where addresses computed ahead would cost more registers than there are.
#if TM_GPU
#define TM_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define TM_UNROLL_BY(...) TM_PRAGMA(unroll(__VA_ARGS__))
#else
#define TM_UNROLL_BY(...)
#endif

namespace {

constexpr int KV_TILE = 128;
constexpr int MMA_ROWS = 16;
constexpr int BLOCK_ROWS = 64;
constexpr uint32_t DIRECT = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;

// One unit of work. The same layout as in ops/attention/plan.rs.
struct __align__(16) Item {
    uint32_t table;      // word of the plan at which the row's block table begins
    uint32_t token;      // of the step: the row's first
    uint32_t position;   // of that token; or, where tokens see later ones, the row's length: its first token is at position 0
    uint32_t head_rows;  // key/value head, number of query rows << 16
    uint32_t first;      // packed query row
    uint32_t tile;       // first tile
    uint32_t tiles;
    uint32_t slot;       // of the first tile's partial result, or DIRECT

    TM_DEVICE int head() const { return (int)(head_rows & 0xffff); }
    TM_DEVICE int rows() const { return (int)(head_rows >> 16); }
    // Position of a packed query row.
    TM_DEVICE int at(const AttentionArgs &a, int packed, int group) const { return (a.both_ways ? 0 : (int)position) + packed / group; }
    // The row's last position, where tokens see it.
    TM_DEVICE int end() const { return (int)position - 1; }
};

// Items of one kind, as the plan's header tells.
struct Items {
    int count;
    const Item *at;

    TM_DEVICE Items(const AttentionArgs &a, int kind)
        : count((int)a.plan[2 * kind]), at((const Item *)(a.plan + a.plan[2 * kind + 1])) {}
};

TM_DEVICE int lane_id() { return (int)(threadIdx.x & 31); }
TM_DEVICE float empty_max() { return -infinity(); }

// Rows of D elements in shared memory, in chunks of 16 bytes, laid out so that eight neighbouring rows of one column lie in different
// banks: rows of whole 128-byte lines are swizzled, others padded to an odd number of chunks.
template <int D>
struct Rows {
    static constexpr int CHUNKS = D / 8;
    static constexpr bool SWIZZLED = CHUNKS % 8 == 0;
    static constexpr int STRIDE = SWIZZLED ? CHUNKS : CHUNKS + 1;
    static TM_DEVICE int at(int row, int chunk) { return row * STRIDE + (SWIZZLED ? chunk ^ (row & 7) : chunk); }
};

// The positions that an item's tokens see, [low, high], and the steps of STEP positions that cover them.
template <int STEP>
struct Span {
    int low, high, first_step, end_step;

    TM_DEVICE Span(const AttentionArgs &a, const Item &item, int group) {
        const int oldest = item.at(a, (int)item.first, group), newest = item.at(a, (int)item.first + item.rows() - 1, group);
        high = newest;
        if (a.both_ways) high = a.window ? min(item.end(), newest + a.window - 1) : item.end();
        low = a.window && oldest >= a.window ? oldest - a.window + 1 : 0;
        first_step = max(low, (int)item.tile * KV_TILE) / STEP;
        end_step = (min(high + 1, (int)(item.tile + item.tiles) * KV_TILE) + STEP - 1) / STEP;
    }
};

// Loads of a lane that are in flight together, as the registers allow: without instructions for F8E4M3 its conversion takes more.
#if TM_GPU && __CUDA_ARCH__ < 890
static constexpr int F8_LOADS = 4;
#else
static constexpr int F8_LOADS = 8;
#endif

// A lane's chunks of 8 elements of a cache in F8E4M3, to shared memory in bf16.
template <int COPIES, class Valid, class Place>
TM_DEVICE void widen_kv(const uint2 *src, Valid valid, Place place) {
    constexpr int ROUNDS = (COPIES + F8_LOADS - 1) / F8_LOADS, AT_ONCE = (COPIES + ROUNDS - 1) / ROUNDS;
    TM_UNROLL_BY(1)
    for (int first = 0; first < COPIES; first += AT_ONCE) {
        uint2 codes[AT_ONCE];
        TM_UNROLL
        for (int i = 0; i < AT_ONCE; i++)
            codes[i] = first + i < COPIES && valid(first + i) ? load_streaming8(src + lane_id() + 32 * (first + i)) : make_uint2(0, 0);
        TM_UNROLL
        for (int i = 0; i < AT_ONCE; i++) {
            if (first + i >= COPIES) break;
            float v[8];
            f8_to_f32(codes[i], v);
            const bf16x8 wide = pack(v);
            store_shared16(place(first + i), make_uint4(wide.pair[0], wide.pair[1], wide.pair[2], wide.pair[3]));
        }
    }
}

// Brings ROWS rows of one head's keys (which = 0) or values (1), from `position` on, to rows row0.. of `tile`, by one warp: queues their copy, or
// with F8 writes them. The rows lie in one block. Positions outside of [low, high] become zeros and are not read.
template <int D, int ROWS, bool F8>
TM_DEVICE void load_kv(const AttentionArgs &a, const Item &item, int which, bf16x8 *tile, int row0, int position, int low, int high) {
    size_t from = 0;  // in chunks of 8 elements
    if (position <= high && position + ROWS > low) {
        const uint32_t block = a.plan[item.table + (position >> a.block_shift)];
        const size_t head = ((size_t)block * 2 + which) * a.num_kv_heads + item.head();
        from = ((head << a.block_shift) + (position & ((1 << a.block_shift) - 1))) * (D / 8);
    }
    constexpr int COPIES = ROWS * (D / 8) / 32;
    const auto row = [&](int i) { return (lane_id() + 32 * i) / (D / 8); };
    const auto valid = [&](int i) { return position + row(i) >= low && position + row(i) <= high; };
    const auto place = [&](int i) { return tile + Rows<D>::at(row0 + row(i), (lane_id() + 32 * i) % (D / 8)); };
    if (F8) {
        widen_kv<COPIES>((const uint2 *)a.kv + from, valid, place);
    } else {
        TM_UNROLL
        for (int i = 0; i < COPIES; i++) cp_async16(place(i), (const bf16x8 *)a.kv + from + lane_id() + 32 * i, valid(i));
    }
}

// Queues the copy of an item's query rows; rows it does not have become zeros.
template <int D, int ROWS, int THREADS>
TM_DEVICE void load_queries(const AttentionArgs &a, const Item &item, int group, bf16x8 *tile) {
    const size_t width = (size_t)(a.num_heads + 2 * a.num_kv_heads) * D;
    for (int i = threadIdx.x; i < ROWS * (D / 8); i += THREADS) {
        const int r = i / (D / 8), chunk = i % (D / 8);
        const int packed = (int)item.first + r, token = (int)item.token + packed / group;
        const int head = item.head() * group + packed % group;
        const bool valid = r < item.rows();
        cp_async16(tile + Rows<D>::at(r, chunk), a.qkv + (valid ? token * width + head * D + chunk * 8 : 0), valid);
    }
}

// The two query rows of this lane in an mma tile, g = lane / 4 and g + 8, and what the warp's 16 rows see together.
struct QueryRows {
    int position[2];     // -1: no such row
    float slope[2];
    int oldest, newest;  // the last positions that the first and the last of them see; newest -1: no row at all

    TM_DEVICE QueryRows(const AttentionArgs &a, const Item &item, int group, int row0) {
        TM_UNROLL
        for (int i = 0; i < 2; i++) {
            const int r = row0 + lane_id() / 4 + 8 * i, packed = (int)item.first + r;
            position[i] = r < item.rows() ? item.at(a, packed, group) : -1;
            slope[i] = a.slopes && position[i] >= 0 ? a.slopes[item.head() * group + packed % group] : 0.0f;
        }
        const int last = min(item.rows(), row0 + MMA_ROWS) - 1;
        oldest = a.both_ways ? item.end() : item.at(a, (int)item.first + row0, group);
        newest = last < row0 ? -1 : a.both_ways ? item.end() : item.at(a, (int)item.first + last, group);
    }
};

// What a lane holds of a softmax-weighted sum over some positions: for each of its two rows the greatest score `m`, the sum `l` of
// exp(score - m), and COLS columns of the weighted values, in the layout of an mma result.
template <int COLS>
struct Sum {
    float m[2], l[2];
    float o[COLS / 8][4];

    TM_DEVICE void clear() {
        TM_UNROLL
        for (int i = 0; i < 2; i++) m[i] = empty_max(), l[i] = 0.0f;
        TM_UNROLL
        for (int n = 0; n < COLS / 8; n++)
            TM_UNROLL
            for (int i = 0; i < 4; i++) o[n][i] = 0.0f;
    }
};

// Scores are kept as raw products, unless something is to be done to them between product and softmax.
TM_DEVICE bool raw_scores(const AttentionArgs &a) { return a.soft_cap == 0.0f && !a.slopes; }
// What a score is multiplied with to be an exponent of 2.
TM_DEVICE float exponent_scale(const AttentionArgs &a) { return raw_scores(a) ? a.scale * LOG2_E : LOG2_E; }

// Factors that bring two sums with greatest scores `total` and `tile` to the common greatest score `both`.
TM_DEVICE void merge_factors(float total, float tile, float both, float c, float (&factor)[2]) {
    const float base = both == empty_max() ? 0.0f : both;
    factor[0] = exp2_approx((total - base) * c);
    factor[1] = exp2_approx((tile - base) * c);
}
// The one formula of the merge. Fused by hand, so that every kernel rounds alike.
TM_DEVICE float merged(float total, float tile, const float (&factor)[2]) { return fmaf(total, factor[0], tile * factor[1]); }

// 1 / denominator of the softmax.
TM_DEVICE float normaliser(const AttentionArgs &a, float m, float l, float c, int head) {
    if (a.sinks) l += exp2_approx(fmaf(a.sinks[head], LOG2_E, -(m * c)));
    return l > 0.0f ? __frcp_rn(l) : 0.0f;
}

// s = q . k of 16 query rows and 16 * N keys; rows q_row.. of q, k_row.. of k.
template <int D, int N>
TM_DEVICE void scores(float (*s)[4], const bf16x8 *q, int q_row, const bf16x8 *k, int k_row) {
    const int lane = lane_id();
    TM_UNROLL
    for (int n = 0; n < 2 * N; n++)
        TM_UNROLL
        for (int i = 0; i < 4; i++) s[n][i] = 0.0f;
    TM_UNROLL_BY(D >= 128 ? 4 : D / 16)
    for (int i = 0; i < D / 16; i++) {
        uint32_t x[4];
        ldmatrix_x4(x, q + Rows<D>::at(q_row + (lane & 15), 2 * i + (lane >> 4)));
        TM_UNROLL
        for (int n = 0; n < N; n++) {
            uint32_t y[4];
            ldmatrix_x4(y, k + Rows<D>::at(k_row + 16 * n + (lane & 7) + (lane >> 4 << 3), 2 * i + (lane >> 3 & 1)));
            mma_bf16(s[2 * n], x, y[0], y[1]);
            mma_bf16(s[2 * n + 1], x, y[2], y[3]);
        }
    }
}

// o += p . v over 16 positions: rows v_row.. of v, columns from chunk `column` on.
template <int D, int COLS>
TM_DEVICE void add_values(float (&o)[COLS / 8][4], const uint32_t (&p)[4], const bf16x8 *v, int v_row, int column) {
    const int lane = lane_id();
    TM_UNROLL
    for (int n = 0; n < COLS / 16; n++) {
        uint32_t y[4];
        ldmatrix_x4_trans(y, v + Rows<D>::at(v_row + (lane & 15), column + 2 * n + (lane >> 4)));
        mma_bf16(o[2 * n], p, y[0], y[1]);
        mma_bf16(o[2 * n + 1], p, y[2], y[3]);
    }
}

// Soft cap and ALiBi (Press et al. 2022), whichever is asked for.
template <int N>
TM_DEVICE void shape_scores(const AttentionArgs &a, const QueryRows &rows, float (&s)[N][4], int position) {
    const float to_cap = a.soft_cap != 0.0f ? 2.0f * LOG2_E / a.soft_cap : 0.0f;
    TM_UNROLL
    for (int n = 0; n < N; n++) {
        TM_UNROLL
        for (int i = 0; i < 4; i++) {
            float x = s[n][i] * a.scale;
            // tanh(x) = 1 - 2 / (1 + exp(2x)): absolutely exact to 1e-7, which is what a score needs.
            if (a.soft_cap != 0.0f) x = a.soft_cap * fmaf(-2.0f, reciprocal_approx(1.0f + exp2_approx(x * to_cap)), 1.0f);
            const int distance = position + 8 * n + 2 * (lane_id() & 3) + (i & 1) - rows.position[i / 2];
            s[n][i] = fmaf(rows.slope[i / 2], (float)distance, x);
        }
    }
}

// One step of the online softmax over 8 * N positions from `position` on: s becomes the weights, and sum its new m and l; what sum.o holds
// is brought to the new m. A lane's l holds its own columns alone until `close`.
template <int N, int COLS>
TM_DEVICE void softmax_step(const AttentionArgs &a, const QueryRows &rows, float c, float (&s)[N][4], Sum<COLS> &sum, int position) {
    if (!raw_scores(a)) shape_scores(a, rows, s, position);
    const bool all_seen = position + 8 * N - 1 <= rows.oldest && (!a.window || (!a.both_ways && position + a.window > rows.newest));
    if (!all_seen) {
        TM_UNROLL
        for (int n = 0; n < N; n++)
            TM_UNROLL
            for (int i = 0; i < 4; i++) {
                const int j = position + 8 * n + 2 * (lane_id() & 3) + (i & 1), p = rows.position[i / 2];
                const int last = a.both_ways ? rows.newest : p;
                if (j > last || (a.window && (j + a.window <= p || j >= p + a.window))) s[n][i] = empty_max();
            }
    }
    float alpha[2];
    TM_UNROLL
    for (int r = 0; r < 2; r++) {
        float m = s[0][2 * r];
        TM_UNROLL
        for (int n = 0; n < N; n++) m = fmaxf(m, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
        m = fmaxf(m, sum.m[r]);
        const float base = m == empty_max() ? 0.0f : m, shift = -(base * c);
        alpha[r] = sum.m[r] == empty_max() ? 1.0f : exp2_approx((sum.m[r] - base) * c);
        sum.m[r] = m;
        float l = 0.0f;
        TM_UNROLL
        for (int n = 0; n < N; n++)
            TM_UNROLL
            for (int i = 2 * r; i < 2 * r + 2; i++) {
                s[n][i] = exp2_approx(fmaf(s[n][i], c, shift));
                l += s[n][i];
            }
        sum.l[r] = fmaf(sum.l[r], alpha[r], l);
    }
    // A factor of 1 changes nothing: the common case, at a tile's beginning and once the greatest score has been met.
    if (alpha[0] != 1.0f || alpha[1] != 1.0f) {
        TM_UNROLL
        for (int n = 0; n < COLS / 8; n++)
            TM_UNROLL
            for (int i = 0; i < 4; i++) sum.o[n][i] *= alpha[i / 2];
    }
}

// The weights of 16 positions as the left operand of an mma.
TM_DEVICE void weights(uint32_t (&p)[4], const float (*s)[4]) {
    p[0] = pack_bf16(s[0][0], s[0][1]);
    p[1] = pack_bf16(s[0][2], s[0][3]);
    p[2] = pack_bf16(s[1][0], s[1][1]);
    p[3] = pack_bf16(s[1][2], s[1][3]);
}

// Ends a tile: l becomes the row's in all four lanes that share it.
template <int COLS>
TM_DEVICE void close(Sum<COLS> &tile) {
    TM_UNROLL
    for (int r = 0; r < 2; r++) {
        tile.l[r] += __shfl_xor_sync(0xffffffffu, tile.l[r], 1);
        tile.l[r] += __shfl_xor_sync(0xffffffffu, tile.l[r], 2);
    }
}

// Merges m and l of a tile into a total's, and gives the factors for the columns of each row.
TM_DEVICE void merge_rows(float (&total_m)[2], float (&total_l)[2], const float (&m)[2], const float (&l)[2], float c,
                          float (&factor)[2][2]) {
    TM_UNROLL
    for (int r = 0; r < 2; r++) {
        const float both = fmaxf(total_m[r], m[r]);
        merge_factors(total_m[r], m[r], both, c, factor[r]);
        total_m[r] = both;
        total_l[r] = merged(total_l[r], l[r], factor[r]);
    }
}

// Writes the results of the lane's two rows, row0 + lane / 4 and 8 further on, columns from `column` on.
template <int D, int COLS>
TM_DEVICE void store(const AttentionArgs &a, const Item &item, int row0, const float (&o)[COLS / 8][4], const float (&m)[2],
                     const float (&l)[2], float c, int column) {
    const int group = a.num_heads / a.num_kv_heads;
    TM_UNROLL
    for (int i = 0; i < 2; i++) {
        const int r = row0 + lane_id() / 4 + 8 * i, packed = (int)item.first + r, head = item.head() * group + packed % group;
        if (r >= item.rows()) continue;
        const float scale = normaliser(a, m[i], l[i], c, head);
        bf16 *row = a.out + ((size_t)(item.token + packed / group) * a.num_heads + head) * D + column;
        uint32_t *out = (uint32_t *)row + (lane_id() & 3);
        TM_UNROLL
        for (int n = 0; n < COLS / 8; n++) out[4 * n] = pack_bf16(o[n][2 * i] * scale, o[n][2 * i + 1] * scale);
    }
}

// Writes a tile's sums to its slot.
template <int D>
TM_DEVICE void store_partial(const AttentionArgs &a, const QueryRows &rows, const Sum<D> &tile, uint32_t slot) {
    TM_UNROLL
    for (int r = 0; r < 2; r++) {
        if (rows.position[r] < 0) continue;
        const size_t row = (size_t)slot * MMA_ROWS + lane_id() / 4 + 8 * r;
        float2 *o = (float2 *)(a.partial_o + row * D) + (lane_id() & 3);
        TM_UNROLL
        for (int n = 0; n < D / 8; n++) o[4 * n] = make_float2(tile.o[n][2 * r], tile.o[n][2 * r + 1]);
        if ((lane_id() & 3) == 0) *(float2 *)(a.partial_ml + row * 2) = make_float2(tile.m[r], tile.l[r]);
    }
}

}  // namespace
