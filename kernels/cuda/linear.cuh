// What the matrix-product kernels share: their argument, the order of every sum, and what happens to a finished product.
//
//   out[r, n] = epilogue( sum_k x[r, k] * weight[n, k] + bias[n] )
//
// x [M, K] bf16, weight [W, K] bf16 as in checkpoints, both 16-byte aligned; K a multiple of 8; any M and W. out [M, N] bf16 or f32.
// Kernels of BITS 8 or 4: weight is quantised, as quantized.cuh says, and K a multiple of 32.
// Not gated: W = N. Gated: W = 2 N, gate rows first, and out = activation(gate) * up.
//
// Order of a sum, the same in every kernel of the family whatever M is, so that a row has the same bits in any company:
// - K is cut into blocks of 32, the last one filled with zeros, and the blocks into 8 slices of ceil(blocks / 8).
// - A slice is a chain of mma.sync.m16n8k16, two per block, from zero. Weights are the A operand, tokens the B operand.
// - Lane (g, t) of a warp owns elements 8t..8t+7 of a block in row g: one 16-byte access. The first mma takes 8t, 8t+1 for its
//   columns 2t, 2t+1 and 8t+2, 8t+3 for 2t+8, 2t+9; the second takes 8t+4..8t+7 likewise. Both operands are permuted alike.
// - The slices are added in order, beginning with 0; then bias; activation, gate; residual; one rounding.
#pragma once
#include "quantized.cuh"

