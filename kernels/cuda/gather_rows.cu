// Rows of a matrix in a given order: the hidden states whose logits are wanted.
//
//   out[r, :] = x[logits_indices[r], :]; zeros where the index is 0xffffffff, a row that only fills up a captured graph
//
// x [T, H], out [R, H] bf16, 16-byte aligned; logits_indices [R] u32. H a multiple of 8. Grid (R), block 256.
#include "primitives.cuh"

using namespace tidemill;

static constexpr int THREADS = 256;
static constexpr uint32_t PADDING = 0xffffffffu;

extern "C" __global__ void __launch_bounds__(THREADS)
    gather_rows_bf16(bf16 *out, const bf16 *x, const uint32_t *logits_indices, int width) {
    const uint32_t index = logits_indices[blockIdx.x];
    bf16x8 *to = (bf16x8 *)(out + (size_t)blockIdx.x * width);
    const bf16x8 *from = (const bf16x8 *)(x + (size_t)(index == PADDING ? 0u : index) * width);
    const bf16x8 zero = {{0u, 0u, 0u, 0u}};
    for (int i = threadIdx.x; i < width / 8; i += THREADS) to[i] = index == PADDING ? zero : from[i];
}
KERNEL(gather_rows_bf16);
