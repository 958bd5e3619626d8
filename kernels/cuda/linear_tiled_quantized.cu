// Matrix product for many rows, weights of 8 and 4 bits; see linear_tiled.cuh.
#include "linear_tiled.cuh"

TILED(linear_tiled_128x128_w8, 128, 8, false, 1);
TILED(linear_tiled_128x64_w8, 64, 8, false, 2);
TILED(linear_tiled_128x128_w4, 128, 4, false, 1);
TILED(linear_tiled_128x64_w4, 64, 4, false, 2);
TILED(grouped_tiled_128x128_w8, 128, 8, true, 1);
TILED(grouped_tiled_128x64_w8, 64, 8, true, 2);
TILED(grouped_tiled_128x128_w4, 128, 4, true, 1);
TILED(grouped_tiled_128x64_w4, 64, 4, true, 2);
