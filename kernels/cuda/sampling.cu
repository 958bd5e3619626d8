// From logits to tokens: src/sampling.rs says what is computed. Log-probabilities follow in logprobs.cu.
//
//   sample_prepare    grid (rows)          clears the row's state; edits its logits, keeping the raw ones
//   sample_scan       grid (chunks, rows)  NaN, largest logit; the draw of rows without filters
//   filter_histogram  grid (chunks, rows)  counts and probabilities over the distance to the largest logit
//   filter_collect    grid (chunks, rows)  lists the tokens that may survive the filters
//   sample_choose     grid (rows)          applies the filters, draws, writes the token, puts the raw logits back
//
// Block 256 throughout. Logits are f32 [R, V], V below 2^20; no alignment of a row is asked for. Rows whose task is not ACTIVE, and
// work that a row's task does not ask for, cost a launch's share and no memory traffic. Top-k, top-p and min-p each keep a beginning of the
// tokens in falling order (ties: lowest token first), so a histogram finds about where the cut lies; the tokens above it are few
// and are sorted. Where they are more than LIST (flat rows), radix selection over the entries finds the cut in the row itself.
#include "draw.cuh"

using namespace tidemill;

// ---- Edits. Each list names a token once, so that its entries can be applied side by side.

TM_DEVICE float penalised(float x, uint32_t count, const Task &task) {
    x = x > 0.0f ? x / task.repetition : product(x, task.repetition);
    return count ? x - (task.presence + product(task.frequency, (float)count)) : x;
}

// Edits the row's logits; returns whether this thread met a NaN.
TM_DEVICE bool edit(const SampleArgs &args, const Task &task, float *row) {
    const uint32_t *list = args.block + task.lists;
    float *saved = args.saved + task.saved;
    bool nan = false;
    for (uint32_t i = threadIdx.x; i < task.num_biases; i += THREADS) {
        float &x = row[list[2 * i]];
        saved[i] = x;
        nan |= x != x;
        x += bits_to_f32(list[2 * i + 1]);
    }
    __syncthreads();
    list += 2 * task.num_biases, saved += task.num_biases;
    for (uint32_t i = threadIdx.x; i < task.num_counts; i += THREADS) {
        float &x = row[list[2 * i]];
        saved[i] = x;
        nan |= x != x;
        x = penalised(x, list[2 * i + 1], task);
    }
    __syncthreads();
    list += 2 * task.num_counts, saved += task.num_counts;
    for (uint32_t i = threadIdx.x; i < task.num_forbidden; i += THREADS) {
        float &x = row[list[i]];
        saved[i] = x;
        nan |= x != x;
        x = -infinity();
    }
    return nan;
}

// Puts the raw logits back: the lists in reverse, as a token may stand in several.
TM_DEVICE void undo_edits(const SampleArgs &args, const Task &task, float *row) {
    const uint32_t *biases = args.block + task.lists;
    const uint32_t *counts = biases + 2 * task.num_biases, *forbidden = counts + 2 * task.num_counts;
    const float *saved = args.saved + task.saved;
    const float *saved_counts = saved + task.num_biases, *saved_forbidden = saved_counts + task.num_counts;
    for (uint32_t i = threadIdx.x; i < task.num_forbidden; i += THREADS) row[forbidden[i]] = saved_forbidden[i];
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < task.num_counts; i += THREADS) row[counts[2 * i]] = saved_counts[i];
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < task.num_biases; i += THREADS) row[biases[2 * i]] = saved[i];
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS) sample_prepare(SampleArgs args) {
    const uint32_t row = blockIdx.x;
    const Task &task = task_of(args, row);
    if (!(task.flags & ACTIVE)) return;
    RowState &state = args.states[row];
    if (threadIdx.x == 0) {
        RowState clean = {};
        state = clean;
    }
    if (task.flags & FILTERED) {
        for (int i = threadIdx.x; i < BINS; i += THREADS) {
            args.counts[(size_t)row * BINS + i] = 0;
            args.masses[(size_t)row * BINS + i] = 0;
        }
    }
    __syncthreads();
    if (task.flags & EDITED) {
        if (edit(args, task, args.logits + (size_t)row * args.vocab)) atomicOr(&state.bad, 1u);
    }
}
KERNEL(sample_prepare);

