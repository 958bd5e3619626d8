// Activations of the feed-forward block, gated and plain.
//
//   gated:  out[r, i] = f(x[r, i]) * x[r, I + i]      x is gate_up [rows, 2 I]
//   plain:  out[r, i] = f(x[r, i])                    x [rows, I]; out may be x
//
// f is SiLU, x / (1 + e^-x) (Elfwing et al. 2018); GELU, x * Phi(x), or its tanh approximation (Hendrycks and Gimpel 2016, section 2);
// max(x, 0). swiglu_oai_mul_bf16, gated: (u + 1) * g / (1 + e^(-alpha g)) with g = min(gate, limit), u = up within -limit..limit.
// out [rows, I], x bf16, 16-byte aligned; I a multiple of 8. Computed in f32, rounded once.
// Grid (rows, ceil(I / 2048)), block 256.
#include "primitives.cuh"

using namespace tidemill;

static constexpr int THREADS = 256;

struct Silu {
    static TM_DEVICE float of(float x) { return x / (1.0f + __expf(-x)); }
};
struct Gelu {
    static TM_DEVICE float of(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }
};
struct GeluTanh {
    static TM_DEVICE float of(float x) { return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x))); }
};
struct Relu {
    // NaN stays.
    static TM_DEVICE float of(float x) { return x < 0.0f ? 0.0f : x; }
};

template <class F, bool GATED>
TM_DEVICE void activate(bf16 *out, const bf16 *x, int width) {
    const int i = blockIdx.y * THREADS + threadIdx.x;
    if (i >= width / 8) return;
    const size_t row = (size_t)blockIdx.x * width;
    const bf16x8 *in = (const bf16x8 *)(x + (GATED ? 2 * row : row));
    float v[8];
    unpack(in[i], v);
    TM_UNROLL
    for (int j = 0; j < 8; j++) v[j] = F::of(v[j]);
    if (GATED) {
        float up[8];
        unpack(in[width / 8 + i], up);
        TM_UNROLL
        for (int j = 0; j < 8; j++) v[j] *= up[j];
    }
    ((bf16x8 *)(out + row))[i] = pack(v);
}

#define ACTIVATION(NAME, F, GATED)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(bf16 *out, const bf16 *x, int width) {         \
        activate<F, GATED>(out, x, width);                                                                    \
    }                                                                                                         \
    KERNEL(NAME)
ACTIVATION(silu_mul_bf16, Silu, true);
ACTIVATION(gelu_mul_bf16, Gelu, true);
ACTIVATION(gelu_tanh_mul_bf16, GeluTanh, true);
ACTIVATION(relu_mul_bf16, Relu, true);
ACTIVATION(silu_bf16, Silu, false);
ACTIVATION(gelu_bf16, Gelu, false);
ACTIVATION(gelu_tanh_bf16, GeluTanh, false);
ACTIVATION(relu_bf16, Relu, false);

extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_oai_mul_bf16(bf16 *out, const bf16 *x, int width, float alpha, float limit) {
    const int i = blockIdx.y * THREADS + threadIdx.x;
    if (i >= width / 8) return;
    const size_t row = (size_t)blockIdx.x * width;
    const bf16x8 *in = (const bf16x8 *)(x + 2 * row);
    float v[8], up[8];
    unpack(in[i], v);
    unpack(in[width / 8 + i], up);
    TM_UNROLL
    for (int j = 0; j < 8; j++) {
        const float g = v[j] > limit ? limit : v[j], u = up[j] > limit ? limit : up[j] < -limit ? -limit : up[j];
        v[j] = (u + 1.0f) * (g / (1.0f + __expf(-alpha * g)));
    }
    ((bf16x8 *)(out + row))[i] = pack(v);
}
KERNEL(swiglu_oai_mul_bf16);
