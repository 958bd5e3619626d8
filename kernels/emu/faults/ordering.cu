// Accesses to shared memory that no barrier orders.
#include "fault.cuh"

FAULT(no_barrier) {
    SHARED(int, s, [256]);
    const int t = threadIdx.x;
    s[t] = in[t];
    out[t] = s[255 - t];
}

// The next round overwrites what another thread may still read.
FAULT(no_barrier_before_reuse) {
    SHARED(int, s, [256]);
    const int t = threadIdx.x;
    int sum = 0;
    for (int round = 0; round < 4; round++) {
        s[t] = in[t] + round;
        __syncthreads();
        sum += s[(t + 37) % 256];
    }
    out[t] = sum;
}

FAULT(no_syncwarp) {
    SHARED(int, s, [256]);
    const int t = threadIdx.x;
    s[t] = in[t];
    out[t] = s[t ^ 1];
}

// A shuffle meets all lanes but orders no memory.
FAULT(shuffle_as_fence) {
    SHARED(int, s, [256]);
    const int t = threadIdx.x;
    s[t] = in[t];
    const int neighbour = __shfl_xor_sync(~0u, t, 1);
    out[t] = s[neighbour];
}

// The two warps of a pair meet, and read from another pair.
FAULT(wrong_named_barrier) {
    SHARED(int, s, [256]);
    const int t = threadIdx.x;
    s[t] = in[t];
    named_barrier(1 + t / 64, 64);
    out[t] = s[(t + 64) % 256];
}

FAULT(not_atomic) {
    SHARED(int, s, [1]);
    if (threadIdx.x == 0) s[0] = 0;
    __syncthreads();
    s[0] += in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = s[0];
}

// Grid 8: all blocks write the same words of global memory.
FAULT(global_race) { out[threadIdx.x] = in[threadIdx.x] + blockIdx.x; }
