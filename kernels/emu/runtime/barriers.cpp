// Barriers of a block and of a cluster, and the places that a test can turn off.
#include "scheduler.h"

namespace emu {

bool at_site(SiteKind kind, const char *file, int line) {
    Worker *w = worker;
    for (const Site &site : w->sites)
        if (site.line == line && site.kind == kind && site.file == file) return site.skip;
    Quiet quiet;
    const emu_config &config = w->launch->config;
    const bool skip = config.skip_file && config.skip_line == line && config.skip_kind == (int)kind &&
                      !strcmp(config.skip_file, file);
    w->sites.push_back({kind, file, line, skip});
    return skip;
}

static void check_arrival(const Block *block, const Barrier &barrier, int id, unsigned count, unsigned need,
                          const char *file, int line) {
    if (!count && block->num_done)
        fail("%s:%d: __syncthreads, but %u thread(s) of the block have already returned", file, line, block->num_done);
    if (!barrier.arrived) return;
    if (barrier.count != need)
        fail("%s:%d: barrier %d used with %u threads, others came with %u", file, line, id, need, barrier.count);
    if (!count && (barrier.line != line || strcmp(barrier.file, file)))
        fail("divergent __syncthreads: this thread is at %s:%d, %u other(s) are at %s:%d", file, line, barrier.arrived,
             barrier.file, barrier.line);
}

void block_barrier(int id, unsigned count, bool wait, const char *file, int line) {
    if (at_site(count ? SiteKind::NamedBarrier : SiteKind::SyncThreads, file, line)) return;
    if (id < 0 || id > 15) fail("%s:%d: barrier %d, there are 16", file, line, id);
    Thread *t = me();
    Block *block = t->block;
    Barrier &barrier = block->barriers[id];
    const unsigned need = count ? count : block->num_threads;
    worker->stats.barriers++;
    check_arrival(block, barrier, id, count, need, file, line);
    barrier.count = need;
    barrier.file = file;
    barrier.line = line;
    barrier.arrived++;
    // A barrier of the whole block needs no edges for the built-in race check, which has a cheaper way: races_order_all.
    const bool whole = need == block->num_threads && wait;
    const bool edges = !whole || __tsan_release;
    char *order = &barrier.order[barrier.epoch & 1];
    if (edges) sync_release(order);
    if (barrier.arrived == need) {
        for (unsigned i = 0; i < block->num_warps; i++) {
            if (whole) flush_accesses(worker, block->warps[i]);
            if (barrier.waiting[i]) set_runnable(block, i, barrier.waiting[i]);
            barrier.waiting[i] = 0;
        }
        barrier.arrived = 0;
        barrier.epoch++;
        if (whole) races_order_all(block);
        if (worker->launch->config.order >= 2) reschedule();
    } else if (wait) {
        barrier.waiting[t->warp] |= 1u << t->lane;
        block_on(Wait::Barrier, id, 0, file, line);
    }
    if (wait && edges) sync_acquire(order);
}

void grid_barrier(const char *file, int line) {
    if (at_site(SiteKind::ClusterSync, file, line)) return;
    Worker *w = worker;
    unsigned total = 0;
    for (unsigned i = 0; i < w->resident; i++) total += w->blocks[i]->num_threads;
    sync_release(&w->cluster_order);
    if (++w->cluster_arrived < total) {
        block_on(Wait::Cluster, 0, 0, file, line);
    } else {
        w->cluster_arrived = 0;
        for (unsigned i = 0; i < w->resident; i++)
            for (unsigned n = 0; n < w->blocks[i]->num_threads; n++) {
                const Thread *t = &w->blocks[i]->threads[n];
                if (t->wait == Wait::Cluster) set_runnable(t->block, t->warp, 1u << t->lane);
            }
    }
    sync_acquire(&w->cluster_order);
}

}  // namespace emu

void __threadfence() {
    static char fences;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    emu::sync_release(&fences);
    emu::sync_acquire(&fences);
}
