// Matrix product for many rows: tiles of 128 weight rows by T tokens, fed by cp.async. Contract and order: linear.cuh.
//
// 8 warps, each a tile of 16 R weight rows by 32 tokens in mma fragments. A stage of the ring in shared memory is one block of 32 of K:
// 64 bytes per row, so that a warp's 16-byte fragment loads cover 512 contiguous bytes and meet no bank conflict. Fragments are
// loaded a block ahead. A finished slice is added to the totals in registers. The epilogue goes through shared memory, where
// fragments (two tokens of one output per thread) become rows of the output.
// Grid (token tiles * tiles of 128 rows), in the order of `place`; block 256; dynamic shared memory: the larger of
// 64 (128 + T) STAGES and 528 T bytes.
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

template <int T, bool GROUPED>
struct Tiled {
    // Warps across tokens; m16 and n8 tiles per warp; 16-byte copies per thread and stage.
    static constexpr int ACROSS = T / 32, R = ROWS / 16 / (8 / ACROSS), N = 4;
    static constexpr int WEIGHT_COPIES = ROWS * 4 / LINEAR_THREADS, COPIES = (ROWS + T) * 4 / LINEAR_THREADS;
    static constexpr bool ALONE = T == 128;
    static constexpr uint32_t STAGE = (ROWS + T) * BLOCK_CHUNKS;   // in uint4

    const LinearArgs &a;
    const TokenTile tile;
    const uint32_t chunks, blocks, first_row, lane, warp_row, warp_token;
    uint4 *ring;
    const uint4 *weight, *activations;
    uint32_t from[COPIES];          // where this thread's copies begin, in chunks: first of weights, then of tokens
    float sum[R][N][4], total[R][N][4];
    uint4 w[R][2], x[N];

    TM_DEVICE Tiled(const LinearArgs &args, const TokenTile &of, uint32_t row_tile, uint4 *shared)
        : a(args), tile(of), chunks(args.depth / 8), blocks(k_blocks(args)), first_row(row_tile * ROWS),
          lane(threadIdx.x & 31), warp_row((threadIdx.x >> 5) / ACROSS * 16 * R), warp_token((threadIdx.x >> 5) % ACROSS * 32),
          ring(shared), weight(expert_weight(args, of.expert)), activations((const uint4 *)args.x) {
        TM_UNROLL
        for (int c = 0; c < COPIES; c++) {
            const uint32_t r = (threadIdx.x + c * LINEAR_THREADS) / BLOCK_CHUNKS;
            const uint32_t row = c < WEIGHT_COPIES ? weight_row(a, first_row + r)
                                                   : x_row<GROUPED>(a, tile, min(tile.first + r - ROWS, tile.end - 1));
            from[c] = row * chunks + threadIdx.x % BLOCK_CHUNKS;
        }
        TM_UNROLL
        for (int i = 0; i < R; i++)
            for (int j = 0; j < N; j++)
                for (int e = 0; e < 4; e++) sum[i][j][e] = total[i][j][e] = 0.0f;
    }

    // Starts the copies of a block into its stage. Chunks beyond K become zeros.
    TM_DEVICE void fetch(uint32_t block) {
        const uint32_t at = block * BLOCK_CHUNKS;
        if (block < blocks) {
            const bool inside = at + threadIdx.x % BLOCK_CHUNKS < chunks;
            uint4 *to = ring + block % STAGES * STAGE + threadIdx.x;
            TM_UNROLL
            for (int c = 0; c < COPIES; c++) {
                const uint4 *base = c < WEIGHT_COPIES ? weight : activations;
                cp_async16(to + c * LINEAR_THREADS, base + from[c] + (inside ? at : 0), inside);
            }
        }
        cp_async_commit();
    }

    TM_DEVICE const uint4 *stage(uint32_t block) const { return ring + block % STAGES * STAGE; }
    TM_DEVICE void load_weights(const uint4 *stage, int i) {
        const uint4 *row = stage + (warp_row + 16 * i) * BLOCK_CHUNKS + lane;
        w[i][0] = load_shared16(row);
        w[i][1] = load_shared16(row + 8 * BLOCK_CHUNKS);
    }
    TM_DEVICE void load_tokens(const uint4 *stage, uint4 (&to)[N]) {
        TM_UNROLL
        for (int j = 0; j < N; j++)
            to[j] = load_shared16(stage + (ROWS + warp_token + 8 * j) * BLOCK_CHUNKS + lane);
    }

    // Multiplies a block, whose fragments are here, and loads those of the next: a row tile's as soon as it has been used, the tokens
    // first of all where a block has the SM's registers to itself. After the last block it loads what nothing uses.
    TM_DEVICE void step(uint32_t block) {
        const uint4 *next = stage(block + 1);
        uint4 coming[N];
        if (ALONE) load_tokens(next, coming);
        TM_UNROLL
        for (int i = 0; i < R; i++) {
            TM_UNROLL
            for (int half = 0; half < 2; half++)
                TM_UNROLL
                for (int j = 0; j < N; j++) mma_block(sum[i][j], w[i][0], w[i][1], x[j], half);
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

template <int T, bool GROUPED>
TM_DEVICE void tiled(const LinearArgs &a, uint32_t token_tiles) {
    DYN_SHARED(uint4, shared);
    uint32_t index, row_tile;
    place(token_tiles, gridDim.x / token_tiles, index, row_tile);
    const TokenTile tile = token_tile<GROUPED>(a, index, T);
    if (tile.first >= tile.end) return;
    Tiled<T, GROUPED> block(a, tile, row_tile, shared);
    block.run();
    block.stage_totals((float *)shared);
    __syncthreads();
    block.store((const float *)shared);
}

#define TILED(NAME, T, GROUPED, BLOCKS)                                                \
    extern "C" __global__ void __launch_bounds__(LINEAR_THREADS, BLOCKS)               \
        NAME(const __grid_constant__ LinearArgs args, uint32_t token_tiles) {          \
        tiled<T, GROUPED>(args, token_tiles);                                          \
    }                                                                                  \
    KERNEL(NAME)
TILED(linear_tiled_128x128, 128, false, 1);
TILED(linear_tiled_128x64, 64, false, 2);
TILED(grouped_tiled_128x128, 128, true, 1);
TILED(grouped_tiled_128x64, 64, true, 2);
