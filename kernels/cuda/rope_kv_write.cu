// What stands between the projection of queries, keys and values and attention, for all heads in one launch:
//
//   q, k of qkv: RMS norm over the head (optional, its own weights for q and k; Qwen3), then rotary position embedding (Su et al. 2021,
//                eq. 34) of the first R elements, in place; R = 0 rotates nothing
//   k, v of qkv: to slot slot_mapping[t] of the cache; v is copied
//
// qkv [T, (Q + 2K) * D] bf16, 16-byte aligned; q_weight, k_weight [D] f32, both or neither; table [positions, R] f32: R/2 cosines, then
// R/2 sines; positions, slot_mapping [T] u32; D a multiple of 8 up to 256, R even. Pairs are (i, i + R/2), or (2i, 2i + 1) if
// `interleaved`. kv: one layer of the cache, [blocks, 2, K, block_size, D], keys first; block_size = 1 << block_shift.
// Values are rounded to bf16 once, at the end; and, where the cache is in F8E4M3 (`kv_f8`), from bf16 to that, what is too large to 448. A token with slot 0xffffffff is padding: neither it nor the cache is touched.
//
// Grid (T, ceil((Q + 2K) / (128 / LANES))), block 128: each head has a team of LANES lanes, D / 8 rounded up to a power of two, eight
// elements to a lane. The order of the norm's sum depends on D alone.
#include "primitives.cuh"

using namespace tidemill;

// Everything but qkv and kv is read only. The same struct as in ops/rope_kv_write.rs.
struct RopeKvWriteArgs {
    bf16 *qkv;
    void *kv;
    const float *q_weight;
    const float *k_weight;
    const float *table;
    const uint32_t *positions;
    const uint32_t *slot_mapping;
    int num_heads;
    int num_kv_heads;
    int head_dim;
    int rotary_dim;
    int block_shift;
    int interleaved;
    float eps;
    int kv_f8;
};

namespace {

constexpr int BLOCK_THREADS = 128;
constexpr uint32_t NO_SLOT = 0xffffffffu;

// Sum over the team of LANES lanes, in each of them.
template <int LANES>
TM_DEVICE float team_sum(float v) {
    TM_UNROLL
    for (int offset = LANES / 2; offset; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

// Rotates the head of a team, in shared memory: a lane takes every LANES-th pair.
template <int LANES>
TM_DEVICE void rotate(float *head, const RopeKvWriteArgs &a, uint32_t position, int lane) {
    const int half = a.rotary_dim / 2;
    const float *cosines = a.table + (size_t)position * a.rotary_dim, *sines = cosines + half;
    for (int i = lane; i < half; i += LANES) {
        const int first = a.interleaved ? 2 * i : i, second = a.interleaved ? 2 * i + 1 : i + half;
        const float x = head[first], y = head[second], c = cosines[i], s = sines[i];
        head[first] = fmaf(x, c, -(y * s));
        head[second] = fmaf(y, c, x * s);
    }
}

template <int LANES>
TM_DEVICE void rope_kv_write(const RopeKvWriteArgs &a) {
    constexpr int TEAMS = BLOCK_THREADS / LANES;
    SHARED(float, heads, [TEAMS][LANES * 8]);
    const int lane = (int)threadIdx.x % LANES, team = (int)threadIdx.x / LANES;
    const uint32_t token = blockIdx.x, slot = a.slot_mapping[token];
    const int num = a.num_heads + 2 * a.num_kv_heads, head = (int)blockIdx.y * TEAMS + team;
    if (slot == NO_SLOT) return;
    // Whole warps go through the collectives; lanes past D, and teams past the last head, hold nothing.
    const bool active = head < num && 8 * lane < a.head_dim;
    const bool is_cached = head >= a.num_heads, is_value = head >= a.num_heads + a.num_kv_heads;
    bf16x8 *place = (bf16x8 *)(a.qkv + ((size_t)token * num + head) * a.head_dim) + lane;
    bf16x8 raw = {};
    if (active) raw = *place;

    const float *weight = is_cached ? a.k_weight : a.q_weight;
    if ((weight || a.rotary_dim) && (int)blockIdx.y * TEAMS < a.num_heads + a.num_kv_heads) {
        float v[8];
        unpack(raw, v);
        if (weight) {
            float sum = 0.0f;
            TM_UNROLL
            for (int i = 0; i < 8; i++) sum = fmaf(v[i], v[i], sum);
            const float scale = rsqrtf(team_sum<LANES>(sum) / (float)a.head_dim + a.eps);
            TM_UNROLL
            for (int i = 0; i < 8; i++) v[i] = active ? v[i] * scale * weight[8 * lane + i] : 0.0f;
        }
        if (a.rotary_dim) {
            float4 *mine = (float4 *)heads[team] + 2 * lane;
            mine[0] = make_float4(v[0], v[1], v[2], v[3]);
            mine[1] = make_float4(v[4], v[5], v[6], v[7]);
            __syncwarp();
            if (!is_value) rotate<LANES>(heads[team], a, a.positions[token], lane);
            __syncwarp();
            const float4 low = mine[0], high = mine[1];
            v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
            v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
        }
        if (active && !is_value) *place = raw = pack(v);
    }
    if (!active || !is_cached) return;
    const int kv_head = head - a.num_heads - (is_value ? a.num_kv_heads : 0);
    const size_t row = ((size_t)(slot >> a.block_shift) * 2 + is_value) * a.num_kv_heads + kv_head;
    const size_t at = ((row << a.block_shift) + (slot & ((1u << a.block_shift) - 1))) * (a.head_dim / 8) + lane;
    if (!a.kv_f8) {
        ((bf16x8 *)a.kv)[at] = raw;
        return;
    }
    float v[8];
    unpack(raw, v);
    ((uint2 *)a.kv)[at] = pack_f8(v);
}

}  // namespace

#define ROPE_KV_WRITE(LANES)                                                                                        \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS) rope_kv_write_##LANES(const RopeKvWriteArgs args) { \
        rope_kv_write<LANES>(args);                                                                                 \
    }                                                                                                               \
    KERNEL(rope_kv_write_##LANES);

ROPE_KV_WRITE(8)
ROPE_KV_WRITE(16)
ROPE_KV_WRITE(32)
