// The only place with inline PTX (beside bf16 conversion in prelude.cuh). Every primitive has a GPU body and an emulated body; the
// emulated one checks what the hardware leaves undefined.
#pragma once
#include "prelude.cuh"

namespace tidemill {

// Address in the shared window, as PTX wants it.
TM_DEVICE uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---- cp.async: global to shared, 16 bytes, past the registers and L1 (sm_80). Not `valid`: writes zeros and reads nothing.
TM_DEVICE void cp_async16(void *shared, const void *global, bool valid = true) {
#if TM_GPU
    int bytes = valid ? 16 : 0;
    // The other half of a line of 128 bytes is fetched into L2 with it: the next stage wants it.
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
                 "r"(bytes)
                 : "memory");
#else
    emu::cp_async(shared, global, 16, valid ? 16 : 0);
#endif
}
TM_DEVICE void cp_async_commit() {
#if TM_GPU
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
    emu::cp_commit();
#endif
}
// Waits until at most `N` of this thread's newest groups are still in flight.
template <int N>
TM_DEVICE void cp_async_wait(TM_PLACE_ONLY) {
#if TM_GPU
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
#else
    emu::cp_wait(N, file, line);
#endif
}

// ---- Full-warp reductions in butterfly order: the same bits in every lane.
TM_DEVICE float warp_sum(float v TM_PLACE) {
#if TM_GPU
    TM_UNROLL
    for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
#else
    return emu::warp_butterfly(v, false, file, line);
#endif
}
TM_DEVICE float warp_max(float v TM_PLACE) {
#if TM_GPU
    TM_UNROLL
    for (int offset = 16; offset; offset >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
    return v;
#else
    return emu::warp_butterfly(v, true, file, line);
#endif
}

// ---- ldmatrix: four 8x8 matrices of 16-bit elements; lane l brings the address of row l % 8 of matrix l / 8.
TM_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void *row TM_PLACE) {
#if TM_GPU
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emu::ldmatrix(r, 4, false, row, file, line);
#endif
}
TM_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row TM_PLACE) {
#if TM_GPU
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    emu::ldmatrix(r, 4, true, row, file, line);
#endif
}

// ---- mma.sync m16n8k16, bf16 x bf16 + f32 (PTX ISA, "Matrix Fragments for mma.m16n8k16"). With g = lane / 4 and t = lane % 4:
// a[0] row g, a[1] row g + 8, columns 2t and 2t + 1; a[2], a[3] the same rows, columns + 8;
// b0 rows 2t and 2t + 1 of column g, b1 rows + 8; d[0], d[1] row g, columns 2t and 2t + 1, d[2], d[3] row g + 8.
TM_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 TM_PLACE) {
#if TM_GPU
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    const uint32_t b[2] = {b0, b1};
    emu::warp_mma(~0u, 0, d, a, b, file, line);
#endif
}

// ---- Named barrier `id` (1..15) over `threads` threads of the block, a multiple of 32.
TM_DEVICE void named_barrier(int id, int threads TM_PLACE) {
#if TM_GPU
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#else
    emu::block_barrier(id, (unsigned)threads, true, file, line);
#endif
}

// ---- 16 bytes of weights that are read once: past L1.
TM_DEVICE uint4 load_streaming16(const void *p) {
#if TM_GPU
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
#else
    if ((uintptr_t)p & 15) emu::fail("16-byte load from a misaligned address %p", p);
    return *(const uint4 *)p;
#endif
}

TM_DEVICE uint2 load_streaming8(const void *p) {
#if TM_GPU
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];\n" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
#else
    if ((uintptr_t)p & 7) emu::fail("8-byte load from a misaligned address %p", p);
    return *(const uint2 *)p;
#endif
}

// ---- Accesses to shared memory whose bank conflicts the emulator counts (`Stats::shared_phases`, `shared_conflicts`); on a GPU
// plain loads and stores. The hardware serves a warp's 16-byte access in four phases, lanes 0-7, 8-15, 16-23, 24-31, and a
// 4-byte access in one. A phase without conflicts takes one pass over the 32 banks of 4 bytes; it takes as many passes as the
// most distinct words that its lanes want of one bank (the same word is broadcast), and each pass beyond the first counts as a
// conflict. The lanes need not meet: the emulator takes the n-th access of each lane at one place in the source, counted
// since the whole warp last met, for one instruction of the warp. Lanes that take no part cause no conflict.
TM_DEVICE uint4 load_shared16(const void *p TM_PLACE) {
#if !TM_GPU
    emu::shared_access(p, 16, file, line);
#endif
    return *(const uint4 *)p;
}
TM_DEVICE void store_shared16(void *p, uint4 v TM_PLACE) {
#if !TM_GPU
    emu::shared_access(p, 16, file, line);
#endif
    *(uint4 *)p = v;
}
TM_DEVICE uint2 load_shared8(const void *p TM_PLACE) {
#if !TM_GPU
    emu::shared_access(p, 8, file, line);
#endif
    return *(const uint2 *)p;
}
TM_DEVICE uint32_t load_shared4(const void *p TM_PLACE) {
#if !TM_GPU
    emu::shared_access(p, 4, file, line);
#endif
    return *(const uint32_t *)p;
}
TM_DEVICE void store_shared4(void *p, uint32_t v TM_PLACE) {
#if !TM_GPU
    emu::shared_access(p, 4, file, line);
#endif
    *(uint32_t *)p = v;
}

