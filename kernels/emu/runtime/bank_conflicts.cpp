// Bank conflicts in shared memory: 32 banks of 4 bytes, one pass moves at most 128 bytes, and lanes that want different words of
// one bank need a pass each (CUDA C++ Programming Guide, "Shared Memory" of the compute capabilities).
#include "scheduler.h"

namespace emu {

// Passes beyond the first that a phase of `count` accesses of `bytes` bytes needs.
static unsigned extra_passes(const uint32_t *offsets, unsigned count, unsigned bytes) {
    const unsigned banks = 128 / bytes;
    uint32_t words[LANES][LANES];
    unsigned distinct[LANES] = {0}, most = 1;
    for (unsigned n = 0; n < count; n++) {
        const uint32_t word = offsets[n] / bytes;
        const unsigned bank = word % banks;
        unsigned known = 0;
        while (known < distinct[bank] && words[bank][known] != word) known++;
        if (known < distinct[bank]) continue;  // the same word reaches several lanes in one pass
        words[bank][distinct[bank]++] = word;
        if (distinct[bank] > most) most = distinct[bank];
    }
    return most - 1;
}

// ldmatrix: one phase per matrix of eight rows.
void count_matrix_rows(const Group &group, unsigned buffer) {
    const int matrices = ((const MatrixRow *)group.slot[buffer][0])->matrices;
    for (int m = 0; m < matrices; m++) {
        uint32_t offsets[8];
        for (int row = 0; row < 8; row++)
            offsets[row] = (uint32_t)((const MatrixRow *)group.slot[buffer][m * 8 + row])->address;
        worker->stats.ldmatrix_phases++;
        worker->stats.ldmatrix_conflicts += extra_passes(offsets, 8, 16);
    }
}

void check_matrix_row(const void *row, const char *file, int line) {
    if ((uintptr_t)row & 15) fail("%s:%d: the address of an ldmatrix row is not 16-byte aligned", file, line);
    smem_offset(row);
}

static void count_access(Worker *w, const WarpAccess &access) {
    const unsigned phase_lanes = 128 / access.bytes;
    for (unsigned first = 0; first < LANES; first += phase_lanes) {
        uint32_t offsets[LANES];
        unsigned count = 0;
        for (unsigned lane = first; lane < first + phase_lanes; lane++)
            if (access.lanes >> lane & 1) offsets[count++] = access.offset[lane];
        if (!count) continue;
        w->stats.shared_phases++;
        w->stats.shared_conflicts += extra_passes(offsets, count, access.bytes);
    }
}

void flush_accesses(Worker *w, Warp &warp) {
    for (AccessSite &site : warp.accesses) {
        for (const WarpAccess &access : site.open)
            if (access.lanes) count_access(w, access);
        site.open.clear();
        memset(site.made, 0, sizeof site.made);
    }
}

static AccessSite &access_site(Warp &warp, unsigned bytes, const char *file, int line) {
    for (AccessSite &site : warp.accesses)
        if (site.line == line && site.file == file && site.bytes == bytes) return site;
    warp.accesses.push_back(AccessSite{file, line, bytes, {0}, {}});
    return warp.accesses.back();
}

void shared_access(const void *address, unsigned bytes, const char *file, int line) {
    if ((uintptr_t)address & (bytes - 1))
        fail("%s:%d: %u-byte access to shared memory at a misaligned address", file, line, bytes);
    const uint32_t offset = smem_offset(address);
    Quiet quiet;
    const Thread *t = me();
    AccessSite &site = access_site(t->block->warps[t->warp], bytes, file, line);
    const unsigned nth = site.made[t->lane]++;
    if (nth >= site.open.size()) site.open.resize(nth + 1);
    WarpAccess &access = site.open[nth];
    access.bytes = bytes;
    access.offset[t->lane] = offset;
    access.lanes |= 1u << t->lane;
    if (access.lanes != ~0u) return;
    count_access(worker, access);
    access.lanes = 0;
}

}  // namespace emu