// ---- The first pass.

extern "C" __global__ void __launch_bounds__(THREADS) sample_scan(SampleArgs args) {
    const uint32_t row = blockIdx.y;
    const Task &task = task_of(args, row);
    if (!(task.flags & ACTIVE)) return;
    const bool draws = !(task.flags & (SCORE | GREEDY | FILTERED));
    Walk walk = part_of_row(args, row, blockIdx.x);
    with_mask(walk, args, task);
    Drawer drawer;
    drawer.start(task.temperature);
    bool nan = false;
    float largest = -infinity();
    uint32_t token = 0xffffffffu;
    // Every thread takes every turn, as the warp shares its bound.
    for (int base = walk.first; base < walk.last; base += THREADS * UNROLL) {
        float x[UNROLL][4];
        TM_UNROLL
        for (int u = 0; u < UNROLL; u++) load_group(x[u], walk, base + u * THREADS + (int)threadIdx.x);
        TM_UNROLL
        for (int u = 0; u < UNROLL; u++) {
            const int group = base + u * THREADS + (int)threadIdx.x;
            TM_UNROLL
            for (int j = 0; j < 4; j++) nan |= x[u][j] != x[u][j];
            apply_mask(x[u], walk, group);
            TM_UNROLL
            for (int j = 0; j < 4; j++) {
                // A thread meets its tokens in rising order: the first of equals stays.
                if (x[u][j] > largest) largest = x[u][j], token = (uint32_t)(group_token(walk, group) + j);
            }
        }
        if (!draws) continue;
        drawer.raise(warp_max(drawer.bound(largest)));
        TM_UNROLL
        for (int u = 0; u < UNROLL; u++) {
            const int first = group_token(walk, base + u * THREADS + (int)threadIdx.x);
            TM_UNROLL
            for (int j = 0; j < 4; j++) drawer.offer(x[u][j], (uint32_t)(first + j), task);
        }
    }
    const u64 best = warp_largest(largest > -infinity() ? entry_of(largest, token) : 0ull);
    const bool bad = __any_sync(0xffffffffu, nan);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (lane == 0 && best) atomicMax(&args.states[row].best, best);
    if (lane == 0 && bad) atomicOr(&args.states[row].bad, 1u);
    if (!draws) return;
    const Pick pick = warp_best(drawer.best);
    if (lane == 0) args.picks[((size_t)row * MAX_CHUNKS + blockIdx.x) * WARPS + warp] = pick;
}
KERNEL(sample_scan);

// ---- Filters.

// Logits after temperature, shifted so that the largest is 0: the CPU's arithmetic, to the bit.
struct Shift {
    float max, temperature;
    TM_DEVICE float of(float x) const {
        if (max == infinity()) return x == max ? 0.0f : -infinity();
        const float below = x - max;
        // Too far down for any filter or draw: the division is spared.
        if (below < -40.0f * temperature) return -infinity();
        return below / temperature + 0.0f;
    }
};

// Whether the row's filters have anything to work on.
TM_DEVICE bool filters(const Task &task, const RowState &state) {
    return (task.flags & ACTIVE) && (task.flags & FILTERED) && !state.bad && state.best;
}

extern "C" __global__ void __launch_bounds__(THREADS) filter_histogram(SampleArgs args) {
    SHARED(Histogram, histogram, [1]);
    const uint32_t row = blockIdx.y;
    const Task &task = task_of(args, row);
    const RowState &state = args.states[row];
    if (!filters(task, state)) return;
    Histogram &h = histogram[0];
    clear(h);
    const Shift shift = {entry_value(state.best), task.temperature};
    Walk walk = part_of_row(args, row, blockIdx.x);
    with_mask(walk, args, task);
    for_each_logit(walk, [&](float x, uint32_t) {
        const float y = shift.of(x);
        if (!(y > -DEPTH)) return;
        const int bin = bin_of(y);
        atomicAdd(&h.count[bin], 1u);
        add_mass(&h.low[bin], &h.high[bin], mass_of(y));
    });
    flush(h, args, row);
}
KERNEL(filter_histogram);

