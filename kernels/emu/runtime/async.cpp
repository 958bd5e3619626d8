// mbarrier and TMA.
#include "scheduler.h"

namespace emu {

// ---- mbarrier

namespace {

// The word in shared memory: [0] phase, [1..20] arrivals pending, [21..40] arrivals per phase, [41..61] bytes still expected
// (signed), [62..63] a mark.
struct Mbarrier {
    unsigned phase, pending, expected;
    int bytes;
};
constexpr uint64_t MARK = 2;

Mbarrier load(void *address) {
    const uint64_t word = *(volatile uint64_t *)address;
    if (word >> 62 != MARK)
        fail("mbarrier at shared offset %u used before mbarrier.init, or overwritten", smem_offset(address));
    const int bytes = (int)((int64_t)(word << 2) >> 43);
    return {(unsigned)(word & 1), (unsigned)(word >> 1 & 0xfffff), (unsigned)(word >> 21 & 0xfffff), bytes};
}

void store(void *address, Mbarrier m) {
    *(volatile uint64_t *)address = m.phase | (uint64_t)m.pending << 1 | (uint64_t)m.expected << 21 |
                                    ((uint64_t)m.bytes & 0x1fffff) << 41 | MARK << 62;
}

void wake_waiting(const void *address) {
    const Worker *w = worker;
    for (unsigned i = 0; i < w->resident; i++)
        for (unsigned n = 0; n < w->blocks[i]->num_threads; n++) {
            const Thread *t = &w->blocks[i]->threads[n];
            if (t->wait == Wait::Mbarrier && t->arena + (t->wait_for >> 1) == address)
                set_runnable(t->block, t->warp, 1u << t->lane);
        }
}

// Goes on to the next phase when all arrivals and bytes of this one are there.
void update(void *address, Mbarrier m) {
    if (m.pending == 0 && m.bytes == 0) {
        m.phase ^= 1;
        m.pending = m.expected;
        wake_waiting(address);
    }
    store(address, m);
}

}  // namespace

void mbar_init(void *barrier, unsigned count) {
    if ((uintptr_t)barrier & 7) fail("an mbarrier is not 8-byte aligned");
    smem_offset(barrier);
    store(barrier, {0, count, count, 0});
}

void mbar_inval(void *barrier) {
    load(barrier);
    *(volatile uint64_t *)barrier = ~0ull;
}

void mbar_arrive(void *barrier, unsigned arrivals, int bytes) {
    sync_release(barrier);
    Mbarrier m = load(barrier);
    m.bytes += bytes;
    if (arrivals > m.pending)
        fail("mbarrier at shared offset %u: more arrivals than its count %u in one phase", smem_offset(barrier), m.expected);
    m.pending -= arrivals;
    update(barrier, m);
    maybe_yield();
}

void mbar_complete_tx(void *barrier, int bytes) {
    sync_release(barrier);
    Mbarrier m = load(barrier);
    m.bytes -= bytes;
    update(barrier, m);
}

bool mbar_test(void *barrier, unsigned parity) {
    const bool passed = load(barrier).phase != (parity & 1);
    if (passed) sync_acquire(barrier);
    return passed;
}

void mbar_wait(void *barrier, unsigned parity, const char *file, int line) {
    if (at_site(SiteKind::MbarrierWait, file, line)) return;
    const uint64_t what = (uint64_t)smem_offset(barrier) << 1 | (parity & 1);
    while (load(barrier).phase == (parity & 1)) block_on(Wait::Mbarrier, what, 0, file, line);
    sync_acquire(barrier);
}

// ---- TMA

namespace {

constexpr uint64_t MAP_MAGIC = 0x746d61456d75ull;

// Copies one row of the box; `inside`: its outer coordinates lie in the tensor. What lies outside becomes zero.
void copy_row(const PendingTma &load, const unsigned char *row, uint32_t offset, bool inside) {
    const TensorMap &map = load.map;
    unsigned char *arena = load.block->arena;
    for (unsigned i = 0; i < map.box[0]; i++) {
        const int64_t x = (int64_t)load.coordinate[0] + i;
        const bool valid = inside && x >= 0 && (uint64_t)x < map.extent[0];
        for (unsigned b = 0; b < map.element_bytes; b++, offset++)
            arena[swizzle(offset, map.swizzle_bytes)] = valid ? row[x * map.element_bytes + b] : 0;
    }
}

void run(const PendingTma &load) {
    const TensorMap &map = load.map;
    uint32_t offset = (uint32_t)((unsigned char *)load.dst - load.block->arena);
    const uint32_t start = offset;
    unsigned index[5] = {0};
    for (bool more = true; more;) {
        bool inside = true;
        const unsigned char *row = map.base;
        for (int d = 1; d < load.rank; d++) {
            const int64_t c = (int64_t)load.coordinate[d] + index[d];
            inside &= c >= 0 && (uint64_t)c < map.extent[d];
            row += c * (int64_t)map.stride[d];
        }
        copy_row(load, row, offset, inside);
        offset += map.box[0] * map.element_bytes;
        // The next row, as an odometer counts.
        more = false;
        for (int d = 1; d < load.rank && !more; d++) {
            more = ++index[d] < map.box[d];
            if (!more) index[d] = 0;
        }
    }
    mbar_complete_tx(load.barrier, (int)(offset - start));
}

}  // namespace

uint32_t swizzle(uint32_t offset, unsigned bytes) {
    if (!bytes) return offset;
    const uint32_t rows = bytes / 16 - 1;  // 7, 3 or 1: the bits of the row that are mixed into the 16-byte column
    return offset ^ (offset >> 7 & rows) << 4;
}

bool run_pending_tma(Worker *w) {
    if (w->tma.empty()) return false;
    Quiet quiet;
    const size_t n = is_random(w) ? random_number(w) % w->tma.size() : 0;
    const PendingTma load = w->tma[n];
    w->tma.erase(w->tma.begin() + n);
    run(load);
    return true;
}

void tma_load(void *dst, const void *map, void *barrier, const int *coordinate, int rank) {
    const TensorMap &m = *(const TensorMap *)map;
    const unsigned offset = smem_offset(dst);
    if (m.magic != MAP_MAGIC) fail("TMA: not a tensor map made by emu_tensor_map");
    if (m.rank != rank) fail("TMA: rank %d, the tensor map has %d", rank, m.rank);
    if (offset & 127) fail("TMA: the destination is not 128-byte aligned");
    if (m.swizzle_bytes && m.box[0] * m.element_bytes > m.swizzle_bytes) fail("TMA: a box row is wider than the swizzle");
    if (m.swizzle_bytes && offset & (8 * m.swizzle_bytes - 1))
        fail("TMA: a %d-byte swizzle needs a %d-byte aligned tile, the shared offset is %u", m.swizzle_bytes,
             8 * m.swizzle_bytes, offset);
    Quiet quiet;
    PendingTma load{dst, barrier, m, {0}, rank, me()->block};
    for (int i = 0; i < rank; i++) load.coordinate[i] = coordinate[i];
    if (async_now())
        run(load);
    else
        worker->tma.push_back(load);
}

// ---- Clusters

unsigned cluster_rank() { return me()->block->index; }
unsigned cluster_size() { return worker->resident; }
void *cluster_map(void *address, unsigned rank) {
    if (rank >= worker->resident) fail("block %u of a cluster of %u", rank, worker->resident);
    return worker->blocks[rank]->arena + smem_offset(address);
}

}  // namespace emu

int emu_tensor_map(void *map128, const emu_tensor *t) {
    if (t->rank < 1 || t->rank > 5 || (uintptr_t)t->base % 16 || t->box[0] * t->element_bytes % 16) return 1;
    emu::TensorMap map{};
    map.magic = emu::MAP_MAGIC;
    map.base = (const unsigned char *)t->base;
    map.rank = (uint8_t)t->rank;
    map.element_bytes = (uint8_t)t->element_bytes;
    map.swizzle_bytes = (uint8_t)t->swizzle_bytes;
    for (unsigned i = 0; i < t->rank; i++) {
        if (t->box[i] == 0 || t->box[i] > 256 || (i && t->stride_bytes[i - 1] % 16)) return 1;
        map.extent[i] = t->extent[i];
        map.box[i] = (uint16_t)t->box[i];
        if (i) map.stride[i] = t->stride_bytes[i - 1];
    }
    memcpy(map128, &map, sizeof map);
    return 0;
}
