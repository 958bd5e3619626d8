// Matrix product for many rows: tiles of 128 weight rows by T tokens, fed by cp.async. Contract and order: linear.cuh.
// linear_tiled.cu has the kernels for weights in bf16, linear_tiled_quantized.cu those for quantised ones.
//
// 8 warps, each a tile of 16 R weight rows by 32 tokens in mma fragments. A stage of the ring in shared memory is one block of 32 of K:
// 64 bytes per row (32 or 16 of quantised weights, which stay what they are up to the mma; behind all rows the scales, 2 times 8 bytes
// per weight row, one for each half of the block), so that the rows of a warp's fragment loads are contiguous and meet no bank conflict.
// Fragments are loaded a block ahead. A finished slice is added to the totals in registers. The epilogue goes through shared memory, where
// fragments (two tokens of one output per thread) become rows of the output.
// Grid (token tiles * tiles of 128 rows), in the order of `place`; block 256; dynamic shared memory: the larger of
// (128 * 4 BITS + 64 T) STAGES (2048 STAGES more for scales) and 528 T bytes.
#pragma once
#include "linear.cuh"

using namespace tidemill;

static constexpr uint32_t ROWS = 128;
static constexpr int STAGES = 4;
// Token tiles that are neighbours in time share their weights in L2.
static constexpr uint32_t GROUP = 16;
// Floats from one token to the next in the staged output: 4 more than a multiple of 16, so that a warp's stores hit all banks.
static constexpr uint32_t STAGED_STRIDE = ROWS + 4;

// Which tiles this block computes: groups of GROUP token tiles, in a group all row tiles, the token tile changing fastest.
TM_DEVICE void place(uint32_t token_tiles, uint32_t row_tiles, uint32_t &token_tile, uint32_t &row_tile) {
    const uint32_t group = blockIdx.x / (GROUP * row_tiles), within = blockIdx.x % (GROUP * row_tiles);
    const uint32_t size = min(GROUP, token_tiles - group * GROUP);
    token_tile = group * GROUP + within % size;
    row_tile = within / size;
}

template <int T, int BITS, bool GROUPED>
struct Tiled {
    using Octet = typename Codes<BITS>::Type;
    // Warps across tokens; m16 and n8 tiles per warp; 16-byte copies per thread and stage.
    static constexpr int ACROSS = T / 32, R = ROWS / 16 / (8 / ACROSS), N = 4;
    static constexpr uint32_t ROW_COPIES = BITS / 4, WEIGHTS = ROWS * ROW_COPIES;
    static constexpr int WEIGHT_COPIES = (WEIGHTS + LINEAR_THREADS - 1) / LINEAR_THREADS;
    static constexpr int TOKEN_COPIES = T * BLOCK_CHUNKS / LINEAR_THREADS;
    static constexpr bool ALONE = T == 128;
    // In uint4: where a stage's tokens and scales begin, and how long it is.
    static constexpr uint32_t TOKENS = WEIGHTS, SCALES = TOKENS + T * BLOCK_CHUNKS, STAGE = SCALES + (BITS < 16 ? ROWS : 0);

    const LinearArgs &a;
    const TokenTile tile;
    const uint32_t chunks, blocks, first_row, lane, warp_row, warp_token;
    uint4 *ring;
    const uint4 *weight, *activations;
    const uint32_t *scales;         // of the row that this thread copies
    uint32_t weights_from[WEIGHT_COPIES], tokens_from[TOKEN_COPIES];   // where this thread's copies begin, in uint4
    float sum[R][N][4], total[R][N][4];
    Octet w[R][2];
    uint2 scale[R][2];
    uint4 x[N];

    TM_DEVICE Tiled(const LinearArgs &args, const TokenTile &of, uint32_t row_tile, uint4 *shared)
        : a(args), tile(of), chunks(args.depth / 8), blocks(k_blocks(args)), first_row(row_tile * ROWS),
          lane(threadIdx.x & 31), warp_row((threadIdx.x >> 5) / ACROSS * 16 * R), warp_token((threadIdx.x >> 5) % ACROSS * 32),
          ring(shared), weight((const uint4 *)expert_weight<BITS>(args, of.expert)), activations((const uint4 *)args.x) {
        TM_UNROLL
        for (int c = 0; c < WEIGHT_COPIES; c++) {
            const uint32_t row = weight_row(a, first_row + (threadIdx.x + c * LINEAR_THREADS) / ROW_COPIES);
            weights_from[c] = row * (chunks * BITS / 16) + threadIdx.x % ROW_COPIES;
        }
        TM_UNROLL
        for (int c = 0; c < TOKEN_COPIES; c++) {
            const uint32_t r = tile.first + (threadIdx.x + c * LINEAR_THREADS) / BLOCK_CHUNKS;
            tokens_from[c] = x_row<GROUPED>(a, tile, min(r, tile.end - 1)) * chunks + threadIdx.x % BLOCK_CHUNKS;
        }
        if (BITS < 16) scales = expert_scales(a, of.expert) + weight_row(a, first_row + threadIdx.x / 2) * a.scale_stride;
        TM_UNROLL
        for (int i = 0; i < R; i++)
            for (int j = 0; j < N; j++)
                for (int e = 0; e < 4; e++) sum[i][j][e] = total[i][j][e] = 0.0f;
    }

