// Low-rank adapters (Hu et al. 2021, LoRA, section 4.1), many in one step (Chen et al. 2023, Punica; Sheng et al. 2023, S-LoRA).
//
//   shrink   low[i, p, j] = sum over k of A[slot, p, j, k] * x[tokens[i], k]
//   expand   out[tokens[i], first[p] + n] += scale[slot, p] * sum over j of low[i, p, j] * B[slot, p][j, n]     rounded to bf16
//   restore  out[t, :] = from[t, :]                                                    for tokens t without an adapter
//
// tokens lists the tokens of rows that have an adapter, those of one adapter together; groups [G, 3] cuts the list into pieces of at most
// GROUP tokens of one adapter: where a piece begins, how many it has, and its slot. Each matrix is read once for a piece.
//
// x [T, K], out [T, N], from [T, width] bf16; low [tokens, P, max_rank] f32; A [slots, P, max_rank, K] bf16, of which the first rank rows are
// used; B [slots, N * max_rank] bf16, that of part p at max_rank * first[p], [rank, N_p] from there on; table [slots, P, 2] u32: the rank, 0 where
// the adapter leaves the part as it is, and the scale's bits; parts [P, 2] u32: first[p] and N_p. x and A 16-byte aligned, K a multiple of 8.
// Grids: shrink (G, P, max_rank / 8 rounded up), expand (G, P, the largest N_p / 256 rounded up), restore (T); block 256.
// The order of a token's sums depends on K and the rank alone.
#include "primitives.cuh"

using namespace tidemill;

static constexpr int THREADS = 256;
static constexpr int GROUP = 8;

extern "C" __global__ void __launch_bounds__(THREADS)
    lora_shrink_bf16(float *low, const bf16 *x, const bf16 *a, const uint32_t *table, const uint32_t *tokens,
                     const uint32_t *groups, int width, int max_rank) {
    const uint32_t first = groups[3 * blockIdx.x], count = groups[3 * blockIdx.x + 1], slot = groups[3 * blockIdx.x + 2];
    const int parts = gridDim.y, part = blockIdx.y, lane = threadIdx.x & 31;
    const int j = blockIdx.z * (THREADS / 32) + (threadIdx.x >> 5);
    if (j >= (int)table[2 * (slot * parts + part)]) return;  // the whole warp
    const bf16 *row = a + ((size_t)(slot * parts + part) * max_rank + j) * width;
    float sums[GROUP];
    TM_UNROLL
    for (int i = 0; i < GROUP; i++) sums[i] = 0.0f;
    for (int k = 8 * lane; k < width; k += 256) {
        float w[8], v[8];
        load8(row + k, w);
        TM_UNROLL
        for (int i = 0; i < GROUP; i++) {
            if (i < (int)count) {
                load8(x + (size_t)tokens[first + i] * width + k, v);
                TM_UNROLL
                for (int e = 0; e < 8; e++) sums[i] += w[e] * v[e];
            }
        }
    }
    TM_UNROLL
    for (int i = 0; i < GROUP; i++) {
        if (i < (int)count) {
            const float sum = warp_sum(sums[i]);
            if (lane == 0) low[((size_t)(first + i) * parts + part) * max_rank + j] = sum;
        }
    }
}
KERNEL(lora_shrink_bf16);

extern "C" __global__ void __launch_bounds__(THREADS)
    lora_expand_bf16(bf16 *out, const float *low, const bf16 *b, const uint32_t *table, const uint32_t *parts,
                     const uint32_t *tokens, const uint32_t *groups, int out_width, int max_rank) {
    const uint32_t first = groups[3 * blockIdx.x], count = groups[3 * blockIdx.x + 1], slot = groups[3 * blockIdx.x + 2];
    const int num_parts = gridDim.y, part = blockIdx.y;
    const int n = blockIdx.z * THREADS + threadIdx.x;
    const int rank = table[2 * (slot * num_parts + part)], rows = parts[2 * part + 1];
    if (n >= rows || rank == 0) return;
    const size_t first_row = parts[2 * part];
    const bf16 *column = b + ((size_t)slot * out_width + first_row) * max_rank + n;
    const float scale = bits_to_f32(table[2 * (slot * num_parts + part) + 1]);
    const float *in = low + ((size_t)first * num_parts + part) * max_rank;
    const int stride = num_parts * max_rank;
    float sums[GROUP];
    TM_UNROLL
    for (int i = 0; i < GROUP; i++) sums[i] = 0.0f;
    for (int j = 0; j < rank; j++, column += rows, in++) {
        const float w = to_f32(*column);
        TM_UNROLL
        for (int i = 0; i < GROUP; i++)
            if (i < (int)count) sums[i] += w * in[i * stride];
    }
    TM_UNROLL
    for (int i = 0; i < GROUP; i++) {
        if (i < (int)count) {
            bf16 *to = out + (size_t)tokens[first + i] * out_width + first_row + n;
            *to = to_bf16(to_f32(*to) + scale * sums[i]);
        }
    }
}
KERNEL(lora_expand_bf16);

extern "C" __global__ void __launch_bounds__(THREADS)
    lora_restore_bf16(bf16 *out, const bf16 *from, const uint32_t *adapters, int width) {
    if (adapters[blockIdx.x]) return;
    for (int i = threadIdx.x; i < width; i += THREADS)
        out[(size_t)blockIdx.x * width + i] = from[(size_t)blockIdx.x * width + i];
}
KERNEL(lora_restore_bf16);
