// wgmma m64nNk16, bf16 x bf16 + f32, both operands in shared memory (PTX ISA, "Asynchronous warpgroup matrix multiplication").
#include "meeting.h"

namespace emu {

namespace {

// A matrix descriptor, unpacked; offsets in bytes. Both swizzle and strides count 8x8 core matrices.
struct Descriptor {
    uint32_t start, leading, stride;
    unsigned swizzle_bytes, base_offset;
};

Descriptor unpack(uint64_t bits) {
    static constexpr unsigned SWIZZLE[] = {0, 128, 64, 32};
    const auto field = [bits](unsigned shift) { return (uint32_t)(bits >> shift & 0x3fff) << 4; };
    return {field(0), field(16), field(32), SWIZZLE[bits >> 62], (unsigned)(bits >> 49 & 7)};
}

// The shared offset of element (mn, k) of an operand of 2-byte elements.
uint32_t element_offset(const Descriptor &d, bool transposed, unsigned mn, unsigned k) {
    const unsigned width = d.swizzle_bytes;
    uint32_t offset = d.start;
    if (width && !transposed) {
        offset += mn / 8 * d.stride + mn % 8 * width + k * 2;
    } else if (width) {
        const unsigned columns = width / 2;
        offset += mn / columns * d.leading + k / 8 * d.stride + k % 8 * width + mn % columns * 2;
    } else if (!transposed) {
        offset += mn / 8 * d.stride + k / 8 * d.leading + mn % 8 * 16 + k % 8 * 2;
    } else {
        offset += mn / 8 * d.stride + k / 8 * d.leading + k % 8 * 16 + mn % 8 * 2;
    }
    return swizzle(offset, width);
}

float read_element(const Block *block, uint32_t offset) {
    if (offset < RESERVED_BYTES || offset + 2 > RESERVED_BYTES + SHARED_BYTES)
        fail("wgmma reads shared offset %u, which is out of range", offset);
    return bf2f(*(volatile uint16_t *)(block->arena + offset));
}

// The 16 rows of this warp: D(16xN) (+)= A(16x16) * B(16xN). Lane l holds of each group of eight columns the elements of
// rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
void run(const Block *block, unsigned warp, const PendingWgmma &op) {
    const Descriptor a = unpack(op.operands.a), b = unpack(op.operands.b);
    const unsigned columns = (unsigned)op.columns, first_row = warp % 4 * 16;
    float rows[16][16];
    std::vector<float> cols(16 * columns);
    for (unsigned m = 0; m < 16; m++)
        for (unsigned k = 0; k < 16; k++)
            rows[m][k] = read_element(block, element_offset(a, op.operands.a_transposed, first_row + m, k));
    for (unsigned n = 0; n < columns; n++)
        for (unsigned k = 0; k < 16; k++)
            cols[k * columns + n] = read_element(block, element_offset(b, op.operands.b_transposed, n, k));
    for (unsigned m = 0; m < 16; m++)
        for (unsigned n = 0; n < columns; n++) {
            const unsigned lane = m % 8 * 4 + n % 8 / 2;
            volatile float *d = op.d[lane] + n / 8 * 4 + m / 8 * 2 + n % 2;
            float sum = op.operands.accumulate ? *d : 0.f;
            for (unsigned k = 0; k < 16; k++) sum += rows[m][k] * cols[k * columns + n];
            *d = sum;
        }
}

void check_descriptor(uint64_t bits, const char *file, int line) {
    const Descriptor d = unpack(bits);
    // Steps along K move the start by less than the swizzle's width.
    const uint32_t misaligned = d.start & (8 * d.swizzle_bytes - 1) & ~(d.swizzle_bytes - 1);
    if (d.swizzle_bytes && misaligned && !d.base_offset)
        fail("%s:%d: wgmma: the swizzled tile of a descriptor is not %u-byte aligned, and its base offset is 0", file, line,
             8 * d.swizzle_bytes);
}

}  // namespace

void wgmma(int columns, float *d, const WgmmaOperands &operands, const char *file, int line) {
    check_descriptor(operands.a, file, line);
    check_descriptor(operands.b, file, line);
    struct Brought {
        float *d;
        uint64_t a, b;
    } mine{d, operands.a, operands.b};
    const Thread *t = me();
    Block *block = t->block;
    const unsigned warp_index = t->warp;
    meet(~0u, WGMMA, &mine, sizeof mine, file, line, [&](Group &group, unsigned buffer) {
        Quiet quiet;
        Warp &warp = block->warps[warp_index];
        PendingWgmma op{columns, {nullptr}, operands, warp.wgmma_groups};
        for (unsigned lane = 0; lane < LANES; lane++) {
            Brought theirs;
            copy_quietly(&theirs, group.slot[buffer][lane], sizeof theirs);
            if (theirs.a != operands.a || theirs.b != operands.b)
                fail("%s:%d: wgmma: descriptors differ between lanes", file, line);
            op.d[lane] = theirs.d;
        }
        if (async_now() && warp.wgmma.empty())
            run(block, warp_index, op);
        else
            warp.wgmma.push_back(op);
    });
}

void wgmma_commit() {
    const Thread *t = me();
    if (t->lane == 0) t->block->warps[t->warp].wgmma_groups++;
}

void wgmma_wait(unsigned left, const char *file, int line) {
    if (at_site(SiteKind::WgmmaWait, file, line)) return;
    const Thread *t = me();
    Block *block = t->block;
    const unsigned warp_index = t->warp;
    meet(~0u, WGMMA, nullptr, 0, file, line, [&](Group &, unsigned) {
        Quiet quiet;
        Warp &warp = block->warps[warp_index];
        size_t done = 0;
        while (done < warp.wgmma.size() && warp.wgmma[done].group + left < warp.wgmma_groups)
            run(block, warp_index, warp.wgmma[done++]);
        warp.wgmma.erase(warp.wgmma.begin(), warp.wgmma.begin() + done);
    });
}

}  // namespace emu
