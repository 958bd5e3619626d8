// Layer norm over rows or parts of rows (Ba, Kiros and Hinton 2016, eq. 4).
//
//   y = (v - mean) / sqrt(variance + eps) * weight[g * width ..] + bias[g * width ..],   v = part g of row r:
//                                                                              x[r * stride + offset + g * width ..][.. width]
//   out at the same place becomes y; with `add`, y is added to it
//
// Mean and variance are those of the part (variance divides by its width), in two passes: the variance of a row far from zero keeps its
// digits. out, x bf16, 16-byte aligned, may be the same; weight, bias [groups * width] f32, bias may be null; width, stride and offset
// multiples of 8. Whole rows are one group of width = stride. Grid (rows * groups), block 256. The order of the sums depends on the width alone.
#include "primitives.cuh"

using namespace tidemill;

static constexpr int THREADS = 256;
static constexpr int WARPS = THREADS / 32;

// Sum over the block in a fixed order, in every thread. `partial` must not be in use by an earlier sum.
TM_DEVICE float block_sum(float v, float (&partial)[WARPS]) {
    v = warp_sum(v);
    if ((threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = v;
    __syncthreads();
    float total = 0.0f;
    TM_UNROLL
    for (int i = 0; i < WARPS; i++) total += partial[i];
    return total;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    layernorm_bf16(bf16 *out, const bf16 *x, const float *weight, const float *bias, int groups, int width, int stride, int offset, int add,
                   float eps) {
    SHARED(float, sums, [WARPS]);
    SHARED(float, squares, [WARPS]);
    const int group = (int)blockIdx.x % groups;
    const size_t at = (size_t)(blockIdx.x / groups) * stride + offset + group * width;
    const bf16x8 *in = (const bf16x8 *)(x + at);
    bf16x8 *to = (bf16x8 *)(out + at);
    float v[8];
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width / 8; i += THREADS) {
        unpack(in[i], v);
        TM_UNROLL
        for (int j = 0; j < 8; j++) sum += v[j];
    }
    const float mean = block_sum(sum, sums) / (float)width;
    float square = 0.0f;
    for (int i = threadIdx.x; i < width / 8; i += THREADS) {
        unpack(in[i], v);
        TM_UNROLL
        for (int j = 0; j < 8; j++) square += (v[j] - mean) * (v[j] - mean);
    }
    const float scale = rsqrtf(block_sum(square, squares) / (float)width + eps);
    for (int i = threadIdx.x; i < width / 8; i += THREADS) {
        float w[8], b[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        unpack(in[i], v);
        load8(weight + group * width + 8 * i, w);
        if (bias) load8(bias + group * width + 8 * i, b);
        TM_UNROLL
        for (int j = 0; j < 8; j++) v[j] = (v[j] - mean) * scale * w[j] + b[j];
        if (add) {
            float old[8];
            unpack(to[i], old);
            TM_UNROLL
            for (int j = 0; j < 8; j++) v[j] += old[j];
        }
        to[i] = pack(v);
    }
}
KERNEL(layernorm_bf16);
