// Warp collectives.
#include "meeting.h"

namespace emu {

void warp_meet(uint32_t mask, int op, const void *value, unsigned bytes, const char *file, int line) {
    if (bytes > SLOT_BYTES) fail("%s:%d: a lane brings %u bytes to a meeting, at most %u", file, line, bytes, SLOT_BYTES);
    meet(mask, op, value, bytes, file, line, [op](Group &group, unsigned buffer) {
        if (op == LDMATRIX) count_matrix_rows(group, buffer);
    });
}

void warp_read(unsigned lane, void *out, unsigned bytes) {
    const Thread *t = me();
    const Group *group = t->met;
    if (lane >= LANES || !(group->present[t->met_buffer] >> lane & 1)) return fill_quietly(out, 0xff, bytes);
    copy_quietly(out, group->slot[t->met_buffer][lane], bytes);
}

uint32_t warp_present() {
    const Thread *t = me();
    return t->met->present[t->met_buffer];
}

void sync_warp(uint32_t mask, const char *file, int line) {
    if (at_site(SiteKind::SyncWarp, file, line)) return;
    meet(mask, SYNCWARP, nullptr, 0, file, line, [](Group &, unsigned) {});
}

// ---- Reductions

static void butterfly(Group &group, unsigned buffer, bool max) {
    float now[LANES], next[LANES];
    for (unsigned lane = 0; lane < LANES; lane++) now[lane] = *(float *)group.slot[buffer][lane];
    for (unsigned offset = 16; offset; offset >>= 1) {
        for (unsigned lane = 0; lane < LANES; lane++) {
            const float a = now[lane], b = now[lane ^ offset];
            next[lane] = max ? larger(a, b) : a + b;
        }
        memcpy(now, next, sizeof now);
    }
    for (unsigned lane = 0; lane < LANES; lane++) *(float *)group.slot[buffer][lane] = now[lane];
}

float warp_butterfly(float value, bool max, const char *file, int line) {
    meet(~0u, REDUCE, &value, 4, file, line, [max](Group &group, unsigned buffer) {
        if (group.mask != ~0u) fail("a reduction over a full warp, in a warp of fewer threads");
        butterfly(group, buffer, max);
    });
    float result;
    warp_read(me()->lane, &result, 4);
    return result;
}

// ---- mma.sync m16n8k16

namespace {

// What a lane brings; see primitives.cuh for which elements these are.
struct Fragments {
    uint32_t a[4], b[2];
    float d[4];
};

float widen(uint16_t bits, int kind) {
    if (kind == 0) return bf2f(bits);
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
}

// D(16x8) += A(16x16) * B(16x8), in the order of k.
__attribute__((noinline)) void multiply_fragments(Group &group, unsigned buffer, int kind) {
    alignas(64) float a[16][16], b[16][8], d[16][8];
    for (unsigned lane = 0; lane < LANES; lane++) {
        const Fragments *f = (const Fragments *)group.slot[buffer][lane];
        const unsigned row = lane >> 2, pair = (lane & 3) * 2;
        for (unsigned i = 0; i < 4; i++) {
            const unsigned m = row + (i & 1 ? 8 : 0), k = pair + (i & 2 ? 8 : 0);
            a[m][k] = widen(f->a[i] & 0xffff, kind);
            a[m][k + 1] = widen(f->a[i] >> 16, kind);
        }
        for (unsigned i = 0; i < 2; i++) {
            b[pair + 8 * i][row] = widen(f->b[i] & 0xffff, kind);
            b[pair + 8 * i + 1][row] = widen(f->b[i] >> 16, kind);
        }
        for (unsigned i = 0; i < 4; i++) d[row + 8 * (i >> 1)][pair + (i & 1)] = f->d[i];
    }
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 8; n++) d[m][n] += a[m][k] * b[k][n];
    for (unsigned lane = 0; lane < LANES; lane++) {
        Fragments *f = (Fragments *)group.slot[buffer][lane];
        const unsigned row = lane >> 2, pair = (lane & 3) * 2;
        for (unsigned i = 0; i < 4; i++) f->d[i] = d[row + 8 * (i >> 1)][pair + (i & 1)];
    }
}

}  // namespace

void warp_mma(uint32_t mask, int kind, float *d, const uint32_t *a, const uint32_t *b, const char *file, int line) {
    static_assert(sizeof(Fragments) <= SLOT_BYTES);
    Fragments mine;
    copy_quietly(mine.a, a, sizeof mine.a);
    copy_quietly(mine.b, b, sizeof mine.b);
    copy_quietly(mine.d, d, sizeof mine.d);
    meet(mask, MMA, &mine, sizeof mine, file, line, [kind](Group &group, unsigned buffer) {
        if (group.mask != ~0u) fail("a matrix product of a warp of fewer threads");
        multiply_fragments(group, buffer, kind);
    });
    const Thread *t = me();
    copy_quietly(d, ((const Fragments *)t->met->slot[t->met_buffer][t->lane])->d, sizeof mine.d);
}

}  // namespace emu
