// Which thread runs next, and how a worker takes blocks from the grid.
#include "scheduler.h"
#include <cstdarg>
#include <cstdlib>

namespace emu {

// ---- Choice

// The next bit of a non-empty mask in the order of the schedule, cyclic from `from`.
static unsigned pick_bit(Worker *w, uint32_t mask, unsigned from) {
    switch (w->launch->config.order) {
    case 0: {
        const uint32_t upwards = mask & (~0u << from);
        return __builtin_ctz(upwards ? upwards : mask);
    }
    case 1: {
        const uint32_t downwards = mask & (from >= 31 ? ~0u : (2u << from) - 1);
        return 31 - __builtin_clz(downwards ? downwards : mask);
    }
    default: {
        unsigned skip = random_number(w) % __builtin_popcount(mask);
        while (skip--) mask &= mask - 1;
        return __builtin_ctz(mask);
    }
    }
}

static unsigned pick_warp(Worker *w, const Block *block, const Thread *now) {
    const uint32_t mask = block->runnable_warps;
    if (w->launch->config.order == 3) {
        unsigned best = __builtin_ctz(mask);
        for (uint32_t rest = mask & (mask - 1); rest; rest &= rest - 1) {
            const unsigned warp = __builtin_ctz(rest);
            if (block->warps[warp].priority > block->warps[best].priority) best = warp;
        }
        return best;
    }
    const bool same_block = now && now->block == block;
    // Without randomness a warp goes on for as long as it can, which saves cache misses.
    if (!is_random(w) && same_block && (mask >> now->warp & 1)) return now->warp;
    return pick_bit(w, mask, same_block ? now->warp : 0);
}

static std::string waiting_report(Worker *w);

Thread *pick(Worker *w) {
    const Thread *now = me();
    for (;;) {
        unsigned first = now ? now->block->index : 0;
        if (is_random(w) && w->resident > 1) first = random_number(w) % w->resident;
        for (unsigned n = 0; n < w->resident; n++) {
            Block *block = w->blocks[(first + n) % w->resident];
            if (!block->runnable_warps) continue;
            const unsigned warp = pick_warp(w, block, now);
            return &block->threads[warp * LANES + pick_bit(w, block->warps[warp].runnable, now ? now->lane : 0)];
        }
        if (w->launch->failed) return nullptr;
        if (run_pending_tma(w)) continue;
        bool all_done = true;
        for (unsigned i = 0; i < w->resident; i++) all_done &= w->blocks[i]->num_done == w->blocks[i]->num_threads;
        if (!all_done) w->launch->set_error("deadlock: no thread can run\n" + waiting_report(w));
        return nullptr;
    }
}

void reschedule() {
    Thread *next = pick(worker);
    if (next != me()) switch_to(next, next == nullptr);
}

void block_on(Wait wait, uint64_t wait_for, uint32_t mask, const char *file, int line) {
    Thread *t = me();
    t->wait = wait;
    t->wait_for = wait_for;
    t->wait_mask = mask;
    t->wait_file = file;
    t->wait_line = line;
    clear_runnable(t);
    reschedule();
    t->wait = Wait::None;
}

void maybe_yield() {
    if (is_random(worker) && (random_number(worker) & 7) == 0) reschedule();
}

bool async_now() {
    const int when = worker->launch->config.asynchronous;
    return when == 0 || (when == 2 && (random_number(worker) & 1));
}

// ---- Errors

void Launch::set_error(const std::string &text, uintptr_t code, uintptr_t other_code) {
    std::lock_guard<std::mutex> guard(mutex);
    if (error.empty()) {
        error = text;
        error_code[0] = code;
        error_code[1] = other_code;
    }
    failed = true;
}

void fail(const char *format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    const Thread *t = me();
    if (!t) {
        fprintf(stderr, "emulator: %s\n", text);
        abort();
    }
    const dim3 b = t->block_index;
    const uint3 i = t->thread_index;
    char where[160];
    snprintf(where, sizeof where, "block (%u,%u,%u), thread (%u,%u,%u): ", b.x, b.y, b.z, i.x, i.y, i.z);
    worker->launch->set_error(std::string("kernel ") + worker->launch->kernel->name + ", " + where + text);
    switch_to(nullptr, true);
    abort();  // nobody switches back
}

static std::string what_it_waits_for(const Thread *t) {
    static const char *const OPS[] = {"?",     "shuffle", "vote", "reduction", "__syncwarp",
                                      "match", "ldmatrix", "mma",  "elect",     "wgmma"};
    char text[160] = "?";
    switch (t->wait) {
    case Wait::Warp:
        snprintf(text, sizeof text, "%s of warp %u, mask %08x, arrived %08x", OPS[t->met->op], t->warp, t->wait_mask,
                 t->met->arrived);
        break;
    case Wait::Barrier: {
        const Barrier &barrier = t->block->barriers[t->wait_for];
        const char *name = t->wait_for ? "named barrier" : "__syncthreads";
        snprintf(text, sizeof text, "%s (%u of %u arrived)", name, barrier.arrived, barrier.count);
        break;
    }
    case Wait::Cluster: snprintf(text, sizeof text, "the cluster's barrier"); break;
    case Wait::Mbarrier:
        snprintf(text, sizeof text, "mbarrier at shared offset %u, parity %u", (unsigned)(t->wait_for >> 1),
                 (unsigned)(t->wait_for & 1));
        break;
    case Wait::None: break;
    }
    return text;
}

// Who waits where, one line per place.
static std::string waiting_report(Worker *w) {
    constexpr size_t MOST_LINES = 10;
    std::string report;
    char text[400];
    for (unsigned i = 0; i < w->resident; i++) {
        const Block *block = w->blocks[i];
        std::map<std::string, std::pair<unsigned, const Thread *>> places;
        for (unsigned n = 0; n < block->num_threads; n++) {
            const Thread *t = &block->threads[n];
            if (t->done) continue;
            const std::string place = t->wait_file ? t->wait_file : "?";
            auto &entry = places[place + ":" + std::to_string(t->wait_line) + " in " + what_it_waits_for(t)];
            if (!entry.first++) entry.second = t;
        }
        const dim3 b = block->threads[0].block_index;
        snprintf(text, sizeof text, "  block (%u,%u,%u): %u of %u threads returned\n", b.x, b.y, b.z, block->num_done,
                 block->num_threads);
        report += text;
        size_t lines = 0;
        for (const auto &[place, entry] : places) {
            if (lines++ == MOST_LINES) break;
            const uint3 t = entry.second->thread_index;
            snprintf(text, sizeof text, "  %u thread(s), first (%u,%u,%u), wait at %s\n", entry.first, t.x, t.y, t.z,
                     place.c_str());
            report += text;
        }
    }
    return report;
}

// ---- Blocks

static void prepare_thread(Block *block, unsigned rank, dim3 block_index) {
    const Launch *launch = block->worker->launch;
    const dim3 size = launch->block;
    Thread *t = &block->threads[rank];
    t->thread_index = {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
    t->lane = rank % LANES;
    t->warp = rank / LANES;
    t->rank = rank;
    t->block = block;
    t->block_index = block_index;
    t->block_size = size;
    t->grid_size = launch->grid;
    t->arena = block->arena;
    t->first_copy = t->end_copy = t->copy_groups = 0;
    t->met = nullptr;
    t->wait = Wait::None;
    t->wait_file = nullptr;
    t->done = false;
    prepare_fiber(t);
    block->warps[t->warp].exist |= 1u << t->lane;
}

static void prepare_block(Worker *w, Block *block, unsigned index, unsigned linear) {
    const Launch *launch = w->launch;
    block->worker = w;
    block->index = index;
    block->num_threads = launch->block.x * launch->block.y * launch->block.z;
    block->num_warps = (block->num_threads + LANES - 1) / LANES;
    block->num_done = 0;
    block->runnable_warps = 0;
    if (!block->threads) block->threads = (Thread *)calloc(MAX_THREADS, sizeof(Thread));
    prepare_shared(block);
    for (auto &barrier : block->barriers) barrier = Barrier{};
    for (unsigned i = 0; i < block->num_warps; i++) {
        Warp &warp = block->warps[i];
        warp.exist = warp.runnable = warp.done = 0;
        warp.num_groups = 0;
        warp.wgmma.clear();
        warp.wgmma_groups = 0;
        warp.accesses.clear();
        warp.priority = (unsigned)(random_number(w) >> 32);
    }
    const dim3 grid = launch->grid;
    const dim3 block_index(linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y);
    for (unsigned rank = 0; rank < block->num_threads; rank++) prepare_thread(block, rank, block_index);
    for (unsigned i = 0; i < block->num_warps; i++) set_runnable(block, i, block->warps[i].exist);
    races_begin_block(block);
}

static void finish_block(Worker *w, Block *block) {
    sync_acquire(&block->end);
    for (unsigned i = 0; i < block->num_warps; i++) flush_accesses(w, block->warps[i]);
    if (!w->launch->failed) check_shared_ends(block);
    __asan_unpoison_memory_region(block->arena, ARENA_BYTES);
}

// What the worker has counted and met becomes the launch's.
static void hand_in(Worker *w) {
    Launch *launch = w->launch;
    std::lock_guard<std::mutex> guard(launch->mutex);
    emu_stats &total = launch->stats;
    total.switches += w->stats.switches;
    total.collectives += w->stats.collectives;
    total.barriers += w->stats.barriers;
    total.ldmatrix_phases += w->stats.ldmatrix_phases;
    total.ldmatrix_conflicts += w->stats.ldmatrix_conflicts;
    total.shared_phases += w->stats.shared_phases;
    total.shared_conflicts += w->stats.shared_conflicts;
    launch->sites.insert(launch->sites.end(), w->sites.begin(), w->sites.end());
}

void run_blocks(Worker *w) {
    Launch *launch = w->launch;
    worker = w;
    cur = nullptr;
    w->stats = {};
    w->sites.clear();
    w->main_stack = nullptr;
    if (__tsan_get_current_fiber) w->main_tsan_fiber = __tsan_get_current_fiber();
    w->resident = launch->cluster;
    while (w->blocks.size() < w->resident) w->blocks.push_back(new Block());
    while (!launch->failed) {
        const unsigned first = launch->next_block.fetch_add(w->resident);
        if (first >= launch->num_blocks) break;
        w->tma.clear();
        w->cluster_arrived = 0;
        // Depends on the block, not on which worker runs it.
        w->random_state = launch->config.seed * 0x9e3779b97f4a7c15ull + first * 2654435761ull + 88172645463325252ull;
        for (unsigned i = 0; i < w->resident; i++) prepare_block(w, w->blocks[i], i, first + i);
        for (unsigned i = 0; i < w->resident; i++) sync_release(&w->blocks[i]->start);
        switch_to(pick(w));
        for (unsigned i = 0; i < w->resident; i++) finish_block(w, w->blocks[i]);
    }
    hand_in(w);
}

}  // namespace emu
