// Matrix product for few rows: streams the weights once from memory straight into registers. Contract and order: linear.cuh.
//
// A block owns 16 R weight rows and 8 T tokens; warp s sums slice s of K, and the slices meet in shared memory in order. Every thread
// keeps D blocks of 32 of its weight rows in flight in registers (32 R D bytes), and as many of its tokens in shared memory:
// it reads back only what it copied itself, so the loop has no barrier.
// Grid (token tiles, ceil(m16 tiles / R)), block 256, dynamic shared memory 4096 T D bytes.
#include "linear.cuh"

using namespace tidemill;

// Floats from one token to the next in the partial sums: 8 more than a multiple of 32 for every second token, so that the lanes
// of a warp hit different banks.
static constexpr int TOKEN_STRIDE = 20;

template <int R, int T, int D, bool GROUPED>
struct Skinny {
    const LinearArgs &a;
    const TokenTile tile;
    const uint32_t slice, lane, chunks, first_row;
    const uint4 *weight;
    const uint4 *x;
    uint4 *queue;             // this thread's tokens in shared memory, [D][T] with 32 uint4 between neighbours
    uint32_t row[R][2];             // where this thread's rows begin, in chunks
    uint32_t token[GROUPED ? T : 1];   // gathered tokens lie anywhere, others 8 rows apart
    uint4 w[D][R][2];
    float sum[R][T][4];

    TM_DEVICE Skinny(const LinearArgs &args, const TokenTile &of, uint4 *shared)
        : a(args), tile(of), slice(threadIdx.x >> 5), lane(threadIdx.x & 31), chunks(args.depth / 8),
          first_row(blockIdx.y * 16 * R), weight(expert_weight(args, of.expert)), x((const uint4 *)args.x),
          queue(shared + slice * (D * T * 32) + lane) {
        const uint32_t g = lane >> 2, t = lane & 3;
        TM_UNROLL
        for (int i = 0; i < R; i++) {
            row[i][0] = weight_row(a, first_row + 16 * i + g) * chunks + t;
            row[i][1] = weight_row(a, first_row + 16 * i + g + 8) * chunks + t;
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

    // Starts the loads of `block` into place `d` of the queues.
    TM_DEVICE void fetch(uint32_t block, uint32_t end, int d) {
        const uint32_t at = block * BLOCK_CHUNKS;
        if (block < end) {
            const bool inside = at + (lane & 3) < chunks;
            TM_UNROLL
            for (int i = 0; i < R; i++)
                for (int h = 0; h < 2; h++)
                    w[d][i][h] = inside ? load_streaming16(weight + row[i][h] + at) : make_uint4(0, 0, 0, 0);
            TM_UNROLL
            for (int j = 0; j < T; j++) {
                const bool present = inside && tile.first + 8 * j + (lane >> 2) < tile.end;
                cp_async16_cached(queue + (d * T + j) * 32, x + (present ? token_begin(j) + at : 0), present);
            }
        }
        cp_async_commit();
    }

    TM_DEVICE void multiply(int d) {
        constexpr int AT_ONCE = T < 2 ? T : 2;
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
                        mma_block(sum[i][from + j], w[d][i][0], w[d][i][1], v[j], step);
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
                multiply(d);
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

template <int R, int T, int D, bool GROUPED>
TM_DEVICE void skinny(const LinearArgs &a) {
    // One tile's partial sums fit where the queues were.
    static_assert(8 * T * TOKEN_STRIDE * (int)sizeof(float) <= D * T * 512, "partial sums of a tile");
    DYN_SHARED(uint4, shared);
    const TokenTile tile = token_tile<GROUPED>(a, blockIdx.x, 8 * T);
    if (tile.first >= tile.end) return;
    Skinny<R, T, D, GROUPED> block(a, tile, shared);
    block.run();
    TM_UNROLL
    for (int i = 0; i < R; i++) {
        __syncthreads();
        block.reduce(i, (float *)shared);
    }
}

// BLOCKS: blocks per SM that the registers must leave room for.
#define SKINNY(NAME, R, T, D, GROUPED, BLOCKS)                                                                           \
    extern "C" __global__ void __launch_bounds__(LINEAR_THREADS, BLOCKS) NAME(const __grid_constant__ LinearArgs args) { \
        skinny<R, T, D, GROUPED>(args);                                                                                  \
    }                                                                                                                    \
    KERNEL(NAME)
SKINNY(linear_skinny_16x8, 1, 1, 4, false, 4);
SKINNY(linear_skinny_16x16, 1, 2, 4, false, 3);
SKINNY(linear_skinny_32x16, 2, 2, 4, false, 2);
SKINNY(linear_skinny_32x32, 2, 4, 3, false, 2);
SKINNY(linear_skinny_32x64, 2, 8, 2, false, 2);
SKINNY(linear_skinny_64x64, 4, 8, 2, false, 1);
SKINNY(grouped_skinny_16x8, 1, 1, 4, true, 4);
SKINNY(grouped_skinny_16x16, 1, 2, 4, true, 3);
SKINNY(grouped_skinny_32x16, 2, 2, 4, true, 2);
SKINNY(grouped_skinny_32x32, 2, 4, 3, true, 2);
SKINNY(grouped_skinny_32x64, 2, 8, 2, true, 1);
SKINNY(grouped_skinny_64x64, 4, 8, 2, true, 1);
