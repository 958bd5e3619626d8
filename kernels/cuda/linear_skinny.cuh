// Matrix product for few rows: streams the weights once from memory straight into registers. Contract and order: linear.cuh.
// linear_skinny.cu has the kernels for weights in bf16, linear_skinny_quantized.cu those for quantised ones.
//
// A block owns 16 R weight rows and 8 T tokens; warp s sums slice s of K, and the slices meet in shared memory in order. Every thread
// keeps D blocks of 32 of its weight rows in flight in registers (2 R D of eight weights), and as many of its tokens in shared memory:
// it reads back only what it copied itself, so the loop has no barrier.
// Grid (token tiles, ceil(m16 tiles / R)), block 256, dynamic shared memory 4096 T D bytes.
#pragma once
#include "linear.cuh"

using namespace tidemill;

// Floats from one token to the next in the partial sums: 8 more than a multiple of 32 for every second token, so that the lanes
// of a warp hit different banks.
static constexpr int TOKEN_STRIDE = 20;

template <int R, int T, int D, int BITS, bool GROUPED>
struct Skinny {
    using Octet = typename Codes<BITS>::Type;

    const LinearArgs &a;
    const TokenTile tile;
    const uint32_t slice, lane, chunks, first_row;
    const Octet *weight;
    const uint32_t *scales;
    const uint4 *x;
    uint4 *queue;             // this thread's tokens in shared memory, [D][T] with 32 uint4 between neighbours
    uint32_t row[R][2];             // where this thread's rows begin, in chunks of eight
    uint32_t scale_row[R][2];       // and their scales, in words
    uint32_t token[GROUPED ? T : 1];   // gathered tokens lie anywhere, others 8 rows apart
    Octet w[D][R][2];
    uint2 scale[D][R][2];
    float sum[R][T][4];

    TM_DEVICE Skinny(const LinearArgs &args, const TokenTile &of, uint4 *shared)
        : a(args), tile(of), slice(threadIdx.x >> 5), lane(threadIdx.x & 31), chunks(args.depth / 8),
          first_row(blockIdx.y * 16 * R), weight(expert_weight<BITS>(args, of.expert)),
          scales(expert_scales(args, of.expert)), x((const uint4 *)args.x),
          queue(shared + slice * (D * T * 32) + lane) {
        const uint32_t g = lane >> 2, t = lane & 3;
        TM_UNROLL
        for (int i = 0; i < R; i++)
            for (int h = 0; h < 2; h++) {
                const uint32_t r = weight_row(a, first_row + 16 * i + g + 8 * h);
                row[i][h] = r * chunks + t;
                if (BITS < 16) scale_row[i][h] = r * a.scale_stride;
            }
        TM_UNROLL
        for (int j = 0; j < (GROUPED ? T : 1); j++)
            token[j] = x_row<GROUPED>(a, tile, min(tile.first + 8 * j + g, tile.end - 1)) * chunks + t;
        TM_UNROLL
        for (int i = 0; i < R; i++)
            TM_UNROLL
            for (int j = 0; j < T; j++)
                TM_UNROLL
                for (int e = 0; e < 4; e++) sum[i][j][e] = 0.0f;
    }
    TM_DEVICE uint32_t token_begin(int j) const { return GROUPED ? token[j] : token[0] + j * 8 * chunks; }

    // The first of this thread's eight columns in a block.
    TM_DEVICE uint32_t column(uint32_t block) const { return 32 * block + 8 * (lane & 3); }

    // Starts the loads of `block` into place `d` of the queues.
    TM_DEVICE void fetch(uint32_t block, uint32_t end, int d) {
        const uint32_t at = block * BLOCK_CHUNKS;
        if (block < end) {
            const bool inside = at + (lane & 3) < chunks;
            const CodeFormat format = code_format(a);
            const uint32_t word = scale_word<BITS>(format, column(block));
            TM_UNROLL
            for (int i = 0; i < R; i++)
                for (int h = 0; h < 2; h++) {
                    w[d][i][h] = inside ? load_codes(weight + row[i][h] + at) : Octet{};
                    if (BITS < 16) scale[d][i][h] = load_scales(format, scales + scale_row[i][h] + word);
                }
            TM_UNROLL
            for (int j = 0; j < T; j++) {
                const bool present = inside && tile.first + 8 * j + (lane >> 2) < tile.end;
                cp_async16_cached(queue + (d * T + j) * 32, x + (present ? token_begin(j) + at : 0), present);
            }
        }
        cp_async_commit();
    }

