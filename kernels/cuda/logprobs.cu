// Log-probabilities of the raw logits, after sampling.cu has chosen the tokens and put the raw logits back.
//
//   logprob_scan      grid (chunks, rows)  probability of all tokens, rank of the row's token, histogram for the largest ones
//   logprob_collect   grid (chunks, rows)  lists the tokens that may be among the `top` largest
//   logprob_finish    grid (rows)          writes log-probability, rank and the largest tokens
//
// Block 256. Rows that ask for none, and those without a finite logit, do nothing. A row's result is RESULT_WORDS words: token, finite,
// log-probability, rank, number of largest tokens, three unused, MAX_TOP tokens, MAX_TOP log-probabilities.
#include "sampling.cuh"

using namespace tidemill;

TM_DEVICE bool wanted(const Task &task, const RowState &state) {
    return (task.flags & ACTIVE) && (task.flags & LOGPROBS) && state.alive;
}

// Distance to the largest logit, at most 0. Infinite logits share all the probability.
TM_DEVICE float below(float x, float max) { return x == max ? 0.0f : x - max; }

extern "C" __global__ void __launch_bounds__(THREADS, 4) logprob_scan(SampleArgs args) {
    SHARED(uint32_t, bins, [BINS]);
    SHARED(u64, partial, [WARPS]);
    const uint32_t row = blockIdx.y;
    const Task &task = task_of(args, row);
    RowState &state = args.states[row];
    if (!wanted(task, state)) return;
    for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
    __syncthreads();
    const float max = state.raw_max;
    const u64 chosen = entry_of(args.logits[(size_t)row * args.vocab + state.token], state.token);
    u64 mass = 0, above = 0;
    const auto count = [&](float x, uint32_t token) {
        const float y = below(x, max);
        // Outside of the row there are only -inf, of no token.
        above += token < (uint32_t)args.vocab && entry_of(x, token) > chosen;
        if (!(y > -DEPTH)) return false;
        mass += mass_of(y);
        if (task.top) atomicAdd(&bins[bin_of(y)], 1u);
        return false;
    };
    const Walk walk = part_of_row(args, row, blockIdx.x);
    for (int turn = walk.first; turn < walk.last; turn += TURN) {
        float x[UNROLL][4];
        load_turn(x, walk, turn);
        meet(x, walk, turn, count, [](float, uint32_t) {});
        if (!task.top) continue;
        const float segment = segment_max(x);
        if ((threadIdx.x & 31) == 0) walk.maxima[segment_of(turn)] = segment;
    }
    u64 mass_sum, above_sum;
    block_scan(mass, partial, mass_sum);
    block_scan(above, partial, above_sum);
    if (threadIdx.x == 0) {
        atomicAdd(&state.mass, mass_sum);
        atomicAdd(&state.above, (uint32_t)above_sum);
    }
    if (!task.top) return;
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        if (bins[i]) atomicAdd(args.counts + (size_t)row * BINS + i, bins[i]);
    }
}
KERNEL(logprob_scan);

extern "C" __global__ void __launch_bounds__(THREADS, 4) logprob_collect(SampleArgs args) {
    static constexpr int OWN = BINS / THREADS;
    SHARED(u64, partial, [WARPS]);
    SHARED(int, shared, [2]);
    const uint32_t row = blockIdx.y;
    const Task &task = task_of(args, row);
    RowState &state = args.states[row];
    if (!wanted(task, state) || !task.top) return;
    uint32_t count[OWN];
    u64 own = 0, total;
    TM_UNROLL
    for (int i = 0; i < OWN; i++) own += count[i] = args.counts[(size_t)row * BINS + threadIdx.x * OWN + i];
    if (threadIdx.x == 0) shared[0] = -1;
    u64 before = block_scan(own, partial, total);
    const uint32_t top = min(task.top, (uint32_t)args.vocab);
    TM_UNROLL
    for (int i = 0; i < OWN; i++) {
        if (before < top && top <= before + count[i]) shared[0] = threadIdx.x * OWN + i, shared[1] = (int)(before + count[i]);
        before += count[i];
    }
    __syncthreads();
    const int bin = shared[0];
    // Too many of them, or some lie deeper than the histogram: the row itself is searched.
    const uint32_t expected = bin < 0 ? LIST + 1 : (uint32_t)shared[1];
    if (blockIdx.x == 0 && threadIdx.x == 0) state.expected = expected;
    if (expected > LIST) return;
    const float max = state.raw_max;
    u64 *list = args.lists + (size_t)row * LIST;
    const Walk walk = part_of_row(args, row, blockIdx.x);
    const auto reaches = [&](float x) { return below(x, max) > -DEPTH && bin_of(below(x, max)) <= bin; };
    const auto skip = [&](int segment) { return !reaches(walk.maxima[segment]); };
    const auto listed = [&](float x, uint32_t) { return reaches(x); };
    for_each_logit(walk, skip, listed, [&](float x, uint32_t token) {
        list[atomicAdd(&state.listed, 1u)] = entry_of(x, token);
    });
}
KERNEL(logprob_collect);

// log(probability) of a logit: the CPU's arithmetic in f64.
TM_DEVICE float logprob(float x, float max, double log_sum) {
    return x == max ? (float)-log_sum : (float)((double)x - (double)max - log_sum);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) logprob_finish(SampleArgs args) {
    SHARED(u64, list, [LIST]);
    SHARED(u64, partial, [WARPS]);
    const uint32_t row = blockIdx.x;
    const Task &task = task_of(args, row);
    const RowState &state = args.states[row];
    if (!wanted(task, state)) return;
    uint32_t *result = args.results + (size_t)row * RESULT_WORDS;
    const float max = state.raw_max;
    const double log_sum = log((double)state.mass * MASS_UNIT);
    const uint32_t top = min(task.top, (uint32_t)args.vocab);
    if (threadIdx.x == 0) {
        result[2] = f32_to_bits(logprob(args.logits[(size_t)row * args.vocab + state.token], max, log_sum));
        result[3] = state.above + 1;
        result[4] = top;
    }
    if (!top) return;
    if (state.expected <= LIST) {
        load_sorted(list, args.lists + (size_t)row * LIST, (int)state.expected);
    } else {
        u64 last = ~0ull;
        for (uint32_t i = 0; i < top; i++) {
            u64 best = 0;
            for_each_logit(whole_row(args, row), [&](float x, uint32_t token) {
                const u64 entry = entry_of(x, token);
                if (token < (uint32_t)args.vocab && entry < last && entry > best) best = entry;
            });
            last = block_largest(best, partial);
            if (threadIdx.x == 0) list[i] = last;
        }
        __syncthreads();
    }
    if (threadIdx.x < top) {
        const u64 entry = list[threadIdx.x];
        result[8 + threadIdx.x] = entry_token(entry);
        result[8 + MAX_TOP + threadIdx.x] = f32_to_bits(logprob(entry_value(entry), max, log_sum));
    }
}
KERNEL(logprob_finish);
