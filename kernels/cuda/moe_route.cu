// Routing of a mixture of experts: softmax over the experts' logits, then the k largest.
//
//   p = softmax(logits[t, :]);  ids[t, :] = the experts of the k largest logits, largest first, the lowest id first among equals
//   weights[t, j] = p[ids[t, j]], or with `renormalize` p[ids[t, j]] / sum_j p[ids[t, j]]
//
// logits [T, E] f32; ids [T, k] u32; weights [T, k] f32; E at most 256, k at most min(E, 32). A NaN is below every number, so that the
// ids are k different experts whatever the logits hold.
// Grid (ceil(T / 4)), block 128: one warp per token. The order of the sums depends on E and k alone.
#include "primitives.cuh"

using namespace tidemill;

static constexpr uint32_t FULL = 0xffffffffu, TOKENS = 4, PER_LANE = 8;
static constexpr uint32_t TAKEN = 0, NOT_A_NUMBER = 1;

// Orders like the number; above TAKEN, and NaN below all others.
TM_DEVICE uint32_t sort_key(float x) {
    const uint32_t bits = f32_to_bits(x + 0.0f);   // -0 becomes 0
    if (x != x) return NOT_A_NUMBER;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

extern "C" __global__ void __launch_bounds__(32 * TOKENS)
    moe_route_f32(uint32_t *ids, float *weights, const float *logits, uint32_t tokens, uint32_t experts, uint32_t k, uint32_t renormalize) {
    const uint32_t lane = threadIdx.x & 31, token = blockIdx.x * TOKENS + (threadIdx.x >> 5);
    if (token >= tokens) return;
    const float *row = logits + (size_t)token * experts;
    // Lane l holds experts l, l + 32, ...
    float p[PER_LANE];
    uint32_t key[PER_LANE];
    float largest = -infinity();
    TM_UNROLL
    for (uint32_t i = 0; i < PER_LANE; i++) {
        const uint32_t expert = lane + 32 * i;
        p[i] = expert < experts ? row[expert] : -infinity();
        key[i] = expert < experts ? sort_key(p[i]) : TAKEN;
        largest = fmaxf(largest, p[i]);
    }
    largest = warp_max(largest);
    float sum = 0.0f;
    TM_UNROLL
    for (uint32_t i = 0; i < PER_LANE; i++) {
        p[i] = lane + 32 * i < experts ? __expf(p[i] - largest) : 0.0f;
        sum += p[i];
    }
    sum = warp_sum(sum);

    uint32_t my_id = 0;
    float my_p = 0.0f, taken = 0.0f;
    for (uint32_t j = 0; j < k; j++) {
        uint32_t best = TAKEN, expert = FULL;
        float best_p = 0.0f;
        TM_UNROLL
        for (uint32_t i = 0; i < PER_LANE; i++)
            if (key[i] > best) {
                best = key[i];
                best_p = p[i];
                expert = lane + 32 * i;
            }
        const uint32_t top = __reduce_max_sync(FULL, best);
        expert = __reduce_min_sync(FULL, best == top ? expert : FULL);
        const float top_p = __shfl_sync(FULL, best_p, (int)(expert & 31));
        taken += top_p;
        TM_UNROLL
        for (uint32_t i = 0; i < PER_LANE; i++)
            if (lane + 32 * i == expert) key[i] = TAKEN;
        if (lane == j) {
            my_id = expert;
            my_p = top_p;
        }
    }
    if (lane < k) {
        ids[(size_t)token * k + lane] = my_id;
        weights[(size_t)token * k + lane] = my_p / (renormalize ? taken : sum);
    }
}
KERNEL(moe_route_f32);
