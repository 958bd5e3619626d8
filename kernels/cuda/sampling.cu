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
// and are sorted. Where they are more than LIST (flat rows) only the bin of the cut is sorted, and the draw among the tokens ahead of it is
// shared by the blocks that list it. Where that does not do either (top-k of thousands with top-p, or thousands of equal logits), radix
// selection over the entries finds the cut in the row itself.
#include "draw.cuh"

using namespace tidemill;

// ---- Edits. Each list names a token once, so that its entries can be applied side by side.

TM_DEVICE float penalised(float x, uint32_t count, const Task &task) {
    x = x > 0.0f ? x / task.repetition : product(x, task.repetition);
    return count ? x - (task.presence + product(task.frequency, (float)count)) : x;
}

// Edits the row's logits; returns whether this thread met a NaN. All threads have come here before any returns.
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

extern "C" __global__ void __launch_bounds__(THREADS, 4) sample_prepare(SampleArgs args) {
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
    if (task.flags & EDITED) {
        // The barriers of `edit` lie between the clearing and this.
        if (edit(args, task, args.logits + (size_t)row * args.vocab)) atomicOr(&state.bad, 1u);
    }
}
KERNEL(sample_prepare);

// ---- The first pass.

extern "C" __global__ void __launch_bounds__(THREADS, 3) sample_scan(SampleArgs args) {
    const uint32_t row = blockIdx.y;
    const Task &task = task_of(args, row);
    if (!(task.flags & ACTIVE)) return;
    const bool draws = !(task.flags & (SCORE | GREEDY | FILTERED));
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    Walk walk = part_of_row(args, row, blockIdx.x);
    with_mask(walk, args, task);
    Drawer drawer;
    drawer.start(task.temperature);
    bool nan = false;
    float largest = -infinity();
    uint32_t token = 0xffffffffu;
    for (int turn = walk.first; turn < walk.last; turn += TURN) {
        float x[UNROLL][4];
        load_turn(x, walk, turn);
        TM_UNROLL
        for (int i = 0; i < 4 * UNROLL; i++) nan |= x[i / 4][i % 4] != x[i / 4][i % 4];
        apply_mask(x, walk, turn);
        TM_UNROLL
        for (int i = 0; i < 4 * UNROLL; i++) {
            // A thread meets its tokens in rising order: the first of equals stays.
            if (x[i / 4][i % 4] <= largest || x[i / 4][i % 4] != x[i / 4][i % 4]) continue;
            largest = x[i / 4][i % 4];
            token = (uint32_t)(group_token(walk, group_of(turn, i / 4)) + i % 4);
        }
        if (task.flags & FILTERED) {
            const float segment = segment_max(x);
            if (lane == 0) walk.maxima[segment_of(turn)] = segment;
        }
        if (!draws) continue;
        drawer.raise(warp_max(drawer.bound(largest)));
        const auto may_win = [&](float x, uint32_t token) { return drawer.may_win(x, token, task); };
        meet(x, walk, turn, may_win, [&](float x, uint32_t token) { drawer.take(x, token, task); });
    }
    const u64 best = warp_largest(largest > -infinity() ? entry_of(largest, token) : 0ull);
    const bool bad = __any_sync(0xffffffffu, nan);
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

extern "C" __global__ void __launch_bounds__(THREADS, 4) filter_histogram(SampleArgs args) {
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

// What a row's list holds: all tokens that may survive the filters and win the draw, or, where they are more than LIST, only those of
// the bin in which the cut lies; those ahead of it are certain to survive top-k and top-p.
struct Cut {
    int first, last;    // bins that are listed
    uint32_t expected;  // tokens in them; more than LIST: nothing is listed
    uint32_t ahead;     // tokens ahead of them
    u64 ahead_mass, total;
};

// Shared memory of `find_cut`.
struct CutMemory {
    u64 partial[WARPS];
    int crossing;
    uint32_t count, ahead;
    u64 ahead_mass;
};

// The last bin that can matter when nothing cuts before. 20.2 nats below the largest, no noise suffices to win. Top-p after top-k needs
// the sum over all of top-k.
TM_DEVICE int last_bin(const Task &task) {
    if (task.top_k && task.top_p < 1.0f) return BINS - 1;
    const int hopeless = (int)(20.25f * BINS_PER_NAT);
    // One bin more than the bound says, for its rounding.
    return task.min_p > 0.0f ? min(hopeless, (int)(-logf(task.min_p) * BINS_PER_NAT) + 1) : hopeless;
}

// Finds the cut in the row's histogram.
TM_DEVICE Cut find_cut(const SampleArgs &args, uint32_t row, const Task &task, CutMemory &shared) {
    static constexpr int OWN = BINS / THREADS;
    uint32_t count[OWN];
    u64 mass[OWN], own_count = 0, own_mass = 0, tokens, through;
    TM_UNROLL
    for (int i = 0; i < OWN; i++) {
        const size_t bin = (size_t)row * BINS + threadIdx.x * OWN + i;
        own_count += count[i] = args.counts[bin];
        own_mass += mass[i] = args.masses[bin];
    }
    Cut cut;
    if (threadIdx.x == 0) shared.crossing = BINS;
    u64 before = block_scan(own_count, shared.partial, tokens);
    u64 before_mass = block_scan(own_mass, shared.partial, cut.total);
    const double goal = goal_of(task, cut.total);
    TM_UNROLL
    for (int i = 0; i < OWN; i++) {
        const u64 to = before + count[i], to_mass = before_mass + mass[i];
        const bool crosses = task.top_k ? before < task.top_k && task.top_k <= to
                                        : task.top_p < 1.0f && (double)before_mass < goal && goal <= (double)to_mass;
        if (crosses) {
            shared.crossing = (int)threadIdx.x * OWN + i, shared.count = count[i];
            shared.ahead = (uint32_t)before, shared.ahead_mass = before_mass;
        }
        before = to, before_mass = to_mass;
    }
    __syncthreads();
    const int limit = last_bin(task), crossing = shared.crossing;
    cut.first = 0, cut.last = min(limit, crossing);
    u64 listed = 0;
    TM_UNROLL
    for (int i = 0; i < OWN; i++) listed += (int)threadIdx.x * OWN + i <= cut.last ? count[i] : 0u;
    block_scan(listed, shared.partial, through);
    cut.expected = (uint32_t)through, cut.ahead = 0, cut.ahead_mass = 0;
    if (through <= LIST || (task.top_k && task.top_p < 1.0f)) return cut;
    const bool cuts = crossing <= limit;
    cut.first = cuts ? crossing : limit + 1;
    cut.expected = cuts ? shared.count : 0;
    cut.ahead = (uint32_t)through - cut.expected;
    cut.ahead_mass = cuts ? shared.ahead_mass : 0;
    return cut;
}

TM_DEVICE bool meets_min_p(float y, const Task &task) { return !(task.min_p > 0.0f) || !(exp_exact(y) < task.min_p); }

extern "C" __global__ void __launch_bounds__(THREADS, 2) filter_collect(SampleArgs args) {
    SHARED(CutMemory, memory, [1]);
    const uint32_t row = blockIdx.y;
    const Task &task = task_of(args, row);
    RowState &state = args.states[row];
    if (!filters(task, state)) return;
    const Cut cut = find_cut(args, row, task, memory[0]);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        state.total = cut.total, state.expected = cut.expected;
        state.ahead = cut.ahead, state.ahead_mass = cut.ahead_mass;
    }
    if (cut.expected > LIST) return;
    const Shift shift = {entry_value(state.best), task.temperature};
    u64 *list = args.lists + (size_t)row * LIST;
    Walk walk = part_of_row(args, row, blockIdx.x);
    with_mask(walk, args, task);
    Drawer drawer;
    drawer.start(1.0f);
    drawer.raise(LEAST_SUM);
    const auto reaches = [&](float y) { return y > -DEPTH && bin_of(y) <= cut.last; };
    const auto skip = [&](int segment) { return !reaches(shift.of(walk.maxima[segment])); };
    const auto matters = [&](float x, uint32_t token) {
        const float y = shift.of(x);
        return reaches(y) && (bin_of(y) >= cut.first || (meets_min_p(y, task) && drawer.may_win(y, token, task)));
    };
    for_each_logit(walk, skip, matters, [&](float x, uint32_t token) {
        const float y = shift.of(x);
        if (bin_of(y) < cut.first) {
            drawer.take(y, token, task);
        } else {
            list[atomicAdd(&state.listed, 1u)] = entry_of(y, token);
        }
    });
    if (!cut.ahead) return;
    const Pick pick = warp_best(drawer.best);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (lane == 0) args.picks[((size_t)row * MAX_CHUNKS + blockIdx.x) * WARPS + warp] = pick;
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

// Probability of a list's entry.
TM_DEVICE u64 entry_mass(u64 entry) { return entry ? mass_of(entry_value(entry)) : 0ull; }

// The best of what the warps drew: in `sample_scan`, or in `filter_collect` ahead of the list. Finite picks of a row with infinite logits
// lose by their order.
TM_DEVICE Pick best_pick(const SampleArgs &args, uint32_t row) {
    const Pick *picks = args.picks + (size_t)row * MAX_CHUNKS * WARPS;
    Pick best = no_pick();
    for (int i = threadIdx.x; i < args.chunks * WARPS; i += THREADS) {
        if (beats(picks[i], best)) best = picks[i];
    }
    return best;
}

// Filters and draws from the row's list, and from what was drawn ahead of it.
TM_DEVICE Pick draw_from_list(const SampleArgs &args, uint32_t row, const Task &task, Choose &shared) {
    const RowState &state = args.states[row];
    const int n = (int)state.expected;
    const int size = load_sorted(shared.list, args.lists + (size_t)row * LIST, n);
    const int own = (size + THREADS - 1) / THREADS, from = min((int)threadIdx.x * own, size), to = min(from + own, size);
    const int kept = task.top_k ? min(n, (int)(task.top_k - state.ahead)) : n;
    u64 mass = 0, total;
    for (int i = from; i < to; i++) mass += i < kept ? entry_mass(shared.list[i]) : 0ull;
    u64 before = state.ahead_mass + block_scan(mass, shared.partial, total);
    // With top-k and top-p together nothing is ahead of the list.
    const double goal = goal_of(task, task.top_k ? total : state.total);
    Drawer drawer;
    drawer.start(1.0f);
    drawer.raise(LEAST_SUM);
    if (state.ahead) drawer.best = best_pick(args, row);
    for (int i = from; i < to && i < kept; i++) {
        if (task.top_p < 1.0f && (double)before >= goal) break;
        const float y = entry_value(shared.list[i]);
        const uint32_t token = entry_token(shared.list[i]);
        if (!meets_min_p(y, task)) break;
        if (drawer.may_win(y, token, task)) drawer.take(y, token, task);
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
    drawer.raise(LEAST_SUM);
    const auto none = [](int) { return false; };
    const auto may_win = [&](float x, uint32_t token) {
        const float y = shift.of(x);
        return y > -DEPTH && entry_of(y, token) >= least && meets_min_p(y, task) && drawer.may_win(y, token, task);
    };
    for_each_logit(walk, none, may_win, [&](float x, uint32_t token) { drawer.take(shift.of(x), token, task); });
    return block_best(drawer.best, shared.picks);
}

TM_DEVICE uint32_t choose(const SampleArgs &args, uint32_t row, const Task &task, Choose &shared) {
    const RowState &state = args.states[row];
    if (task.flags & SCORE) return task.token;
    if (task.flags & GREEDY) return entry_token(state.best);
    if (!(task.flags & FILTERED)) return block_best(best_pick(args, row), shared.picks).token;
    if (state.expected > LIST) return draw_from_row(args, row, task, shared).token;
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
    const bool unfiltered = (task.flags & FILTERED) && !state.expected && !state.ahead;  // launched without the filters' kernels
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
    // Nobody reads any more what is written here: of it, only `expected` was read, in filtered rows, ahead of the barrier in `block_best`.
    if (threadIdx.x == 0) {
        state.alive = 1, state.token = token, state.raw_max = raw_max;
        state.listed = 0, state.expected = 0;
        // The rank stays 0 until there are log-probabilities.
        result[0] = token, result[1] = 1, result[3] = 0;
        if (!score) args.feedback[row] = token;
    }
}
KERNEL(sample_choose);
