// Matrix product for few rows, weights of 8 and 4 bits; see linear_skinny.cuh. As many blocks of K are in flight as their registers allow.
#include "linear_skinny.cuh"

SKINNY(linear_skinny_16x8_w8, 1, 1, 4, 8, false, 3);
SKINNY(linear_skinny_16x16_w8, 1, 2, 4, 8, false, 3);
SKINNY(linear_skinny_32x32_w8, 2, 4, 2, 8, false, 2);
SKINNY(linear_skinny_32x64_w8, 2, 8, 3, 8, false, 1);
SKINNY(linear_skinny_16x8_w4, 1, 1, 4, 4, false, 3);
SKINNY(linear_skinny_16x16_w4, 1, 2, 4, 4, false, 3);
SKINNY(linear_skinny_32x32_w4, 2, 4, 2, 4, false, 2);
SKINNY(linear_skinny_32x64_w4, 2, 8, 3, 4, false, 1);
SKINNY(grouped_skinny_16x8_w8, 1, 1, 4, 8, true, 3);
SKINNY(grouped_skinny_16x16_w8, 1, 2, 4, 8, true, 2);
SKINNY(grouped_skinny_32x32_w8, 2, 4, 2, 8, true, 1);
SKINNY(grouped_skinny_32x64_w8, 2, 8, 3, 8, true, 1);
SKINNY(grouped_skinny_16x8_w4, 1, 1, 4, 4, true, 3);
SKINNY(grouped_skinny_16x16_w4, 1, 2, 4, 4, true, 2);
SKINNY(grouped_skinny_32x32_w4, 2, 4, 2, 4, true, 1);
SKINNY(grouped_skinny_32x64_w4, 2, 8, 3, 4, true, 1);
