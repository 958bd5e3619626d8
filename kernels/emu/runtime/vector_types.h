// CUDA's built-in vector types, as far as kernels use them.
#pragma once

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct uint3 {
    unsigned x, y, z;
};

#define EMU_VECTOR_2(NAME, T)                                          \
    struct alignas(2 * sizeof(T)) NAME {                               \
        T x, y;                                                        \
    };                                                                 \
    inline NAME make_##NAME(T x, T y) { return {x, y}; }
#define EMU_VECTOR_4(NAME, T)                                          \
    struct alignas(4 * sizeof(T)) NAME {                               \
        T x, y, z, w;                                                  \
    };                                                                 \
    inline NAME make_##NAME(T x, T y, T z, T w) { return {x, y, z, w}; }

EMU_VECTOR_2(float2, float)
EMU_VECTOR_4(float4, float)
EMU_VECTOR_2(int2, int)
EMU_VECTOR_4(int4, int)
EMU_VECTOR_2(uint2, unsigned)
EMU_VECTOR_4(uint4, unsigned)
