// cp.async and ldmatrix.
#pragma once

namespace emu {

inline void run_copy(const Copy &copy) {
    uint32_t *dst = (uint32_t *)copy.dst;
    const uint32_t *src = (const uint32_t *)copy.src;
    for (unsigned i = 0; i < copy.bytes / 4; i++) dst[i] = 4 * i < copy.source_bytes ? src[i] : 0u;
}
inline void run_oldest_copy(Fiber *f) { run_copy(f->copies[f->first_copy++ % Fiber::MAX_COPIES]); }

// Copies `source_bytes` bytes and writes zeros after them up to `bytes`.
inline void cp_async(void *dst, const void *src, unsigned bytes, unsigned source_bytes) {
    if (((uintptr_t)dst | (source_bytes ? (uintptr_t)src : 0)) & (bytes - 1))
        fail("cp.async of %u bytes from or to a misaligned address (to %p, from %p)", bytes, dst, src);
    smem_offset(dst);
    // The copy may happen at any time from here on: whoever still reads the destination is too late.
    announce_write(dst, bytes);
    Fiber *f = cur;
    const Copy copy{dst, src, bytes, source_bytes, f->copy_groups};
    if (async_now()) return run_copy(copy);
    if (f->end_copy - f->first_copy == Fiber::MAX_COPIES) run_oldest_copy(f);
    f->copies[f->end_copy++ % Fiber::MAX_COPIES] = copy;
}

inline void cp_commit() { cur->copy_groups++; }

// All but the newest `left` groups are complete on return.
inline void cp_wait(unsigned left, const char *file, int line) {
    if (at_site(SiteKind::CopyWait, file, line)) return;
    Fiber *f = cur;
    while (f->first_copy != f->end_copy && f->copies[f->first_copy % Fiber::MAX_COPIES].group + left < f->copy_groups)
        run_oldest_copy(f);
}

// What a lane brings to an ldmatrix: its row, and where the row lies for the count of bank conflicts.
struct MatrixRow {
    uint32_t words[4];
    uintptr_t address;
    int matrices;
};
void check_matrix_row(const void *row, const char *file, int line);

// `matrices` 8x8 matrices of 16-bit elements; lane l brings the address of row l % 8 of matrix l / 8.
inline void ldmatrix(uint32_t *out, int matrices, bool transposed, const void *row, const char *file, int line) {
    check_matrix_row(row, file, line);
    const Fiber *f = cur;
    MatrixRow mine{{0, 0, 0, 0}, (uintptr_t)row, matrices};
    if ((int)f->lane < 8 * matrices)
        for (int i = 0; i < 4; i++) mine.words[i] = ((const uint32_t *)row)[i];
    warp_meet(~0u, LDMATRIX, &mine, sizeof mine, file, line);
    const unsigned group = f->lane >> 2, t = f->lane & 3;
    for (int m = 0; m < matrices; m++) {
        if (!transposed) {
            uint32_t words[4];
            warp_read(8 * m + group, words, 16);
            out[m] = words[t];
        } else {
            uint16_t low[8], high[8];
            warp_read(8 * m + 2 * t, low, 16);
            warp_read(8 * m + 2 * t + 1, high, 16);
            out[m] = low[group] | (uint32_t)high[group] << 16;
        }
    }
}

}  // namespace emu