    // Starts the copies of a block into its stage. Chunks beyond K become zeros.
    TM_DEVICE void fetch(uint32_t block) {
        if (block < blocks) {
            uint4 *to = ring + block % STAGES * STAGE;
            const uint32_t at = block * BLOCK_CHUNKS;
            const bool inside = at + threadIdx.x % BLOCK_CHUNKS < chunks;
            TM_UNROLL
            for (int c = 0; c < WEIGHT_COPIES; c++) {
                if (WEIGHTS < LINEAR_THREADS && threadIdx.x >= WEIGHTS) break;
                cp_async16(to + threadIdx.x + c * LINEAR_THREADS, weight + weights_from[c] + (inside ? block * ROW_COPIES : 0), inside);
            }
            TM_UNROLL
            for (int c = 0; c < TOKEN_COPIES; c++)
                cp_async16(to + TOKENS + threadIdx.x + c * LINEAR_THREADS, activations + tokens_from[c] + (inside ? at : 0), inside);
            if (BITS < 16) fetch_scales((uint2 *)(to + SCALES) + threadIdx.x, block);
        }
        cp_async_commit();
    }
    // Two threads per weight row, one for each half of the block.
    TM_DEVICE void fetch_scales(uint2 *to, uint32_t block) {
        const CodeFormat format = code_format(a);
        const uint32_t *word = scales + scale_word<BITS>(format, 32 * block + 16 * (threadIdx.x & 1));
        if (format.offsets) {
            cp_async_small<8>(to, word);
        } else {
            cp_async_small<4>(to, word);
        }
    }

    TM_DEVICE const uint4 *stage(uint32_t block) const { return ring + block % STAGES * STAGE; }
    TM_DEVICE void load_weights(const uint4 *stage, int i) {
        TM_UNROLL
        for (int h = 0; h < 2; h++) {
            const uint32_t row = warp_row + 16 * i + 8 * h;
            load_octet(w[i][h], (const Octet *)stage + row * BLOCK_CHUNKS + lane);
            if (BITS < 16) scale[i][h] = load_scale(stage, row + (lane >> 2));
        }
    }
    static TM_DEVICE void load_octet(uint4 &to, const uint4 *from) { to = load_shared16(from); }
    static TM_DEVICE void load_octet(uint2 &to, const uint2 *from) { to = load_shared8(from); }
    static TM_DEVICE void load_octet(uint32_t &to, const uint32_t *from) { to = load_shared4(from); }
    TM_DEVICE uint2 load_scale(const uint4 *stage, uint32_t row) const {
        const uint2 *from = (const uint2 *)(stage + SCALES) + 2 * row + (lane >> 1 & 1);
        return a.flags & OFFSETS ? load_shared8(from) : make_uint2(load_shared4(from), 0);
    }
    TM_DEVICE void load_tokens(const uint4 *stage, uint4 (&to)[N]) {
        TM_UNROLL
        for (int j = 0; j < N; j++)
            to[j] = load_shared16(stage + TOKENS + (warp_token + 8 * j) * BLOCK_CHUNKS + lane);
    }

    // Multiplies a block, whose fragments are here, and loads those of the next: a row tile's as soon as it has been used, the tokens
    // first of all where a block has the SM's registers to itself. After the last block it loads what nothing uses.
    TM_DEVICE void step(uint32_t block) {
        const uint4 *next = stage(block + 1);
        uint4 coming[N];
        if (ALONE) load_tokens(next, coming);
        TM_UNROLL
        for (int i = 0; i < R; i++) {
            const uint32_t column = 32 * block + 8 * (lane & 3);
            const uint4 low = widen(code_format(a), w[i][0], scale[i][0], column);
            const uint4 high = widen(code_format(a), w[i][1], scale[i][1], column);
            TM_UNROLL
            for (int half = 0; half < 2; half++)
                TM_UNROLL
                for (int j = 0; j < N; j++) mma_block(sum[i][j], low, high, x[j], half);
            load_weights(next, i);
        }
        if (!ALONE) load_tokens(next, coming);
        TM_UNROLL
        for (int j = 0; j < N; j++) x[j] = coming[j];
    }

