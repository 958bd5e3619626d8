// Matrix product for few rows, weights in bf16; see linear_skinny.cuh.
#include "linear_skinny.cuh"

SKINNY(linear_skinny_16x8, 1, 1, 4, 16, false, 4);
SKINNY(linear_skinny_16x16, 1, 2, 4, 16, false, 3);
SKINNY(linear_skinny_32x16, 2, 2, 4, 16, false, 2);
SKINNY(linear_skinny_32x32, 2, 4, 3, 16, false, 2);
SKINNY(linear_skinny_32x64, 2, 8, 2, 16, false, 2);
SKINNY(linear_skinny_64x64, 4, 8, 2, 16, false, 1);
SKINNY(grouped_skinny_16x8, 1, 1, 4, 16, true, 4);
SKINNY(grouped_skinny_16x16, 1, 2, 4, 16, true, 3);
SKINNY(grouped_skinny_32x16, 2, 2, 4, 16, true, 2);
SKINNY(grouped_skinny_32x32, 2, 4, 3, 16, true, 2);
SKINNY(grouped_skinny_32x64, 2, 8, 2, 16, true, 1);
SKINNY(grouped_skinny_64x64, 4, 8, 2, 16, true, 1);
