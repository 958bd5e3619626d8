// Layer norm over the last axis (Ba, Kiros and Hinton 2016, eq. 4), optionally after adding to the residual stream.
//
//   residual[r, h] += x[r, h]                                (only when residual is given; rounded to bf16)
//   out[r, h] = (v[r, h] - mean) / sqrt(variance + eps) * weight[h] + bias[h]   where v is the residual if given, else x
//
// Mean and variance are those of the row (variance divides by H), in two passes: the variance of a row far from zero keeps its digits.
// out, x, residual [rows, H] bf16, 16-byte aligned; weight, bias [H] f32, bias may be null; H a multiple of 8. out may be x.
// Grid (rows), block 256. The order of the sums depends on H alone.
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

// Adds eight elements to the residual stream; `v` becomes what is stored.
TM_DEVICE void add_to_stream(float (&v)[8], bf16x8 *stream) {
    float r[8];
    unpack(*stream, r);
    TM_UNROLL
    for (int j = 0; j < 8; j++) v[j] += r[j];
    *stream = pack(v);
    unpack(*stream, v);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    layernorm_bf16(bf16 *out, const bf16 *x, bf16 *residual, const float *weight, const float *bias, int width, float eps) {
    SHARED(float, sums, [WARPS]);
    SHARED(float, squares, [WARPS]);
    const size_t row = (size_t)blockIdx.x * width;
    const bf16x8 *in = (const bf16x8 *)(x + row);
    bf16x8 *stream = residual ? (bf16x8 *)(residual + row) : nullptr;
    float v[8];
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width / 8; i += THREADS) {
        unpack(in[i], v);
        if (stream) add_to_stream(v, stream + i);
        TM_UNROLL
        for (int j = 0; j < 8; j++) sum += v[j];
    }
    const float mean = block_sum(sum, sums) / (float)width;
    const bf16x8 *again = stream ? stream : in;
    float square = 0.0f;
    for (int i = threadIdx.x; i < width / 8; i += THREADS) {
        unpack(again[i], v);
        TM_UNROLL
        for (int j = 0; j < 8; j++) square += (v[j] - mean) * (v[j] - mean);
    }
    const float scale = rsqrtf(block_sum(square, squares) / (float)width + eps);
    for (int i = threadIdx.x; i < width / 8; i += THREADS) {
        float w[8], b[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        unpack(again[i], v);
        load8(weight + 8 * i, w);
        if (bias) load8(bias + 8 * i, b);
        TM_UNROLL
        for (int j = 0; j < 8; j++) v[j] = (v[j] - mean) * scale * w[j] + b[j];
        ((bf16x8 *)(out + row))[i] = pack(v);
    }
}
KERNEL(layernorm_bf16);
