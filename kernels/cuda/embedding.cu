// Token embedding, optionally scaled (Gemma multiplies by sqrt(H)).
//
//   out[t, h] = table[id(t), h] * scale      rounded to bf16; scale 1 copies the bits
//
// id(t) is token_ids[t], or feedback[token_ids[t] & 0x7fffffff] when its top bit is set: a token that the previous step sampled for
// that row of logits, and that the host has not seen yet.
//
// out [T, H], table [V, H] bf16, 16-byte aligned; token_ids [T], feedback u32 (may be null when no id has its top bit set).
// H a multiple of 8; every id is below V. Grid (T), block 256.
//
// embedding_add_bf16:  out[t, h] += table[rows[t] + first, h], in f32, rounded once: learned positions and segments.
#include "primitives.cuh"

using namespace tidemill;

static constexpr int THREADS = 256;
static constexpr uint32_t FEEDBACK = 0x80000000u;

extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_bf16(bf16 *out, const bf16 *table, const uint32_t *token_ids, const uint32_t *feedback, int width, float scale) {
    uint32_t id = token_ids[blockIdx.x];
    if (id & FEEDBACK) id = feedback[id & ~FEEDBACK];
    const bf16x8 *in = (const bf16x8 *)(table + (size_t)id * width);
    bf16x8 *to = (bf16x8 *)(out + (size_t)blockIdx.x * width);
    for (int i = threadIdx.x; i < width / 8; i += THREADS) {
        bf16x8 v = in[i];
        if (scale != 1.0f) {
            float x[8];
            unpack(v, x);
            TM_UNROLL
            for (int j = 0; j < 8; j++) x[j] *= scale;
            v = pack(x);
        }
        to[i] = v;
    }
}
KERNEL(embedding_bf16);

extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_add_bf16(bf16 *out, const bf16 *table, const uint32_t *rows, uint32_t first, int width) {
    const bf16x8 *in = (const bf16x8 *)(table + ((size_t)rows[blockIdx.x] + first) * width);
    bf16x8 *to = (bf16x8 *)(out + (size_t)blockIdx.x * width);
    for (int i = threadIdx.x; i < width / 8; i += THREADS) {
        float v[8], x[8];
        unpack(to[i], v);
        unpack(in[i], x);
        TM_UNROLL
        for (int j = 0; j < 8; j++) v[j] += x[j];
        to[i] = pack(v);
    }
}
KERNEL(embedding_add_bf16);
