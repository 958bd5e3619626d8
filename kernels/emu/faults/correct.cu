// Kernels without a fault: what the emulator must not report, and must compute.
#include "fault.cuh"

FAULT(reverse) {
    SHARED(int, s, [256]);
    const int t = threadIdx.x;
    s[t] = in[t];
    __syncthreads();
    out[t] = s[255 - t];
}

// Every way of ordering shared memory that there is, without a barrier of the whole block between.
FAULT(ordered_in_every_way) {
    SHARED(int, s, [256]);
    SHARED(int, count, [2]);
    SHARED(unsigned short, half, [256]);
    const int t = threadIdx.x;
    s[t] = in[t];
    half[t] = (unsigned short)t;  // neighbours write two halves of one word: no race
    if (t < 2) count[t] = 0;
    __syncwarp();
    int v = s[t ^ 1] + half[t ^ 1];
    named_barrier(1 + t / 64, 64);
    v += s[t ^ 32];
    __syncthreads();
    atomicAdd(&count[0], 1);
    s[t] = v;
    __syncthreads();
    out[t] = s[(t + 128) % 256] + count[0];
}

// 1 where a collective gives another result than the manual says.
FAULT(collectives) {
    const int t = threadIdx.x, lane = t & 31, warp = t & ~31;
    const unsigned all = ~0u;
    int wrong = 0;
    wrong |= __shfl_sync(all, t, 5) != warp + 5;
    wrong |= __shfl_sync(all, lane, 2, 8) != (lane & ~7) + 2;
    wrong |= __shfl_up_sync(all, lane, 3) != (lane < 3 ? lane : lane - 3);
    wrong |= __shfl_down_sync(all, lane, 3) != (lane > 28 ? lane : lane + 3);
    wrong |= __shfl_xor_sync(all, lane, 16) != (lane ^ 16);
    wrong |= __shfl_xor_sync(all, (double)lane, 1) != (double)(lane ^ 1);
    wrong |= __ballot_sync(all, lane & 1) != 0xaaaaaaaau;
    wrong |= __any_sync(all, lane == 7) != 1;
    wrong |= __all_sync(all, lane == 7) != 0;
    wrong |= __all_sync(all, 1) != 1;
    wrong |= __reduce_add_sync(all, lane) != 496;
    wrong |= __reduce_max_sync(all, lane) != 31;
    wrong |= __reduce_min_sync(all, (unsigned)lane) != 0u;
    wrong |= __reduce_or_sync(all, 1u << lane) != all;
    wrong |= __match_any_sync(all, lane & 3) != 0x11111111u << (lane & 3);
    wrong |= warp_sum((float)lane) != 496.0f;
    wrong |= warp_max((float)-lane) != 0.0f;
    if (lane < 16)
        wrong |= __reduce_add_sync(0xffffu, 1) != 16;
    else
        wrong |= __ballot_sync(0xffff0000u, 1) != 0xffff0000u;
    out[t] = wrong;
}

// out[0] counts the threads of the grid, out[1] is the largest index, out[2] goes round up to `n`.
FAULT(atomics) {
    atomicAdd(out, 1);
    atomicMax(out + 1, (int)(blockIdx.x * blockDim.x + threadIdx.x));
    atomicInc((unsigned *)out + 2, (unsigned)n);
}

// out = in to bf16 and back, of n values; `in` and `out` hold the bits.
FAULT(through_bf16) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = f32_to_bits(to_f32(to_bf16(bits_to_f32(in[i]))));
}

// D[16][8] f32 = A[16][16] * B[16][8], bf16 in f32 words of `in`: A, then B; `n` 0. One warp. A goes through ldmatrix, B through
// its transposing form.
FAULT(matrix_product) {
    SHARED(bf16, a, [16][16]);
    SHARED(bf16, b, [16][8]);
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) a[i / 16][i % 16] = to_bf16(bits_to_f32(in[i]));
    for (int i = lane; i < 128; i += 32) b[i / 8][i % 8] = to_bf16(bits_to_f32(in[256 + i]));
    __syncwarp();
    uint32_t fa[4], fb[4];
    ldmatrix_x4(fa, &a[lane % 16][lane / 16 * 8]);
    ldmatrix_x4_trans(fb, &b[lane % 16][0]);
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma_bf16(d, fa, fb[0], fb[1]);
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        out[row * 8 + column] = f32_to_bits(d[i]);
    }
}

// One warp; rows, 16-byte words and 4-byte words are `n` bytes apart.
FAULT(strided_matrix_rows) {
    DYN_SHARED(unsigned char, s);
    uint32_t r[4];
    ldmatrix_x4(r, s + n * (threadIdx.x & 31));
    out[threadIdx.x] = r[0];
}
FAULT(strided_stores16) {
    DYN_SHARED(unsigned char, s);
    store_shared16(s + n * threadIdx.x, make_uint4(1, 2, 3, 4));
}
FAULT(strided_loads16) {
    DYN_SHARED(unsigned char, s);
    out[threadIdx.x] = load_shared16(s + n * threadIdx.x).x;
}
FAULT(strided_stores4) {
    DYN_SHARED(unsigned char, s);
    store_shared4(s + n * threadIdx.x, 1);
}
// Lanes read a different number of words each, at one place.
FAULT(uneven_loads4) {
    DYN_SHARED(unsigned char, s);
    for (int i = 0; i < (int)threadIdx.x % 3; i++) out[threadIdx.x] = load_shared4(s + n * threadIdx.x + 4 * i);
}
