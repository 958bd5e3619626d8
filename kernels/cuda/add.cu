// Sums in place.
//
//   add_bf16:        out[i] += x[i]
//   add_gated_bf16:  out[r, h] += x[r, h] / (1 + e^-gate[r])
//
// out, x bf16, 16-byte aligned; gate [rows] f32; elements and H multiples of 8. Computed in f32, rounded once. Block 256, eight elements
// to a thread; grid (ceil(elements / 2048)), or (rows, ceil(H / 2048)).
#include "primitives.cuh"

using namespace tidemill;

static constexpr int THREADS = 256;

TM_DEVICE void add_scaled(bf16x8 *to, const bf16x8 *from, float scale) {
    float v[8], x[8];
    unpack(*to, v);
    unpack(*from, x);
    TM_UNROLL
    for (int j = 0; j < 8; j++) v[j] = __fmaf_rn(x[j], scale, v[j]);
    *to = pack(v);
}

extern "C" __global__ void __launch_bounds__(THREADS) add_bf16(bf16 *out, const bf16 *x, uint64_t elems) {
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < elems / 8) add_scaled((bf16x8 *)out + i, (const bf16x8 *)x + i, 1.0f);
}
KERNEL(add_bf16);

extern "C" __global__ void __launch_bounds__(THREADS) add_gated_bf16(bf16 *out, const bf16 *x, const float *gate, int width) {
    const int i = blockIdx.y * THREADS + threadIdx.x;
    if (i >= width / 8) return;
    const size_t at = (size_t)blockIdx.x * (width / 8) + i;
    add_scaled((bf16x8 *)out + at, (const bf16x8 *)x + at, 1.0f / (1.0f + __expf(-gate[blockIdx.x])));
}
KERNEL(add_gated_bf16);
