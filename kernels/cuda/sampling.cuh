// What the sampler's kernels (sampling.cu, logprobs.cu) share: the step's encoded tasks, the state of a row between kernels, and the
// order of tokens. See sampling.cu for the whole.
//
// Everything that is added up over a row is an integer: counts, and probabilities in units of 2^-44. Sums of integers do not depend
// on their order, so a row gives the same bits however many blocks share it.
#pragma once
#include "primitives.cuh"

namespace tidemill {

typedef unsigned long long u64;

static constexpr int THREADS = 256;
static constexpr int WARPS = THREADS / 32;
// Groups of four logits that a thread has in flight; what a warp and the block read in a turn.
static constexpr int UNROLL = 4;
static constexpr int SEGMENT = 32 * UNROLL;
static constexpr int TURN = WARPS * SEGMENT;
// Histograms over the distance to the largest logit: this many bins of 1/64 nat. What lies further down has a probability below
// 2^-46, which is 0 in the units used here.
static constexpr int BINS = 2048;
static constexpr float BINS_PER_NAT = 64.0f;
static constexpr float DEPTH = BINS / BINS_PER_NAT;
// Tokens that a row's list holds. Rows with more candidates are searched where they lie.
static constexpr uint32_t LIST = 2048;
static constexpr int MAX_CHUNKS = 64;
static constexpr int RESULT_WORDS = 48;
static constexpr int MAX_TOP = 20;

static constexpr uint32_t ACTIVE = 1, SCORE = 2, GREEDY = 4, FILTERED = 8, EDITED = 16, MASKED = 32, LOGPROBS = 64;

// A row's task: 20 words at the head of the block, written by `encode` in src/cuda/ops/sampling/encode.rs.
struct Task {
    uint32_t flags;
    uint32_t token;  // the token to score
    uint32_t top;    // number of largest log-probabilities, at most MAX_TOP
    float temperature;
    uint32_t top_k;  // 0: off
    float top_p;
    float min_p;
    uint32_t seed[2];  // low half first
    uint32_t position;
    float repetition, presence, frequency;
    uint32_t lists;  // word of the block where (token, bias), (token, count), token begin, one list after the other
    uint32_t num_biases, num_counts, num_forbidden;
    uint32_t mask;   // word of the block where the bits of allowed tokens begin, lowest first
    uint32_t saved;  // where in `saved` the row keeps the raw logits of its list entries
    uint32_t unused;
};

// A row between the kernels of a step; cleared by `sample_prepare`.
struct RowState {
    u64 best;           // largest entry after edits and mask
    u64 total;          // probability of all tokens after temperature (filtered rows)
    u64 ahead_mass;     // probability of the tokens ahead of the list
    u64 mass;           // probability of all tokens of the raw row
    uint32_t ahead;     // tokens ahead of the list; if any, `filter_collect` has drawn among them
    uint32_t expected;  // entries that the list is to hold; more than LIST: it holds none
    uint32_t listed;    // entries in the list
    uint32_t bad;       // a logit is NaN
    uint32_t alive;     // a token was chosen
    uint32_t token;
    uint32_t above;     // tokens ahead of `token` in the raw row
    float raw_max;      // largest raw logit
};

// The best of a warp's draws.
struct Pick {
    double score;
    uint32_t token;
    uint32_t infinite;  // an infinite logit: ahead of every finite one
};

// The argument of every kernel of the sampler.
struct SampleArgs {
    float *logits;          // [R, V]
    const uint32_t *block;  // [R] tasks, then lists
    RowState *states;       // [R]
    uint32_t *counts;       // [R, BINS]
    u64 *masses;            // [R, BINS]
    u64 *lists;             // [R, LIST]
    Pick *picks;            // [R, MAX_CHUNKS, WARPS]
    float *maxima;          // [R, segments_of(V)] largest logits, as the kernel before left them
    float *saved;           // raw logits of the list entries of all rows
    uint32_t *results;      // [R, RESULT_WORDS]
    uint32_t *feedback;     // [R]
    int32_t vocab;
    int32_t chunks;         // blocks that share a row
};

static_assert(sizeof(Task) == 80 && sizeof(RowState) == 64 && sizeof(Pick) == 16, "src/cuda/ops/sampling counts on these");

TM_DEVICE const Task &task_of(const SampleArgs &args, uint32_t row) { return ((const Task *)args.block)[row]; }

// ---- Order. A key orders floats as integers (NaN apart, -0 equal to 0); an entry is a key and, below it, the complement of the
// token, so that of equal logits the lowest token is the largest entry. 0 is no entry.
TM_DEVICE uint32_t key_of(float x) {
    const uint32_t bits = f32_to_bits(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
TM_DEVICE float key_value(uint32_t key) { return bits_to_f32(key & 0x80000000u ? key & 0x7fffffffu : ~key); }
TM_DEVICE u64 entry_of(float x, uint32_t token) { return (u64)key_of(x) << 32 | (u64)~token; }
TM_DEVICE float entry_value(u64 entry) { return key_value((uint32_t)(entry >> 32)); }
TM_DEVICE uint32_t entry_token(u64 entry) { return ~(uint32_t)entry; }

// ---- Arithmetic that must round as the CPU's does: a product that the compiler may not fuse with a sum.
TM_DEVICE float product(float a, float b) {
#if TM_GPU
    return __fmul_rn(a, b);
#else
    volatile float p = a * b;
    return p;
#endif
}

// e^x for x in -DEPTH..0, the same bits as the CPU's `exp` (src/cpu/simd/exp.rs): Cody and Waite's reduction, Cephes' polynomial.
TM_DEVICE float exp_exact(float x) {
    const float n = rintf(product(x, 1.44269504f));
    float r = fmaf(n, -0.693359375f, x);
    r = fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691e-4f;
    p = fmaf(p, r, 1.3981999e-3f);
    p = fmaf(p, r, 8.333452e-3f);
    p = fmaf(p, r, 4.1665796e-2f);
    p = fmaf(p, r, 1.6666665e-1f);
    p = fmaf(p, r, 0.5f);
    const float y = fmaf(product(r, r), p, r) + 1.0f;
    return product(y, bits_to_f32((uint32_t)((int)n + 127) << 23));
}

// e^y as an integer number of 2^-44; y in -DEPTH..0.
TM_DEVICE u64 mass_of(float y) { return (u64)product(exp_exact(y), 17592186044416.0f); }
static constexpr double MASS_UNIT = 1.0 / 17592186044416.0;

// The bin of y in -DEPTH..0.
TM_DEVICE int bin_of(float y) { return (int)product(y, -BINS_PER_NAT); }

// ---- Walking along a row. Groups of four logits are aligned to 16 bytes, so a row's first and last group may be incomplete. A
// warp's turn is a segment of SEGMENT groups; segments begin at multiples of SEGMENT in every walk.
struct Walk {
    const float *row;
    const uint32_t *mask;  // allowed tokens, or null
    float *maxima;         // largest logit of each segment
    int vocab, skew;       // logits of the row before it in its first group
    int first, last;       // groups of this walk; `first` is a multiple of TURN
};

// Places for the segments of a row: whole turns of the most groups that a row can have.
TM_DEVICE int segments_of(int vocab) { return WARPS * (((vocab + 6) / 4 + TURN - 1) / TURN); }

TM_DEVICE Walk whole_row(const SampleArgs &args, uint32_t row) {
    const size_t start = (size_t)row * args.vocab;
    Walk walk;
    walk.row = args.logits + start;
    walk.mask = nullptr;
    walk.maxima = args.maxima + (size_t)row * segments_of(args.vocab);
    walk.vocab = args.vocab;
    walk.skew = (int)(start & 3);
    walk.first = 0;
    walk.last = (walk.skew + args.vocab + 3) / 4;
    return walk;
}
// What block `chunk` of `args.chunks` does: whole turns.
TM_DEVICE Walk part_of_row(const SampleArgs &args, uint32_t row, uint32_t chunk) {
    Walk walk = whole_row(args, row);
    const int turns = (walk.last + TURN - 1) / TURN, share = (turns + args.chunks - 1) / args.chunks * TURN;
    walk.first = (int)chunk * share;
    walk.last = min(walk.last, walk.first + share);
    return walk;
}
TM_DEVICE void with_mask(Walk &walk, const SampleArgs &args, const Task &task) {
    if (task.flags & MASKED) walk.mask = args.block + task.mask;
}

// This thread's group `u` of the turn that begins at `turn`, and the token of its first logit, which may be negative.
TM_DEVICE int group_of(int turn, int u) {
    return turn + (int)(threadIdx.x >> 5) * SEGMENT + u * 32 + (int)(threadIdx.x & 31);
}
TM_DEVICE int group_token(const Walk &walk, int group) { return 4 * group - walk.skew; }
TM_DEVICE int segment_of(int turn) { return turn / SEGMENT + (int)(threadIdx.x >> 5); }

TM_DEVICE bool inside(const Walk &walk, int group, int token) {
    return group < walk.last && token >= 0 && token < walk.vocab;
}

// This thread's logits of a turn; -inf outside the walk.
TM_DEVICE void load_turn(float (&x)[UNROLL][4], const Walk &walk, int turn) {
    const bool whole = group_token(walk, turn) >= 0 && turn + TURN <= walk.last && group_token(walk, turn + TURN) <= walk.vocab;
    if (whole) {
        TM_UNROLL
        for (int u = 0; u < UNROLL; u++) {
            const float4 v = *(const float4 *)(walk.row + group_token(walk, group_of(turn, u)));
            x[u][0] = v.x, x[u][1] = v.y, x[u][2] = v.z, x[u][3] = v.w;
        }
        return;
    }
    TM_UNROLL
    for (int u = 0; u < UNROLL; u++) {
        const int group = group_of(turn, u), token = group_token(walk, group);
        TM_UNROLL
        for (int j = 0; j < 4; j++) x[u][j] = inside(walk, group, token + j) ? walk.row[token + j] : -infinity();
    }
}
// Tokens that the mask forbids become -inf.
TM_DEVICE void apply_mask(float (&x)[UNROLL][4], const Walk &walk, int turn) {
    if (!walk.mask) return;
    TM_UNROLL
    for (int u = 0; u < UNROLL; u++) {
        const int group = group_of(turn, u);
        TM_UNROLL
        for (int j = 0; j < 4; j++) {
            const int token = group_token(walk, group) + j;
            if (inside(walk, group, token) && !(walk.mask[token >> 5] >> (token & 31) & 1u)) x[u][j] = -infinity();
        }
    }
}
// Largest of the warp's logits of a turn.
TM_DEVICE float segment_max(const float (&x)[UNROLL][4]) {
    float largest = -infinity();
    TM_UNROLL
    for (int u = 0; u < UNROLL; u++) {
        TM_UNROLL
        for (int j = 0; j < 4; j++) largest = fmaxf(largest, x[u][j]);
    }
    return warp_max(largest);
}

// Calls f(x, token) for the logits of the walk that this thread meets, mask applied, and for some -inf beyond them; then g(x, token)
// for those where f was true. `g` is for what few tokens need: its code stands there once.
template <class F, class G>
TM_DEVICE void meet(const float (&x)[UNROLL][4], const Walk &walk, int turn, F f, G g) {
    uint32_t again = 0;
    TM_UNROLL
    for (int u = 0; u < UNROLL; u++) {
        const int first = group_token(walk, group_of(turn, u));
        TM_UNROLL
        for (int j = 0; j < 4; j++) again |= f(x[u][j], (uint32_t)(first + j)) ? 1u << (4 * u + j) : 0u;
    }
    for (; again; again &= again - 1) {
        const int i = __ffs((int)again) - 1, token = group_token(walk, group_of(turn, i >> 2)) + (i & 3);
        g(walk.row[token], (uint32_t)token);
    }
}
// The same for all turns of a walk, but for the segments whose largest logit `skip` refuses.
template <class S, class F, class G>
TM_DEVICE void for_each_logit(const Walk &walk, S skip, F f, G g) {
    for (int turn = walk.first; turn < walk.last; turn += TURN) {
        if (skip(segment_of(turn))) continue;
        float x[UNROLL][4];
        load_turn(x, walk, turn);
        apply_mask(x, walk, turn);
        meet(x, walk, turn, f, g);
    }
}
template <class F>
TM_DEVICE void for_each_logit(const Walk &walk, F f) {
    const auto none = [](int) { return false; };
    const auto once = [&](float x, uint32_t token) {
        f(x, token);
        return false;
    };
    for_each_logit(walk, none, once, [](float, uint32_t) {});
}

// ---- Over the block.

// Sum of the values of the threads before this one; `total` is that of all.
TM_DEVICE u64 block_scan(u64 v, u64 (&partial)[WARPS], u64 &total) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u64 sum = v;
    TM_UNROLL
    for (int offset = 1; offset < 32; offset <<= 1) {
        const u64 before = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += before;
    }
    if (lane == 31) partial[warp] = sum;
    __syncthreads();
    u64 before = 0;
    total = 0;
    TM_UNROLL
    for (int i = 0; i < WARPS; i++) {
        if (i < warp) before += partial[i];
        total += partial[i];
    }
    __syncthreads();
    return before + sum - v;
}

TM_DEVICE u64 warp_largest(u64 v) {
    TM_UNROLL
    for (int offset = 16; offset; offset >>= 1) {
        const u64 other = __shfl_xor_sync(0xffffffffu, v, offset);
        v = v > other ? v : other;
    }
    return v;
}
TM_DEVICE u64 block_largest(u64 v, u64 (&partial)[WARPS]) {
    v = warp_largest(v);
    if ((threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = v;
    __syncthreads();
    TM_UNROLL
    for (int i = 0; i < WARPS; i++) v = v > partial[i] ? v : partial[i];
    __syncthreads();
    return v;
}

// Adds to a 64-bit sum in shared memory that lies in two halves: unlike one of 64 bits, 32-bit additions are done by the memory itself.
TM_DEVICE void add_mass(uint32_t *low, uint32_t *high, u64 mass) {
    const uint32_t add = (uint32_t)mass;
    const uint32_t carry = atomicAdd(low, add) + add < add ? 1u : 0u;
    const uint32_t rest = (uint32_t)(mass >> 32) + carry;
    if (rest) atomicAdd(high, rest);
}

// A row's histogram in shared memory, added to the one in device memory when the block has done its part.
struct Histogram {
    uint32_t count[BINS], low[BINS], high[BINS];
};
TM_DEVICE void clear(Histogram &h) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) h.count[i] = h.low[i] = h.high[i] = 0;
    __syncthreads();
}
TM_DEVICE void flush(Histogram &h, const SampleArgs &args, uint32_t row) {
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        if (!h.count[i]) continue;
        const u64 mass = (u64)h.high[i] << 32 | h.low[i];
        atomicAdd(args.counts + (size_t)row * BINS + i, h.count[i]);
        if (mass) atomicAdd(args.masses + (size_t)row * BINS + i, mass);
    }
}

// The first `size` entries of the block's list in falling order (Batcher 1968, bitonic sort); `size` is a power of 2.
TM_DEVICE void sort_falling(u64 *list, int size) {
    for (int run = 2; run <= size; run <<= 1) {
        for (int stride = run / 2; stride; stride >>= 1) {
            __syncthreads();
            for (int i = threadIdx.x; i < size / 2; i += THREADS) {
                const int low = 2 * i - (i & (stride - 1)), high = low + stride;
                const u64 a = list[low], b = list[high];
                if ((a < b) == ((low & run) == 0)) list[low] = b, list[high] = a;
            }
        }
    }
    __syncthreads();
}
// Brings a row's list to shared memory and sorts it; entries from `n` on are 0.
TM_DEVICE int load_sorted(u64 *list, const u64 *from, int n) {
    int size = 2;
    while (size < n) size <<= 1;
    for (int i = threadIdx.x; i < size; i += THREADS) list[i] = i < n ? from[i] : 0ull;
    sort_falling(list, size);
    return size;
}

}  // namespace tidemill