namespace tidemill {

static constexpr int LINEAR_THREADS = 256;
static constexpr int SLICES = 8;
// Chunks of 8 elements, 16 bytes, in a block of 32.
static constexpr uint32_t BLOCK_CHUNKS = 4;

// Bits of LinearArgs::flags.
static constexpr uint32_t GATED = 1, RESIDUAL = 2, OUT_F32 = 4, BIAS_BF16 = 8, OFFSETS = 16, FLOAT_CODES = 32;
// Values of LinearArgs::activation. SOFT_CAP: cap * tanh(v / cap). SWIGLU_OAI, gated alone: (u + 1) * g / (1 + e^(-alpha g)) with
// g = min(gate, cap), u = up within -cap..cap.
static constexpr uint32_t IDENTITY = 0, SILU = 1, GELU = 2, GELU_TANH = 3, SOFT_CAP = 4, RELU = 5, SWIGLU_OAI = 6;
// Expert of a token tile that holds nothing.
static constexpr uint32_t NO_EXPERT = 0xffffffffu;

// The same struct stands in ops/linear/arguments.rs. `divisor` and the fields from `tiles` to `pairs` are for grouped products alone: there
// `weight` is [E, W, K], `bias` [E, W], and rows are positions in an order of (token, expert) pairs that is sorted by expert; `offsets`
// [E + 1] says where each begins. Without `tiles` every expert has `rows` rows: row r of expert e is row r * divisor + e of x and out.
struct LinearArgs {
    void *out;
    const bf16 *x;
    const void *weight;
    const void *bias;           // [W] f32 or bf16, or null
    const uint32_t *scales;     // of a quantised weight
    const uint2 *tiles;         // one token tile per entry: its expert, its first row; or null
    const uint32_t *offsets;
    const uint32_t *pairs;      // row r reads x[pairs[r] / divisor] and writes out[pairs[r]]
    uint32_t rows;              // M
    uint32_t width;             // N
    uint32_t depth;             // K
    uint32_t activation;
    uint32_t flags;
    uint32_t divisor;
    float cap;
    uint32_t scale_stride;      // words from one row's scales to the next
    uint32_t scale_shift;
    float alpha;
};

// Rows first..end of the product, and whose weights they meet.
struct TokenTile {
    uint32_t first, end, expert;
};

template <bool GROUPED>
TM_DEVICE TokenTile token_tile(const LinearArgs &a, uint32_t index, uint32_t tokens) {
    if (!GROUPED) return {index * tokens, min(a.rows, (index + 1) * tokens), 0};
    if (!a.tiles) {
        const uint32_t per_expert = (a.rows + tokens - 1) / tokens, first = index % per_expert * tokens;
        return {first, min(a.rows, first + tokens), index / per_expert};
    }
    const uint2 tile = a.tiles[index];
    if (tile.x == NO_EXPERT) return {0, 0, 0};
    return {tile.y, min(a.offsets[tile.x + 1], tile.y + tokens), tile.x};
}
template <bool GROUPED>
TM_DEVICE uint32_t x_row(const LinearArgs &a, const TokenTile &tile, uint32_t row) {
    if (!GROUPED) return row;
    return a.tiles ? a.pairs[row] / a.divisor : row * a.divisor + tile.expert;
}
template <bool GROUPED>
TM_DEVICE size_t out_row(const LinearArgs &a, const TokenTile &tile, uint32_t row) {
    if (!GROUPED) return row;
    return a.tiles ? a.pairs[row] : (size_t)row * a.divisor + tile.expert;
}

TM_DEVICE uint32_t weight_rows(const LinearArgs &a) { return a.flags & GATED ? 2 * a.width : a.width; }
// An expert's weights, eight at a time, and their scales.
template <int BITS>
TM_DEVICE const typename Codes<BITS>::Type *expert_weight(const LinearArgs &a, uint32_t expert) {
    return (const typename Codes<BITS>::Type *)a.weight + (size_t)expert * weight_rows(a) * (a.depth / 8);
}
TM_DEVICE const uint32_t *expert_scales(const LinearArgs &a, uint32_t expert) {
    return a.scales + (size_t)expert * weight_rows(a) * a.scale_stride;
}
TM_DEVICE CodeFormat code_format(const LinearArgs &a) {
    return {(a.flags & FLOAT_CODES) != 0, (a.flags & OFFSETS) != 0, a.scale_shift};
}

// Row of the weight that is row `r` of the m16 tiles, counted through. A gated tile holds 8 gate rows, then the 8 up rows of the
// same outputs, so that a thread's d[0], d[1] and d[2], d[3] are the gate and the up of one output. Past the end: the last
// row, whose result nobody stores.
TM_DEVICE uint32_t weight_row(const LinearArgs &a, uint32_t r) {
    if (!(a.flags & GATED)) return min(r, a.width - 1);
    const uint32_t output = min((r >> 4) * 8 + (r & 7), a.width - 1);
    return r & 8 ? a.width + output : output;
}

TM_DEVICE uint32_t k_blocks(const LinearArgs &a) { return (a.depth + 31) / 32; }
TM_DEVICE uint32_t slice_blocks(const LinearArgs &a) { return (k_blocks(a) + SLICES - 1) / SLICES; }

// d += both k16 steps of a block: `low` and `high` are rows g and g + 8 of the weights, `x` row g of the tokens.
TM_DEVICE void mma_block(float (&d)[4], const uint4 &low, const uint4 &high, const uint4 &x, int step) {
    if (step == 0) {
        const uint32_t w[4] = {low.x, high.x, low.y, high.y};
        mma_bf16(d, w, x.x, x.y);
    } else {
        const uint32_t w[4] = {low.z, high.z, low.w, high.w};
        mma_bf16(d, w, x.z, x.w);
    }
}

// ---- Epilogue. No product here feeds a plain sum, so no compiler can fuse one in one kernel and not in another.

// SiLU (Elfwing et al. 2018); GELU and its tanh form (Hendrycks and Gimpel 2016, section 2).
TM_DEVICE float silu(float v) { return v / (1.0f + __expf(-v)); }
TM_DEVICE float gelu(float v) {
    const float half = 0.5f * v;
    return __fmaf_rn(half, erff(v * 0.70710678f), half);
}
TM_DEVICE float gelu_tanh(float v) {
    const float half = 0.5f * v;
    const float inner = __fmaf_rn(0.044715f * v * v, v, v);
    return __fmaf_rn(half, tanhf(0.79788456f * inner), half);
}
template <int COUNT>
TM_DEVICE void activate(const LinearArgs &a, float (&v)[COUNT]) {
    switch (a.activation) {
        case SILU:
            TM_UNROLL
            for (int i = 0; i < COUNT; i++) v[i] = silu(v[i]);
            break;
        case GELU:
            TM_UNROLL
            for (int i = 0; i < COUNT; i++) v[i] = gelu(v[i]);
            break;
        case GELU_TANH:
            TM_UNROLL
            for (int i = 0; i < COUNT; i++) v[i] = gelu_tanh(v[i]);
            break;
        case SOFT_CAP:
            TM_UNROLL
            for (int i = 0; i < COUNT; i++) v[i] = a.cap * tanhf(v[i] / a.cap);
            break;
        case RELU:
            TM_UNROLL
            for (int i = 0; i < COUNT; i++) v[i] = v[i] < 0.0f ? 0.0f : v[i];
            break;
        case SWIGLU_OAI:
            TM_UNROLL
            for (int i = 0; i < COUNT; i++) {
                const float g = v[i] > a.cap ? a.cap : v[i];
                v[i] = g / (1.0f + __expf(-a.alpha * g));
            }
            break;
        default: break;
    }
}
// What the activated gate is multiplied with.
TM_DEVICE float gated_up(const LinearArgs &a, float up) {
    if (a.activation != SWIGLU_OAI) return up;
    return (up > a.cap ? a.cap : up < -a.cap ? -a.cap : up) + 1.0f;
}

template <int COUNT>
TM_DEVICE void add_bias(const LinearArgs &a, uint32_t expert, uint32_t first, float (&v)[COUNT]) {
    if (!a.bias) return;
    const size_t at = (size_t)expert * weight_rows(a) + first;
    TM_UNROLL
    for (int i = 0; i < COUNT; i++)
        v[i] += a.flags & BIAS_BF16 ? to_f32(((const bf16 *)a.bias)[at + i]) : ((const float *)a.bias)[at + i];
}

// Products of outputs n.. -> values, all but the residual. `up` counts when gated.
template <int COUNT>
TM_DEVICE void finish(const LinearArgs &a, uint32_t expert, uint32_t n, float (&v)[COUNT], float (&up)[COUNT]) {
    add_bias(a, expert, n, v);
    activate(a, v);
    if (a.flags & GATED) {
        add_bias(a, expert, a.width + n, up);
        TM_UNROLL
        for (int i = 0; i < COUNT; i++) v[i] *= gated_up(a, up[i]);
    }
}
TM_DEVICE void store_one(const LinearArgs &a, size_t at, float v) {
    if (a.flags & OUT_F32) {
        ((float *)a.out)[at] = v;
    } else {
        bf16 *out = (bf16 *)a.out + at;
        *out = to_bf16(a.flags & RESIDUAL ? v + to_f32(*out) : v);
    }
}

}  // namespace tidemill
