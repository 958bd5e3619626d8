// cp.async whose data is used too early.
#include "fault.cuh"

FAULT(copy_not_waited_for) {
    SHARED(uint4, s, [64]);
    const int t = threadIdx.x;
    if (t < 64) cp_async16(&s[t], (const uint4 *)in + t);
    cp_async_commit();
    __syncthreads();
    out[t] = ((int *)s)[t];
    cp_async_wait<0>();
}

// A wait is for the thread's own copies.
FAULT(copy_without_barrier) {
    SHARED(uint4, s, [64]);
    const int t = threadIdx.x;
    if (t < 64) cp_async16(&s[t], (const uint4 *)in + t);
    cp_async_commit();
    cp_async_wait<0>();
    out[t] = ((int *)s)[t];
}

FAULT(copy_never_waited_for) {
    SHARED(uint4, s, [64]);
    const int t = threadIdx.x;
    if (t < 64) cp_async16(&s[t], (const uint4 *)in + t);
    cp_async_commit();
    out[t] = t;
}

// One group too many is left in flight.
FAULT(copy_waits_for_too_few) {
    SHARED(uint4, s, [2][64]);
    const int t = threadIdx.x;
    for (int stage = 0; stage < 2; stage++) {
        if (t < 64) cp_async16(&s[stage][t], (const uint4 *)in + t);
        cp_async_commit();
    }
    cp_async_wait<1>();
    __syncthreads();
    out[t] = ((int *)s[1])[t];
    cp_async_wait<0>();
}

// The copy of the next round may land while others still read the last one.
FAULT(copy_into_a_buffer_in_use) {
    SHARED(uint4, s, [64]);
    const int t = threadIdx.x;
    int sum = 0;
    for (int round = 0; round < 2; round++) {
        if (t < 64) cp_async16(&s[t], (const uint4 *)in + t);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        sum += ((int *)s)[(t + 37) % 256];
    }
    out[t] = sum;
}
