// Adds up what the experts made of each token.
//
//   out[t, h] += sum_j weights[t, j] * rows[t * k + j, h]      j in order, from 0, each step one fused multiply-add
//
// out [T, H] bf16, rounded once; rows [T * k, H] bf16; weights [T, k] f32; 16-byte aligned; H a multiple of 8.
// Grid (T, ceil(H / 2048)), block 256.
#include "primitives.cuh"

using namespace tidemill;

static constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    moe_combine_bf16(bf16 *out, const bf16 *rows, const float *weights, int k, int width) {
    const int h = 8 * (blockIdx.y * THREADS + threadIdx.x);
    if (h >= width) return;
    const size_t token = blockIdx.x;
    float sum[8] = {};
    for (int j = 0; j < k; j++) {
        float v[8];
        load8(rows + (token * k + j) * width + h, v);
        const float weight = weights[token * k + j];
        TM_UNROLL
        for (int i = 0; i < 8; i++) sum[i] = __fmaf_rn(weight, v[i], sum[i]);
    }
    bf16x8 *to = (bf16x8 *)(out + token * width + h);
    float old[8];
    unpack(*to, old);
    TM_UNROLL
    for (int i = 0; i < 8; i++) sum[i] += old[i];
    *to = pack(sum);
}
KERNEL(moe_combine_bf16);
