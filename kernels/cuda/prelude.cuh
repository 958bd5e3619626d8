// What every kernel file includes first: names for both compilers, fixed-width integers and a bfloat16 of our own.
//
// A kernel is ordinary CUDA C++ but for three things, so that g++ can compile the same file for the emulator:
//   SHARED(float, partial, [32]);   in place of  __shared__ float partial[32];
//   DYN_SHARED(bf16, tiles);        in place of  extern __shared__ ...;  (16-byte aligned, at most one per kernel)
//   KERNEL(name);                   after each kernel: registers it with the emulator, nothing on a GPU
// No header of CUDA's is included, so NVRTC needs none. Inline PTX stands in primitives.cuh alone.
#pragma once
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define TM_GPU 1
#if defined(__CUDACC_RTC__)
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned long uintptr_t;
#else
#include <stddef.h>
#include <stdint.h>
#endif
#define SHARED(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__
#define DYN_SHARED(T, name)                                              \
    extern __shared__ __align__(16) unsigned char tm_dynamic_shared[]; \
    T *name = reinterpret_cast<T *>(tm_dynamic_shared)
#define KERNEL(NAME)
// The caller's place in the source, for the emulator's reports: the last parameters of a primitive.
#define TM_PLACE
#define TM_PLACE_ONLY
#define TM_PLACE_ARGS
#define TM_PLACE_ARGS_ONLY
#else
#include "cuda_on_cpu.h"
#define TM_GPU 0
#define TM_PLACE , const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define TM_PLACE_ONLY const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define TM_PLACE_ARGS , file, line
#define TM_PLACE_ARGS_ONLY file, line
#endif

#define TM_DEVICE __device__ __forceinline__
#define TM_UNROLL _Pragma("unroll")
#if !TM_GPU
#undef TM_UNROLL
#define TM_UNROLL
#endif

namespace tidemill {

TM_DEVICE float bits_to_f32(uint32_t bits) { return __uint_as_float(bits); }
TM_DEVICE uint32_t f32_to_bits(float x) { return __float_as_uint(x); }
TM_DEVICE float infinity() { return bits_to_f32(0x7f800000u); }

// bfloat16: the upper half of an f32. Storage only; all arithmetic is f32.
struct __align__(2) bf16 {
    uint16_t bits;
};

// Eight bf16 as one 16-byte access.
struct __align__(16) bf16x8 {
    uint32_t pair[4];
};

TM_DEVICE float to_f32(bf16 x) { return bits_to_f32((uint32_t)x.bits << 16); }
TM_DEVICE float to_f32(float x) { return x; }
// The two halves of a packed pair; the lower half is the element at the lower address.
TM_DEVICE float low_f32(uint32_t pair) { return bits_to_f32(pair << 16); }
TM_DEVICE float high_f32(uint32_t pair) { return bits_to_f32(pair & 0xffff0000u); }

// Rounds to nearest even.
TM_DEVICE uint32_t pack_bf16(float low, float high) {
#if TM_GPU
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return (uint32_t)emu::f2bf(low) | (uint32_t)emu::f2bf(high) << 16;
#endif
}
TM_DEVICE bf16 to_bf16(float x) {
    bf16 y;
    y.bits = (uint16_t)(pack_bf16(x, 0.0f) & 0xffffu);
    return y;
}

TM_DEVICE void unpack(const bf16x8 &v, float (&out)[8]) {
    TM_UNROLL
    for (int i = 0; i < 4; i++) {
        out[2 * i] = low_f32(v.pair[i]);
        out[2 * i + 1] = high_f32(v.pair[i]);
    }
}
// Eight neighbouring elements, 16-byte aligned.
TM_DEVICE void load8(const bf16 *p, float (&out)[8]) { unpack(*(const bf16x8 *)p, out); }
TM_DEVICE void load8(const float *p, float (&out)[8]) {
    const float4 a = ((const float4 *)p)[0], b = ((const float4 *)p)[1];
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
    out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}
TM_DEVICE bf16x8 pack(const float (&in)[8]) {
    bf16x8 v;
    TM_UNROLL
    for (int i = 0; i < 4; i++) v.pair[i] = pack_bf16(in[2 * i], in[2 * i + 1]);
    return v;
}

}  // namespace tidemill
