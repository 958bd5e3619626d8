// Hopper's asynchronous memory and products: mbarrier, TMA, wgmma, clusters (sm_90a).
//
// Not modelled: fence.proxy.async and wgmma.fence. The race checks do not see what TMA and wgmma read and write.
#pragma once

namespace emu {

// ---- mbarrier: a 64-bit word in shared memory
void mbar_init(void *barrier, unsigned count);
void mbar_inval(void *barrier);
// `arrivals` arrivals, which also expect `bytes` more bytes of asynchronous copies.
void mbar_arrive(void *barrier, unsigned arrivals, int bytes);
void mbar_complete_tx(void *barrier, int bytes);
bool mbar_test(void *barrier, unsigned parity);
void mbar_wait(void *barrier, unsigned parity, const char *file, int line);

// ---- TMA: what emu_tensor_map makes, in the 128 bytes of a CUtensorMap
struct alignas(64) TensorMap {
    uint64_t magic;
    const unsigned char *base;
    uint64_t extent[5], stride[5];
    uint16_t box[5];
    uint8_t rank, element_bytes, swizzle_bytes, unused;
};
static_assert(sizeof(TensorMap) <= 128);
// Copies the box at `coordinate` into shared memory; the barrier gets its bytes when it has arrived.
void tma_load(void *dst, const void *map, void *barrier, const int *coordinate, int rank);

// ---- wgmma m64nNk16, bf16 x bf16 + f32, both operands in shared memory behind matrix descriptors.
// d holds N / 2 values of the thread. a_transposed, b_transposed: the operand is not K-major.
struct WgmmaOperands {
    uint64_t a, b;
    bool accumulate, a_transposed, b_transposed;
};
void wgmma(int columns, float *d, const WgmmaOperands &operands, const char *file, int line);
void wgmma_commit();
void wgmma_wait(unsigned left, const char *file, int line);

// ---- Clusters
unsigned cluster_rank();
unsigned cluster_size();
// The address in block `rank` of the cluster that `address` is in this block.
void *cluster_map(void *address, unsigned rank);

}  // namespace emu
