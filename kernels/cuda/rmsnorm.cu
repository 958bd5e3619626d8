// Root-mean-square norm over the last axis (Zhang and Sennrich 2019, eq. 4), optionally after adding to the residual stream.
//
//   residual[r, h] += x[r, h]                                (only when residual is given; rounded to bf16)
//   out[r, h] = v[r, h] / sqrt(mean_h(v[r, :]^2) + eps) * weight[h]   where v is the residual if given, else x
//
// out, x, residual [rows, H] bf16, 16-byte aligned; weight [H] f32; H a multiple of 8. out may be x.
// Grid (rows), block 256. The order of the sum depends on H alone.
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

extern "C" __global__ void __launch_bounds__(THREADS)
    rmsnorm_bf16(bf16 *out, const bf16 *x, bf16 *residual, const float *weight, int width, float eps) {
    SHARED(float, partial, [THREADS / 32]);
    const size_t row = (size_t)blockIdx.x * width;
    const bf16x8 *in = (const bf16x8 *)(x + row);
    bf16x8 *stream = residual ? (bf16x8 *)(residual + row) : nullptr;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width / 8; i += THREADS) {
        float v[8];
        unpack(in[i], v);
        if (stream) {
            float r[8];
            unpack(stream[i], r);
            for (int j = 0; j < 8; j++) v[j] += r[j];
            const bf16x8 rounded = pack(v);
            stream[i] = rounded;
            unpack(rounded, v);
        }
        for (int j = 0; j < 8; j++) sum += v[j] * v[j];
    }
    const float scale = rsqrtf(block_sum(sum, partial) / (float)width + eps);
    const bf16x8 *again = stream ? stream : in;
    for (int i = threadIdx.x; i < width / 8; i += THREADS) {
        float v[8], w[8];
        unpack(again[i], v);
        load8(weight + 8 * i, w);
        TM_UNROLL
        for (int j = 0; j < 8; j++) v[j] = v[j] * scale * w[j];
        ((bf16x8 *)(out + row))[i] = pack(v);
    }
}
KERNEL(rmsnorm_bf16);