// What top-p must reach. At least one unit: the first token always stays.
TM_DEVICE double goal_of(const Task &task, u64 total) { return fmax((double)task.top_p * (double)total, 1.0); }

// Where a row's list ends.
struct Cut {
    int bin;           // the last that is listed
    uint32_t through;  // tokens down to it
    u64 total;         // probability of the row
};

// Reads the row's histogram: all tokens that may survive the filters and win the draw lie in the bins down to the cut.
TM_DEVICE Cut find_cut(const SampleArgs &args, uint32_t row, const Task &task, u64 (&partial)[WARPS], Cut &shared) {
    static constexpr int OWN = BINS / THREADS;
    // 20.2 nats below the largest, no noise suffices to win.
    const int hopeless = (int)(20.25f * BINS_PER_NAT);
    uint32_t count[OWN];
    u64 mass[OWN], own_count = 0, own_mass = 0, tokens, total;
    TM_UNROLL
    for (int i = 0; i < OWN; i++) {
        const size_t bin = (size_t)row * BINS + threadIdx.x * OWN + i;
        own_count += count[i] = args.counts[bin];
        own_mass += mass[i] = args.masses[bin];
    }
    u64 before = block_scan(own_count, partial, tokens), mass_before = block_scan(own_mass, partial, total);
    const double goal = goal_of(task, total);
    const bool sums_top_k = task.top_k && task.top_p < 1.0f;
    int last = sums_top_k ? BINS - 1 : hopeless;
    // One bin more than the bound says, for its rounding.
    if (!sums_top_k && task.min_p > 0.0f) last = min(last, (int)(-logf(task.min_p) * BINS_PER_NAT) + 1);
    if (threadIdx.x == 0) shared.bin = last;
    __syncthreads();
    TM_UNROLL
    for (int i = 0; i < OWN; i++) {
        const u64 through = before + count[i], mass_through = mass_before + mass[i];
        const bool crosses = task.top_k ? before < task.top_k && task.top_k <= through
                                        : task.top_p < 1.0f && (double)mass_before < goal && goal <= (double)mass_through;
        if (crosses && count[i]) atomicMin(&shared.bin, (int)threadIdx.x * OWN + i);
        before = through, mass_before = mass_through;
    }
    __syncthreads();
    const int bin = shared.bin;
    u64 listed = 0, through;
    TM_UNROLL
    for (int i = 0; i < OWN; i++) listed += (int)threadIdx.x * OWN + i <= bin ? count[i] : 0u;
    block_scan(listed, partial, through);
    const Cut cut = {bin, (uint32_t)through, total};
    return cut;
}

extern "C" __global__ void __launch_bounds__(THREADS) filter_collect(SampleArgs args) {
    SHARED(u64, partial, [WARPS]);
    SHARED(Cut, shared, [1]);
    const uint32_t row = blockIdx.y;
    const Task &task = task_of(args, row);
    RowState &state = args.states[row];
    if (!filters(task, state)) return;
    const Cut cut = find_cut(args, row, task, partial, shared[0]);
    if (blockIdx.x == 0 && threadIdx.x == 0) state.through = cut.through, state.total = cut.total;
    if (cut.through > LIST) return;
    const Shift shift = {entry_value(state.best), task.temperature};
    u64 *list = args.lists + (size_t)row * LIST;
    Walk walk = part_of_row(args, row, blockIdx.x);
    with_mask(walk, args, task);
    for_each_logit(walk, [&](float x, uint32_t token) {
        const float y = shift.of(x);
        if (y > -DEPTH && bin_of(y) <= cut.bin) list[atomicAdd(&state.listed, 1u)] = entry_of(y, token);
    });
}
KERNEL(filter_collect);

// ---- The choice.

// Shared memory of `sample_choose`.
struct Choose {
    u64 list[LIST];
    uint32_t count[THREADS], low[THREADS], high[THREADS];
    u64 partial[WARPS];
    Pick picks[WARPS];
    u64 before, mass_before, mass_through;  // of the digit found: ahead of it, and with it
    int found, unique;
};

