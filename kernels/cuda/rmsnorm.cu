// Root-mean-square norm over rows or parts of rows (Zhang and Sennrich 2019, eq. 4).
//
//   y = v / sqrt(mean(v^2) + eps) * weight[g * width ..],   v = part g of row r: x[r * stride + offset + g * width ..][.. width]
//   out at the same place becomes y; with `add`, y is added to it
//
// out, x bf16, 16-byte aligned, may be the same; weight [groups * width] f32; width, stride and offset multiples of 8. Whole rows are one group
// of width = stride. Grid (rows * groups), block 256. The order of the sum depends on the width alone.
#include "primitives.cuh"

using namespace tidemill;

static constexpr int THREADS = 256;

// Sum over the block in a fixed order, in every thread. `partial` is free for reuse after the next barrier.
TM_DEVICE float block_sum(float v, float (&partial)[THREADS / 32]) {
    v = warp_sum(v);
    if ((threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = v;
    __syncthreads();
    float total = 0.0f;
    TM_UNROLL
    for (int i = 0; i < THREADS / 32; i++) total += partial[i];
    return total;
}

extern "C" __global__ void __launch_bounds__(THREADS) rmsnorm_bf16(bf16 *out, const bf16 *x, const float *weight, int groups, int width,
                                                                   int stride, int offset, int add, float eps) {
    SHARED(float, partial, [THREADS / 32]);
    const int group = (int)blockIdx.x % groups;
    const size_t at = (size_t)(blockIdx.x / groups) * stride + offset + group * width;
    const bf16x8 *in = (const bf16x8 *)(x + at);
    bf16x8 *to = (bf16x8 *)(out + at);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width / 8; i += THREADS) {
        float v[8];
        unpack(in[i], v);
        for (int j = 0; j < 8; j++) sum += v[j] * v[j];
    }
    const float scale = rsqrtf(block_sum(sum, partial) / (float)width + eps);
    for (int i = threadIdx.x; i < width / 8; i += THREADS) {
        float v[8], w[8], old[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        unpack(in[i], v);
        load8(weight + group * width + 8 * i, w);
        if (add) unpack(to[i], old);
        TM_UNROLL
        for (int j = 0; j < 8; j++) v[j] = add ? __fmaf_rn(v[j] * scale, w[j], old[j]) : v[j] * scale * w[j];
        to[i] = pack(v);
    }
}
KERNEL(rmsnorm_bf16);