    TM_DEVICE void close_slice() {
        TM_UNROLL
        for (int i = 0; i < R; i++)
            TM_UNROLL
            for (int j = 0; j < N; j++)
                TM_UNROLL
                for (int e = 0; e < 4; e++) {
                    total[i][j][e] += sum[i][j][e];
                    sum[i][j][e] = 0.0f;
                }
    }

    TM_DEVICE void run() {
        for (int s = 0; s < STAGES; s++) fetch(s);
        cp_async_wait<STAGES - 1>();
        __syncthreads();
        load_tokens(stage(0), x);
        TM_UNROLL
        for (int i = 0; i < R; i++) load_weights(stage(0), i);
        const uint32_t per_slice = slice_blocks(a);
        uint32_t left = per_slice;
        for (uint32_t block = 0; block < blocks; block++) {
            // The next stage has arrived, and everybody has read this one.
            cp_async_wait<STAGES - 2>();
            __syncthreads();
            fetch(block + STAGES);
            step(block);
            if (--left == 0) {
                close_slice();
                left = per_slice;
            }
        }
        if (left != per_slice) close_slice();
        cp_async_wait<0>();
        __syncthreads();
    }

    // Totals to `staged` [T][STAGED_STRIDE].
    TM_DEVICE void stage_totals(float *staged) {
        const uint32_t g = lane >> 2, t = lane & 3;
        TM_UNROLL
        for (int i = 0; i < R; i++)
            TM_UNROLL
            for (int j = 0; j < N; j++)
                TM_UNROLL
                for (int e = 0; e < 4; e++) {
                    const uint32_t token = warp_token + 8 * j + 2 * t + (e & 1), r = warp_row + 16 * i + g + 4 * (e & 2);
                    store_shared4(staged + token * STAGED_STRIDE + r, f32_to_bits(total[i][j][e]));
                }
    }

    // Staged totals to the output, 8 neighbours at a time.
    TM_DEVICE void store(const float *staged) {
        const bool gated = a.flags & GATED;
        const uint32_t per_token = gated ? ROWS / 16 : ROWS / 8;
        for (uint32_t e = threadIdx.x; e < T * per_token; e += LINEAR_THREADS) {
            const uint32_t token = e / per_token, octet = e % per_token, r = tile.first + token;
            const uint32_t n = (gated ? first_row / 2 : first_row) + 8 * octet;
            if (r >= tile.end || n >= a.width) continue;
            const float *at = staged + token * STAGED_STRIDE + octet * (gated ? 16 : 8);
            store_octet(out_row<GROUPED>(a, tile, r) * a.width + n, n, at, at + (gated ? 8 : 0));
        }
    }
    TM_DEVICE void store_octet(size_t at, uint32_t n, const float *staged, const float *staged_up) {
        if (n + 8 > a.width || a.width % 8) {
            for (uint32_t i = 0; i < min(a.width - n, 8u); i++) {
                float v[1] = {staged[i]}, up[1] = {staged_up[i]};
                finish(a, tile.expert, n + i, v, up);
                store_one(a, at + i, v[0]);
            }
            return;
        }
        float v[8], up[8];
        TM_UNROLL
        for (int i = 0; i < 8; i++) {
            v[i] = staged[i];
            up[i] = staged_up[i];
        }
        finish(a, tile.expert, n, v, up);
        if (a.flags & OUT_F32) {
            float4 *out = (float4 *)((float *)a.out + at);
            out[0] = make_float4(v[0], v[1], v[2], v[3]);
            out[1] = make_float4(v[4], v[5], v[6], v[7]);
            return;
        }
        bf16x8 *out = (bf16x8 *)((bf16 *)a.out + at);
        if (a.flags & RESIDUAL) {
            float residual[8];
            unpack(*out, residual);
            TM_UNROLL
            for (int i = 0; i < 8; i++) v[i] += residual[i];
        }
        *out = pack(v);
    }
};

template <int T, int BITS, bool GROUPED>
TM_DEVICE void tiled(const LinearArgs &a, uint32_t token_tiles) {
    DYN_SHARED(uint4, shared);
    uint32_t index, row_tile;
    place(token_tiles, gridDim.x / token_tiles, index, row_tile);
    const TokenTile tile = token_tile<GROUPED>(a, index, T);
    if (tile.first >= tile.end) return;
    Tiled<T, BITS, GROUPED> block(a, tile, row_tile, shared);
    block.run();
    block.stage_totals((float *)shared);
    __syncthreads();
    block.store((const float *)shared);
}

// BLOCKS: blocks per SM that the registers must leave room for.
#define TILED(NAME, T, BITS, GROUPED, BLOCKS)                                          \
    extern "C" __global__ void __launch_bounds__(LINEAR_THREADS, BLOCKS)               \
        NAME(const __grid_constant__ LinearArgs args, uint32_t token_tiles) {          \
        tiled<T, BITS, GROUPED>(args, token_tiles);                                    \
    }                                                                                  \
    KERNEL(NAME)
