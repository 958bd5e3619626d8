// A matrix product with TMA, mbarriers and wgmma, right and with one fault; and a cluster that reads its neighbour's memory.
#include "fault.cuh"

static constexpr int STAGES = 4, TILE = 64 * 64;

enum Fault { NONE, TILE_NOT_ALIGNED, WRONG_ARRIVALS, NO_WAIT_FOR_EMPTY, WRONG_BYTES, NO_WGMMA_WAIT };

// An operand of rows of 64 bf16 in 128-byte swizzle; groups of eight rows are 1024 bytes apart.
TM_DEVICE uint64_t descriptor(const void *tile) {
    return (uint64_t)((shared_address(tile) & 0x3ffff) >> 4) | 1ull << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}

TM_DEVICE void multiply(float *d, const bf16 *a, const bf16 *b TM_PLACE) {
    for (int k = 0; k < 4; k++) {
        const emu::WgmmaOperands operands{descriptor(a) + 2 * k, descriptor(b) + 2 * k, true, false, false};
        emu::wgmma(64, d, operands, file, line);
    }
    emu::wgmma_commit();
}

// C[M, N] f32 = A[M, K] * B[N, K]^T, bf16. Block 160: a warpgroup that multiplies 64x64 tiles and a warp that loads them.
template <Fault BUG>
TM_DEVICE void gemm(const emu::TensorMap &map_a, const emu::TensorMap &map_b, float *c, int m, int n, int k) {
    DYN_SHARED(unsigned char, raw);
    SHARED(uint64_t, full, [STAGES]);
    SHARED(uint64_t, empty, [STAGES]);
    const uint32_t pad = BUG == TILE_NOT_ALIGNED ? 0 : (1024 - (shared_address(raw) & 1023)) & 1023;
    bf16 *a = (bf16 *)(raw + pad), *b = a + STAGES * TILE;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int row0 = blockIdx.y * 64, column0 = blockIdx.x * 64, steps = (k + 63) / 64;
    if (tid == 0)
        for (int s = 0; s < STAGES; s++) {
            emu::mbar_init(&full[s], 1);
            emu::mbar_init(&empty[s], BUG == WRONG_ARRIVALS ? 2 : 1);
        }
    __syncthreads();
    if (warp == 4) {
        for (int i = 0; lane == 0 && i < steps; i++) {
            const int s = i % STAGES, parity = (i / STAGES) & 1;
            if (BUG != NO_WAIT_FOR_EMPTY) emu::mbar_wait(&empty[s], parity ^ 1, __FILE__, __LINE__);
            emu::mbar_arrive(&full[s], 1, (BUG == WRONG_BYTES ? 1 : 2) * TILE * 2);
            const int at_a[2] = {i * 64, row0}, at_b[2] = {i * 64, column0};
            emu::tma_load(a + s * TILE, &map_a, &full[s], at_a, 2);
            emu::tma_load(b + s * TILE, &map_b, &full[s], at_b, 2);
        }
        return;
    }
    float d[32];
    for (int i = 0; i < 32; i++) d[i] = 0.0f;
    for (int i = 0; i < steps; i++) {
        const int s = i % STAGES, parity = (i / STAGES) & 1;
        emu::mbar_wait(&full[s], parity, __FILE__, __LINE__);
        multiply(d, a + s * TILE, b + s * TILE);
        if (BUG != NO_WGMMA_WAIT) emu::wgmma_wait(0, __FILE__, __LINE__);
        named_barrier(1, 128);
        if (tid == 0) emu::mbar_arrive(&empty[s], 1, 0);
    }
    for (int i = 0; i < 32; i++) {
        const int row = row0 + warp * 16 + lane / 4 + i / 2 % 2 * 8, column = column0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (row < m && column < n) c[(size_t)row * n + column] = d[i];
    }
    if (BUG == NO_WGMMA_WAIT) emu::wgmma_wait(0, __FILE__, __LINE__);
}

#define GEMM(NAME, BUG)                                                                                               \
    extern "C" __global__ void NAME(const __grid_constant__ emu::TensorMap a, const __grid_constant__ emu::TensorMap b, \
                                    float *c, int m, int n, int k) {                                                 \
        gemm<BUG>(a, b, c, m, n, k);                                                                               \
    }                                                                                                                \
    KERNEL(NAME)
GEMM(hopper_gemm, NONE);
GEMM(hopper_tile_not_aligned, TILE_NOT_ALIGNED);
GEMM(hopper_wrong_arrivals, WRONG_ARRIVALS);
GEMM(hopper_no_wait_for_empty, NO_WAIT_FOR_EMPTY);
GEMM(hopper_wrong_bytes, WRONG_BYTES);
GEMM(hopper_no_wgmma_wait, NO_WGMMA_WAIT);

// Grid 2 in a cluster of 2: block 0 writes what block 1 holds.
FAULT(cluster_exchange) {
    SHARED(int, s, [256]);
    const int t = threadIdx.x;
    const unsigned rank = emu::cluster_rank();
    s[t] = in[t] + 1000 * (int)rank;
    emu::grid_barrier(__FILE__, __LINE__);
    const int theirs = ((int *)emu::cluster_map(s, rank ^ 1))[t];
    emu::grid_barrier(__FILE__, __LINE__);
    if (rank == 0) out[t] = theirs;
}
