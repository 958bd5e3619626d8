// The draw of the sampler: Gumbel-max (Gumbel 1954; Maddison et al. 2014) with Philox noise; see src/sampling.rs for the definition.
#pragma once
#include "sampling.cuh"

namespace tidemill {

// The upper 24 bits of the first word of Philox4x32-10 (Salmon et al. 2011) with the seed as key and (token, position, 0, 0) as counter.
TM_DEVICE uint32_t noise_bits(const Task &task, uint32_t token) {
    uint32_t c[4] = {token, task.position, 0, 0};
    uint32_t k0 = task.seed[0], k1 = task.seed[1];
    TM_UNROLL
    for (int round = 0; round < 10; round++) {
        const u64 a = (u64)c[0] * 0xD2511F53u, b = (u64)c[2] * 0xCD9E8D57u;
        const uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k0, (uint32_t)b, (uint32_t)(a >> 32) ^ c[3] ^ k1, (uint32_t)a};
        TM_UNROLL
        for (int i = 0; i < 4; i++) c[i] = next[i];
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c[0] >> 8;
}

TM_DEVICE Pick no_pick() {
    Pick pick;
    pick.score = -(double)infinity();
    pick.token = 0xffffffffu;
    pick.infinite = 0;
    return pick;
}
TM_DEVICE bool beats(const Pick &a, const Pick &b) {
    if (a.infinite != b.infinite) return a.infinite > b.infinite;
    if (a.score != b.score) return a.score > b.score;
    return a.token < b.token;
}

// The largest logit of a row and its noise are together at least this, in nats from that logit.
static constexpr float LEAST_SUM = -2.86f;

// The best of the tokens offered to one thread.
//
// Noise lies between -2.86 and 17.33 and costs an integer hash and two logarithms in f64, and almost no token can win. `pivot` is a
// lower bound, in units of logits, of what the row's best sum will be. A token that stays below it with the largest noise is
// dropped for three instructions. As -ln u >= 1 - u, one with noise of u loses if 1 - u > e^(logit - pivot): that costs the hash and
// an exponential. The rest, a few per warp, are computed in f64 as the CPU does (`take`). What is dropped cannot win, so the result
// does not depend on the pivot. Comparisons are written so that a NaN (of infinities) keeps the token.
struct Drawer {
    float temperature, inverse, pivot, slack;
    Pick best;

    TM_DEVICE void start(float t) {
        temperature = t;
        inverse = 1.0f / t;
        best = no_pick();
        raise(-infinity());
    }
    // The row holds a sum that is at least `bound`.
    TM_DEVICE void raise(float bound) {
        pivot = bound;
        // Room for the roundings of the bound and of the comparison.
        slack = fabsf(bound) == infinity() ? 1e-3f : 1e-3f + 1e-6f * fabsf(bound) * inverse;
    }
    // A bound from this thread's best and from the largest logit that it has met.
    TM_DEVICE float bound(float largest) const {
        const float met = largest + LEAST_SUM * temperature;
        return best.infinite ? infinity() : fmaxf(met, (float)(best.score * (double)temperature));
    }
    // Whether a token may be the row's best: false for almost all.
    TM_DEVICE bool may_win(float x, uint32_t token, const Task &task) const {
        const float below = (x - pivot) * inverse;
        if (below + slack < -17.34f || !(x > -infinity())) return false;
        const float rest = (float)((1u << 24) - noise_bits(task, token)) - 0.5f;
        return !(rest > 16777216.0f * __expf(below + slack));
    }
    TM_DEVICE void take(float x, uint32_t token, const Task &task) {
        Pick pick;
        pick.infinite = x == infinity();
        const double u = ((double)noise_bits(task, token) + 0.5) * (1.0 / 16777216.0);
        pick.score = (pick.infinite ? 0.0 : (double)x / (double)temperature) - log(-log(u));
        pick.token = token;
        if (!beats(pick, best)) return;
        best = pick;
        const float sum = pick.infinite ? infinity() : (float)(pick.score * (double)temperature);
        if (sum > pivot) raise(sum);
    }
};

TM_DEVICE Pick warp_best(Pick pick) {
    TM_UNROLL
    for (int offset = 16; offset; offset >>= 1) {
        Pick other;
        other.score = __shfl_xor_sync(0xffffffffu, pick.score, offset);
        other.token = __shfl_xor_sync(0xffffffffu, pick.token, offset);
        other.infinite = __shfl_xor_sync(0xffffffffu, pick.infinite, offset);
        if (beats(other, pick)) pick = other;
    }
    return pick;
}

// The best of the block, in every thread. `partial` is in use until the next barrier.
TM_DEVICE Pick block_best(Pick pick, Pick (&partial)[WARPS]) {
    pick = warp_best(pick);
    if ((threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = pick;
    __syncthreads();
    TM_UNROLL
    for (int i = 0; i < WARPS; i++) {
        if (beats(partial[i], pick)) pick = partial[i];
    }
    return pick;
}

}  // namespace tidemill