    TM_DEVICE void multiply(uint32_t block, int d) {
        constexpr int AT_ONCE = T < 2 ? T : 2;
        uint4 wide[R][2];
        TM_UNROLL
        for (int i = 0; i < R; i++)
            for (int h = 0; h < 2; h++) wide[i][h] = widen(code_format(a), w[d][i][h], scale[d][i][h], column(block));
        TM_UNROLL
        for (int from = 0; from < T; from += AT_ONCE) {
            uint4 v[AT_ONCE];
            TM_UNROLL
            for (int j = 0; j < AT_ONCE; j++) v[j] = load_shared16(queue + (d * T + from + j) * 32);
            TM_UNROLL
            for (int step = 0; step < 2; step++)
                TM_UNROLL
                for (int i = 0; i < R; i++)
                    TM_UNROLL
                    for (int j = 0; j < AT_ONCE; j++)
                        mma_block(sum[i][from + j], wide[i][0], wide[i][1], v[j], step);
        }
    }

    TM_DEVICE void run() {
        const uint32_t end = min((slice + 1) * slice_blocks(a), k_blocks(a));
        uint32_t block = slice * slice_blocks(a);
        TM_UNROLL
        for (int d = 0; d < D; d++) fetch(block + d, end, d);
        for (; block < end; block += D) {
            TM_UNROLL
            for (int d = 0; d < D; d++) {
                if (block + d >= end) break;
                cp_async_wait<D - 1>();
                multiply(block + d, d);
                fetch(block + d + D, end, d);
            }
        }
        cp_async_wait<0>();
    }

    // Adds the slices of m16 tile `i` in order and stores. `partial` [SLICES][8 T][TOKEN_STRIDE] is free on entry.
    TM_DEVICE void reduce(int i, float *partial) {
        const uint32_t g = lane >> 2, t = lane & 3;
        constexpr uint32_t SLICE_STRIDE = 8 * T * TOKEN_STRIDE;
        float *mine = partial + slice * SLICE_STRIDE + g;
        TM_UNROLL
        for (int j = 0; j < T; j++)
            for (int e = 0; e < 4; e++)
                store_shared4(mine + (8 * j + 2 * t + (e & 1)) * TOKEN_STRIDE + 4 * (e & 2), f32_to_bits(sum[i][j][e]));
        __syncthreads();
        const uint32_t per_token = a.flags & GATED ? 8 : 16;
        for (uint32_t e = threadIdx.x; e < 8 * T * per_token; e += LINEAR_THREADS) {
            const uint32_t r = tile.first + e / per_token, column = e % per_token;
            const uint32_t n = (first_row / 16 + i) * per_token + column;
            if (r >= tile.end || n >= a.width) continue;
            const float *from = partial + e / per_token * TOKEN_STRIDE + column;
            float v[1] = {0.0f}, up[1] = {0.0f};
            TM_UNROLL
            for (int s = 0; s < SLICES; s++) {
                v[0] += from[s * SLICE_STRIDE];
                if (a.flags & GATED) up[0] += from[s * SLICE_STRIDE + 8];
            }
            finish(a, tile.expert, n, v, up);
            store_one(a, out_row<GROUPED>(a, tile, r) * a.width + n, v[0]);
        }
    }
};

template <int R, int T, int D, int BITS, bool GROUPED>
TM_DEVICE void skinny(const LinearArgs &a) {
    // One tile's partial sums fit where the queues were.
    static_assert(8 * T * TOKEN_STRIDE * (int)sizeof(float) <= D * T * 512, "partial sums of a tile");
    DYN_SHARED(uint4, shared);
    const TokenTile tile = token_tile<GROUPED>(a, blockIdx.x, 8 * T);
    if (tile.first >= tile.end) return;
    Skinny<R, T, D, BITS, GROUPED> block(a, tile, shared);
    block.run();
    TM_UNROLL
    for (int i = 0; i < R; i++) {
        __syncthreads();
        block.reduce(i, (float *)shared);
    }
}

// BLOCKS: blocks per SM that the registers must leave room for.
#define SKINNY(NAME, R, T, D, BITS, GROUPED, BLOCKS)                                                                     \
    extern "C" __global__ void __launch_bounds__(LINEAR_THREADS, BLOCKS) NAME(const __grid_constant__ LinearArgs args) { \
        skinny<R, T, D, BITS, GROUPED>(args);                                                                            \
    }                                                                                                                    \
    KERNEL(NAME)
