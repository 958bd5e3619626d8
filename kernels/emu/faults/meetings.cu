// Barriers and collectives that not all of their threads come to.
#include "fault.cuh"

FAULT(divergent_barrier) {
    const int t = threadIdx.x;
    if (t < 100)
        __syncthreads();
    else
        __syncthreads();
    out[t] = t;
}

FAULT(early_return) {
    const int t = threadIdx.x;
    if (t >= 100) return;
    __syncthreads();
    out[t] = t;
}

FAULT(conditional_barrier) {
    const int t = threadIdx.x;
    if (t < 100) {
        out[t] = t;
        __syncthreads();
    }
}

FAULT(named_barrier_of_too_many) {
    const int t = threadIdx.x;
    if (t < 64) named_barrier(3, 128);
    out[t] = t;
}

FAULT(named_barrier_counts_differ) {
    const int t = threadIdx.x;
    named_barrier(3, t < 64 ? 128 : 64);
    out[t] = t;
}

FAULT(divergent_shuffle) {
    int v = threadIdx.x;
    if (threadIdx.x & 1) v = __shfl_xor_sync(~0u, v, 1);
    out[threadIdx.x] = v;
}

// The lower lanes wait for all, the upper ones for each other.
FAULT(masks_differ) {
    int v = threadIdx.x;
    if (threadIdx.x % 32 < 16)
        v = __shfl_xor_sync(0xffffffffu, v, 1);
    else
        v = __shfl_xor_sync(0xffff0000u, v, 1);
    out[threadIdx.x] = v;
}

FAULT(not_in_own_mask) { out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, (int)threadIdx.x, 1); }

// Half the warp votes while the other half shuffles.
FAULT(operations_differ) {
    int v;
    if (threadIdx.x & 1)
        v = __shfl_xor_sync(~0u, (int)threadIdx.x, 1);
    else
        v = __ballot_sync(~0u, 1);
    out[threadIdx.x] = v;
}

FAULT(lane_returned) {
    if (threadIdx.x % 32 == 7) return;
    out[threadIdx.x] = __shfl_xor_sync(~0u, (int)threadIdx.x, 1);
}
