// What the memory of the machine gives at best: the two bounds that measured kernels are compared with.
//
//   probe_read: reads `count` 16-byte words once; sums[warp] = exclusive or of all 32-bit words that this warp read
//   probe_copy: dst[i] = src[i] for `count` 16-byte words
//
// data, src, dst 16-byte aligned, dst and src apart; sums [8 * grid] u32, one per warp, so that no read can be left out.
// Grid any, block 256. A block takes every grid-th tile of 1024 words, 4 per thread, all four loads in flight at once.
#include "primitives.cuh"

using namespace tidemill;

static constexpr int THREADS = 256;
static constexpr int DEPTH = 4;
static constexpr uint64_t TILE = THREADS * DEPTH;

// The words i, i + 256, ... of this thread in the tile that begins at `tile`; past the end: zeros.
TM_DEVICE void load_tile(uint4 (&v)[DEPTH], const uint4 *data, uint64_t tile, uint64_t count) {
    TM_UNROLL
    for (int j = 0; j < DEPTH; j++) {
        const uint64_t i = tile + j * THREADS + threadIdx.x;
        v[j] = i < count ? load_streaming16(data + i) : make_uint4(0, 0, 0, 0);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) probe_read(uint32_t *sums, const uint4 *data, uint64_t count) {
    uint32_t sum = 0;
    for (uint64_t tile = blockIdx.x * TILE; tile < count; tile += gridDim.x * TILE) {
        uint4 v[DEPTH];
        load_tile(v, data, tile, count);
        TM_UNROLL
        for (int j = 0; j < DEPTH; j++) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    sum = __reduce_xor_sync(0xffffffffu, sum);
    const uint32_t warp = blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5);
    if ((threadIdx.x & 31) == 0) sums[warp] = sum;
}
KERNEL(probe_read);

extern "C" __global__ void __launch_bounds__(THREADS) probe_copy(uint4 *dst, const uint4 *src, uint64_t count) {
    for (uint64_t tile = blockIdx.x * TILE; tile < count; tile += gridDim.x * TILE) {
        uint4 v[DEPTH];
        load_tile(v, src, tile, count);
        TM_UNROLL
        for (int j = 0; j < DEPTH; j++) {
            const uint64_t i = tile + j * THREADS + threadIdx.x;
            if (i < count) dst[i] = v[j];
        }
    }
}
KERNEL(probe_copy);
