// Arithmetic and conversion intrinsics, cache hints, traps.
#pragma once

inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline int __float_as_int(float value) { return (int)__float_as_uint(value); }
inline float __int_as_float(int bits) { return __uint_as_float((uint32_t)bits); }

namespace emu {

// To bf16, to nearest even; NaN becomes 0x7fff, as cvt.rn.bf16x2.f32 has it.
inline uint16_t f2bf(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
inline float bf2f(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }

// As fmaxf and fminf. Inline, since glibc's are calls of SSE code, slow between AVX instructions.
inline float larger(float a, float b) { return a > b ? a : b == b ? b : a; }
inline float smaller(float a, float b) { return a < b ? a : b == b ? b : a; }

}  // namespace emu

#define fmaxf emu::larger
#define fminf emu::smaller

template <class T>
inline T __ldg(const T *address) {
    return *address;
}
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
// Byte i of the result is the byte of (b, a) that nibble i of the selector names.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) result |= (uint32_t)(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    return result;
}

template <class A, class B>
inline auto min(A a, B b) -> std::common_type_t<A, B> {
    return a < b ? a : b;
}
template <class A, class B>
inline auto max(A a, B b) -> std::common_type_t<A, B> {
    return a > b ? a : b;
}

inline unsigned __cvta_generic_to_shared(const void *address) { return emu::smem_offset(address); }
#define __trap() emu::fail("__trap() at %s:%d", __FILE__, __LINE__)