// ---- cp.async through L1, for what several blocks of an SM read. Not `valid`: writes zeros and reads nothing.
TM_DEVICE void cp_async16_cached(void *shared, const void *global, bool valid = true) {
#if TM_GPU
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
#else
    emu::cp_async(shared, global, 16, valid ? 16 : 0);
#endif
}

// 4 or 8 bytes of what is small.
template <int BYTES>
TM_DEVICE void cp_async_small(void *shared, const void *global) {
#if TM_GPU
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;\n" ::"r"(shared_address(shared)), "l"(global), "n"(BYTES) : "memory");
#else
    emu::cp_async(shared, global, BYTES, BYTES);
#endif
}

// ---- F8E4M3 (OCP; Micikevicius et al. 2022): eight of them as f32, exactly; 0x7f and 0xff are no numbers.
TM_DEVICE void f8_to_f32(uint2 codes, float (&v)[8]) {
    const uint32_t words[2] = {codes.x, codes.y};
#if TM_GPU && __CUDA_ARCH__ >= 890
    TM_UNROLL
    for (int i = 0; i < 4; i++) {
        const uint16_t pair = (uint16_t)(words[i / 2] >> (i % 2 * 16));
        asm("{.reg .b32 h; .reg .b16 a, b; cvt.rn.f16x2.e4m3x2 h, %2; mov.b32 {a, b}, h; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
            : "=f"(v[2 * i]), "=f"(v[2 * i + 1])
            : "h"(pair));
    }
#else
    TM_UNROLL
    for (int i = 0; i < 8; i++) {
        const uint32_t byte = words[i / 4] >> (i % 4 * 8);
        // Exponent and mantissa in the place of an f32's, whose bias is greater by 120: also right for subnormals.
        const float magnitude = bits_to_f32((byte & 0x7f) << 20 | (byte & 0x80) << 24) * bits_to_f32((127u + 120u) << 23);
        v[i] = (byte & 0x7f) == 0x7f ? bits_to_f32(0x7fc00000u) : magnitude;
    }
#endif
}

// Eight f32 rounded to nearest even; what is beyond 448 becomes 448.
TM_DEVICE uint2 pack_f8(const float (&v)[8]) {
    uint32_t words[2] = {0, 0};
#if TM_GPU && __CUDA_ARCH__ >= 890
    TM_UNROLL
    for (int i = 0; i < 4; i++) {
        uint16_t pair;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(v[2 * i + 1]), "f"(v[2 * i]));
        words[i / 2] |= (uint32_t)pair << (i % 2 * 16);
    }
#else
    TM_UNROLL
    for (int i = 0; i < 8; i++) {
        const uint32_t bits = f32_to_bits(v[i]);
        const float magnitude = fminf(bits_to_f32(bits & 0x7fffffffu), 448.0f);
        // Below 2^-6 steps are of 2^-9, as those of f32 from 2^14 on. Above, 20 bits of the mantissa are rounded away.
        const uint32_t small = f32_to_bits(magnitude + 16384.0f) & 0xff, wide = f32_to_bits(magnitude);
        const uint32_t large = ((wide + 0x7ffffu + (wide >> 20 & 1)) >> 20) - (120u << 3);
        const uint32_t code = v[i] != v[i] ? 0x7fu : magnitude < 0.015625f ? small : large;
        words[i / 4] |= (code | (bits >> 31) << 7) << (i % 4 * 8);
    }
#endif
    return make_uint2(words[0], words[1]);
}

// ---- 2^x and 1/x of the special function unit: about 2 ulp, subnormals flushed; 2^0 is exactly 1, 2^-inf exactly 0.
TM_DEVICE float exp2_approx(float x) {
#if TM_GPU
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
#else
    return x < -126.0f ? 0.0f : exp2f(x);
#endif
}
TM_DEVICE float reciprocal_approx(float x) {
#if TM_GPU
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
}

}  // namespace tidemill
