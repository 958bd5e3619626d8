// What stands between latent attention's projections and its attention: the rotary position embedding (Su et al. 2021, eq. 34) and the
// write to the cache.
//
//   q_rope[t, q, :] and latent[t, L:]: rotated in place;   latent[t, :] to slot slot_mapping[t] of the cache
//
// q_rope [T, Q * R], latent [T, L + R] bf16, 16-byte aligned; table [positions, R] f32: R/2 cosines, then R/2 sines; positions,
// slot_mapping [T] u32; L and R multiples of 8. Pairs are (i, i + R/2), or (2i, 2i + 1) if `interleaved`. kv: one layer of the cache,
// bf16 [slots, L + R]. A token with slot 0xffffffff is padding: neither it nor the cache is touched.
// Grid (T, ceil((Q + 1) R / 1024)), block 128: four pairs to a thread.
#include "primitives.cuh"

using namespace tidemill;

// The same struct as in ops/latent_kv_write.rs.
struct LatentKvWriteArgs {
    bf16 *q_rope;
    bf16 *latent;
    bf16 *kv;
    const float *table;
    const uint32_t *positions;
    const uint32_t *slot_mapping;
    int num_heads;
    int latent_dim;
    int rope_dim;
    int interleaved;
};

static constexpr int THREADS = 128, PAIRS = 4 * THREADS;
static constexpr uint32_t NO_SLOT = 0xffffffffu;

extern "C" __global__ void __launch_bounds__(THREADS) latent_kv_write(const LatentKvWriteArgs a) {
    const size_t token = blockIdx.x;
    const uint32_t slot = a.slot_mapping[token];
    if (slot == NO_SLOT) return;
    const int half = a.rope_dim / 2, width = a.latent_dim + a.rope_dim;
    bf16 *latent = a.latent + token * width, *cached = a.kv + (size_t)slot * width;
    if (blockIdx.y == 0)
        for (int i = threadIdx.x; i < a.latent_dim / 8; i += THREADS) ((bf16x8 *)cached)[i] = ((const bf16x8 *)latent)[i];

    const float *cosines = a.table + (size_t)a.positions[token] * a.rope_dim, *sines = cosines + half;
    const int end = min((a.num_heads + 1) * half, (int)(blockIdx.y + 1) * PAIRS);
    for (int pair = (int)blockIdx.y * PAIRS + (int)threadIdx.x; pair < end; pair += THREADS) {
        const int head = pair / half, i = pair % half;
        const bool is_key = head == a.num_heads;
        bf16 *x = is_key ? latent + a.latent_dim : a.q_rope + (token * a.num_heads + head) * a.rope_dim;
        const int first = a.interleaved ? 2 * i : i, second = a.interleaved ? 2 * i + 1 : i + half;
        const float u = to_f32(x[first]), v = to_f32(x[second]), c = cosines[i], s = sines[i];
        x[first] = to_bf16(fmaf(u, c, -(v * s)));
        x[second] = to_bf16(fmaf(v, c, u * s));
        if (is_key) {
            cached[a.latent_dim + first] = x[first];
            cached[a.latent_dim + second] = x[second];
        }
    }
}
KERNEL(latent_kv_write);
