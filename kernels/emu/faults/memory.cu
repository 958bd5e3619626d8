// Memory that is not there, not written, or not aligned. `n` is how far beyond the end.
#include "fault.cuh"

FAULT(uninitialised_shared) {
    SHARED(int, s, [256]);
    const int t = threadIdx.x;
    if (t < 200) s[t] = in[t];
    __syncthreads();
    out[t] = s[t];
}

FAULT(static_shared_overrun) {
    SHARED(int, s, [256]);
    int *p = s;
    p[threadIdx.x + n] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x];
}

// 1024 bytes of dynamic shared memory.
FAULT(dynamic_shared_overrun) {
    DYN_SHARED(int, s);
    s[threadIdx.x + n] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x];
}

FAULT(global_read_overrun) { out[threadIdx.x] = in[threadIdx.x + n]; }
FAULT(global_write_overrun) { out[threadIdx.x + n] = in[threadIdx.x]; }

FAULT(too_much_static_shared) {
    SHARED(int, s, [13 * 1024]);
    s[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = s[threadIdx.x];
}

FAULT(misaligned_copy) {
    SHARED(uint4, s, [64]);
    const int t = threadIdx.x;
    if (t < 32) cp_async16(&s[t], in + 1 + 4 * t);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    out[t] = ((int *)s)[t];
}

FAULT(misaligned_matrix) {
    DYN_SHARED(unsigned char, s);
    uint32_t r[4];
    ldmatrix_x4(r, s + 16 * (threadIdx.x & 31) + 8);
    out[threadIdx.x] = r[0];
}

FAULT(misaligned_load) {
    DYN_SHARED(unsigned char, s);
    out[threadIdx.x] = load_shared16(s + 4).x;
}

// The address of a register is not in shared memory.
FAULT(copy_to_a_register) {
    uint4 here;
    cp_async16(&here, in);
    cp_async_commit();
    cp_async_wait<0>();
    out[threadIdx.x] = here.x;
}
