// Routing of a mixture of experts: scores of the experts' logits, then the k experts with the largest.
//
//   score = softmax(logits[t, :]), or with SIGMOID 1 / (1 + e^-logit);   choice = score + bias, if there is one
//   ids[t, :] = the experts of the k largest choices, largest first, the lowest id first among equals
//   weights[t, j] = score[ids[t, j]] * scale, with RENORMALIZE over sum_j score[ids[t, j]]
//
// With groups (DeepSeek-AI 2024, arXiv 2405.04434, section 2.2.2) only experts of the `top_groups` best of `groups` groups of neighbours are
// chosen. A group is as good as its best choice, or with TOP_TWO as the sum of its two best (arXiv 2412.19437, section 2.1.2).
//
// logits [T, E] f32; bias [E] f32 or null; ids [T, k] u32; weights [T, k] f32; E at most 512, k at most min(E, 32), groups at most 32 and a
// divisor of E, those that are chosen from hold k experts. A NaN is below every number, so that the ids are k different experts whatever
// the logits hold. Grid (ceil(T / 4)), block 128: one warp per token. The order of the sums depends on E and k alone.
#include "primitives.cuh"

using namespace tidemill;

static constexpr uint32_t FULL = 0xffffffffu, TOKENS = 4, PER_LANE = 16;
static constexpr uint32_t TAKEN = 0, NOT_A_NUMBER = 1;
// Bits of RouteArgs::flags.
static constexpr uint32_t SIGMOID = 1, RENORMALIZE = 2, TOP_TWO = 4;

// The same struct as in ops/moe/route.rs.
struct RouteArgs {
    uint32_t *ids;
    float *weights;
    const float *logits;
    const float *bias;
    uint32_t tokens;
    uint32_t experts;
    uint32_t k;
    uint32_t groups;       // 0: none
    uint32_t top_groups;
    uint32_t flags;
    float scale;
};

// Orders like the number; above TAKEN, and NaN below all others.
TM_DEVICE uint32_t sort_key(float x) {
    const uint32_t bits = f32_to_bits(x + 0.0f);   // -0 becomes 0
    if (x != x) return NOT_A_NUMBER;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
// The number of a key.
TM_DEVICE float key_value(uint32_t key) {
    if (key == NOT_A_NUMBER) return bits_to_f32(0x7fffffffu);
    return bits_to_f32(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// Lane l holds experts l, l + 32, ...
TM_DEVICE uint32_t lane_id() { return threadIdx.x & 31; }

// The greatest key of experts first.. but one, and the lowest of them that has it.
TM_DEVICE uint32_t best_in(const uint32_t (&key)[PER_LANE], uint32_t first, uint32_t size, uint32_t except, uint32_t &expert) {
    uint32_t best = TAKEN, at = FULL;
    TM_UNROLL
    for (uint32_t i = 0; i < PER_LANE; i++) {
        const uint32_t e = lane_id() + 32 * i;
        if (e - first < size && e != except && key[i] > best) {
            best = key[i];
            at = e;
        }
    }
    const uint32_t top = __reduce_max_sync(FULL, best);
    expert = __reduce_min_sync(FULL, best == top ? at : FULL);
    return top;
}

// Takes the experts of all but the best groups away.
TM_DEVICE void keep_best_groups(const RouteArgs &a, uint32_t (&key)[PER_LANE]) {
    const uint32_t size = a.experts / a.groups;
    uint32_t mine = TAKEN;   // of group l
    for (uint32_t group = 0; group < a.groups; group++) {
        uint32_t best, second;
        uint32_t value = best_in(key, group * size, size, FULL, best);
        if (a.flags & TOP_TWO) {
            const uint32_t next = best_in(key, group * size, size, best, second);
            value = sort_key(key_value(value) + key_value(next));
        }
        if (lane_id() == group) mine = value;
    }
    uint32_t kept = 0;
    for (uint32_t i = 0; i < a.top_groups; i++) {
        const uint32_t top = __reduce_max_sync(FULL, mine);
        const uint32_t group = __reduce_min_sync(FULL, mine == top ? lane_id() : FULL);
        kept |= 1u << group;
        if (lane_id() == group) mine = TAKEN;
    }
    TM_UNROLL
    for (uint32_t i = 0; i < PER_LANE; i++) {
        const uint32_t expert = lane_id() + 32 * i;
        if (expert < a.experts && !(kept >> expert / size & 1)) key[i] = TAKEN;
    }
}

extern "C" __global__ void __launch_bounds__(32 * TOKENS) moe_route_f32(const __grid_constant__ RouteArgs a) {
    const uint32_t lane = lane_id(), token = blockIdx.x * TOKENS + (threadIdx.x >> 5);
    if (token >= a.tokens) return;
    const float *row = a.logits + (size_t)token * a.experts;
    const bool sigmoid = a.flags & SIGMOID;
    // Without anything added to scores their logits order them, with fewer equals.
    const bool by_logit = !sigmoid && !a.bias && !(a.flags & TOP_TWO);
    float p[PER_LANE];
    uint32_t key[PER_LANE];
    float largest = -infinity();
    TM_UNROLL
    for (uint32_t i = 0; i < PER_LANE; i++) {
        const uint32_t expert = lane + 32 * i;
        p[i] = expert < a.experts ? row[expert] : -infinity();
        key[i] = expert < a.experts ? sort_key(p[i]) : TAKEN;
        largest = fmaxf(largest, p[i]);
    }
    float sum = 1.0f;
    if (sigmoid) {
        TM_UNROLL
        for (uint32_t i = 0; i < PER_LANE; i++) p[i] = 1.0f / (1.0f + __expf(-p[i]));
    } else {
        largest = warp_max(largest);
        sum = 0.0f;
        TM_UNROLL
        for (uint32_t i = 0; i < PER_LANE; i++) {
            p[i] = lane + 32 * i < a.experts ? __expf(p[i] - largest) : 0.0f;
            sum += p[i];
        }
        sum = warp_sum(sum);
    }
    if (!by_logit) {
        TM_UNROLL
        for (uint32_t i = 0; i < PER_LANE; i++) {
            const uint32_t expert = lane + 32 * i;
            if (expert < a.experts) key[i] = sort_key(p[i] / sum + (a.bias ? a.bias[expert] : 0.0f));
        }
    }
    if (a.groups) keep_best_groups(a, key);

    uint32_t my_id = 0;
    float my_p = 0.0f, taken = 0.0f;
    for (uint32_t j = 0; j < a.k; j++) {
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
    if (lane < a.k) {
        a.ids[(size_t)token * a.k + lane] = my_id;
        // Scores of 0 add up to no weight, and not to a NaN.
        a.weights[(size_t)token * a.k + lane] = my_p / (a.flags & RENORMALIZE ? taken + 1e-20f : sum) * a.scale;
    }
}
KERNEL(moe_route_f32);