TM_DEVICE bool meets_min_p(float y, const Task &task) { return !(task.min_p > 0.0f) || !(exp_exact(y) < task.min_p); }

// Probability of a list's entry.
TM_DEVICE u64 entry_mass(u64 entry) { return entry ? mass_of(entry_value(entry)) : 0ull; }

// Filters and draws from the row's list.
TM_DEVICE Pick draw_from_list(const SampleArgs &args, uint32_t row, const Task &task, Choose &shared) {
    const RowState &state = args.states[row];
    const int n = (int)state.through;
    const int size = load_sorted(shared.list, args.lists + (size_t)row * LIST, n);
    const int own = (size + THREADS - 1) / THREADS, from = min((int)threadIdx.x * own, size), to = min(from + own, size);
    const int kept = task.top_k && task.top_k < (uint32_t)n ? (int)task.top_k : n;
    u64 mass = 0, total;
    for (int i = from; i < to; i++) mass += i < kept ? entry_mass(shared.list[i]) : 0ull;
    u64 before = block_scan(mass, shared.partial, total);
    const double goal = goal_of(task, task.top_k ? total : state.total);
    Drawer drawer;
    drawer.start(1.0f);
    drawer.raise(-2.86f);
    for (int i = from; i < to && i < kept; i++) {
        if (task.top_p < 1.0f && (double)before >= goal) break;
        const float y = entry_value(shared.list[i]);
        if (!meets_min_p(y, task)) break;
        drawer.offer(y, entry_token(shared.list[i]), task);
        before += mass_of(y);
    }
    return block_best(drawer.best, shared.picks);
}

// Finds the entry at which the count (or the probability) of the row's largest entries reaches `goal`, among those from `least` on:
// radix selection, eight bits a turn. Returns a bound: the entries from it on are those down to the one found; `mass` is their
// probability. When the goal is never reached that is `least`.
TM_DEVICE u64 select_entry(const Walk &walk, const Shift &shift, bool by_mass, double goal, u64 least, u64 &mass, Choose &shared) {
    u64 prefix = 0, before = 0, mass_before = 0;
    for (int at = 56; at >= 0; at -= 8) {
        shared.count[threadIdx.x] = shared.low[threadIdx.x] = shared.high[threadIdx.x] = 0;
        if (threadIdx.x == 0) shared.found = -1;
        __syncthreads();
        for_each_logit(walk, [&](float x, uint32_t token) {
            const float y = shift.of(x);
            if (!(y > -DEPTH)) return;
            const u64 entry = entry_of(y, token);
            if (entry < least || (at < 56 && entry >> (at + 8) != prefix >> (at + 8))) return;
            const int digit = (int)(entry >> at & 255);
            atomicAdd(&shared.count[digit], 1u);
            add_mass(&shared.low[digit], &shared.high[digit], mass_of(y));
        });
        __syncthreads();
        // Thread t holds the digit 255 - t: digits fall as threads rise.
        const int digit = THREADS - 1 - (int)threadIdx.x;
        const u64 own = shared.count[digit], own_mass = (u64)shared.high[digit] << 32 | shared.low[digit];
        u64 all, all_mass;
        const u64 start = before + block_scan(own, shared.partial, all);
        const u64 start_mass = mass_before + block_scan(own_mass, shared.partial, all_mass);
        const double from = by_mass ? (double)start_mass : (double)start;
        const double to = by_mass ? (double)(start_mass + own_mass) : (double)(start + own);
        if (own && from < goal && goal <= to) {
            shared.found = digit;
            shared.before = start, shared.mass_before = start_mass;
            shared.mass_through = start_mass + own_mass;
            shared.unique = own == 1;
        }
        __syncthreads();
        const int found = shared.found;
        const bool unique = shared.unique;
        mass = found < 0 ? mass_before + all_mass : shared.mass_through;
        before = shared.before, mass_before = shared.mass_before;
        __syncthreads();
        if (found < 0) return least;
        prefix |= (u64)found << at;
        if (unique) break;
    }
    return prefix > least ? prefix : least;
}

// Filters and draws where the row lies.
TM_DEVICE Pick draw_from_row(const SampleArgs &args, uint32_t row, const Task &task, Choose &shared) {
    const RowState &state = args.states[row];
    const Shift shift = {entry_value(state.best), task.temperature};
    Walk walk = whole_row(args, row);
    with_mask(walk, args, task);
    u64 least = 0, total = state.total;
    if (task.top_k) least = select_entry(walk, shift, false, (double)task.top_k, 0, total, shared);
    if (task.top_p < 1.0f) {
        u64 kept;
        least = select_entry(walk, shift, true, goal_of(task, total), least, kept, shared);
    }
    Drawer drawer;
    drawer.start(1.0f);
    drawer.raise(-2.86f);
    for_each_logit(walk, [&](float x, uint32_t token) {
        const float y = shift.of(x);
        if (y > -DEPTH && entry_of(y, token) >= least && meets_min_p(y, task)) drawer.offer(y, token, task);
    });
    return block_best(drawer.best, shared.picks);
}

// The best of what the warps of `sample_scan` drew. Finite picks of a row with infinite logits lose by their order.
TM_DEVICE Pick best_pick(const SampleArgs &args, uint32_t row, Choose &shared) {
    const Pick *picks = args.picks + (size_t)row * MAX_CHUNKS * WARPS;
    Pick best = no_pick();
    for (int i = threadIdx.x; i < args.chunks * WARPS; i += THREADS) {
        if (beats(picks[i], best)) best = picks[i];
    }
    return block_best(best, shared.picks);
}

TM_DEVICE uint32_t choose(const SampleArgs &args, uint32_t row, const Task &task, Choose &shared) {
    const RowState &state = args.states[row];
    if (task.flags & SCORE) return task.token;
    if (task.flags & GREEDY) return entry_token(state.best);
    if (!(task.flags & FILTERED)) return best_pick(args, row, shared).token;
    if (state.through > LIST) return draw_from_row(args, row, task, shared).token;
    return draw_from_list(args, row, task, shared).token;
}

// Readies an edited row for log-probabilities; returns its largest raw logit.
TM_DEVICE float restore(const SampleArgs &args, uint32_t row, const Task &task, Choose &shared) {
    undo_edits(args, task, args.logits + (size_t)row * args.vocab);
    u64 best = 0;
    for_each_logit(whole_row(args, row), [&](float x, uint32_t token) {
        const u64 entry = entry_of(x, token);
        best = best > entry ? best : entry;
    });
    return entry_value(block_largest(best, shared.partial));
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) sample_choose(SampleArgs args) {
    SHARED(Choose, memory, [1]);
    Choose &shared = memory[0];
    const uint32_t row = blockIdx.x;
    const Task &task = task_of(args, row);
    if (!(task.flags & ACTIVE)) return;
    RowState &state = args.states[row];
    uint32_t *result = args.results + (size_t)row * RESULT_WORDS;
    const bool score = task.flags & SCORE;
    const bool unfiltered = (task.flags & FILTERED) && !state.through;  // launched without the filters' kernels
    if (state.bad || !state.best || unfiltered) {
        if (threadIdx.x == 0) {
            result[0] = score ? task.token : 0, result[1] = 0;
            if (!score) args.feedback[row] = 0;
        }
        return;
    }
    const uint32_t token = choose(args, row, task, shared);
    float raw_max = entry_value(state.best);
    if (task.flags & LOGPROBS) {
        if (task.flags & (EDITED | MASKED)) raw_max = restore(args, row, task, shared);
        if (task.top) {
            for (int i = threadIdx.x; i < BINS; i += THREADS) args.counts[(size_t)row * BINS + i] = 0;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        state.alive = 1, state.token = token, state.raw_max = raw_max;
        state.listed = 0, state.through = 0;
        // The rank stays 0 until there are log-probabilities.
        result[0] = token, result[1] = 1, result[3] = 0;
        if (!score) args.feedback[row] = token;
    }
}
KERNEL(sample_choose);
