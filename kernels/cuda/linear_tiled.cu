// Matrix product for many rows, weights in bf16; see linear_tiled.cuh.
#include "linear_tiled.cuh"

TILED(linear_tiled_128x128, 128, 16, false, 1);
TILED(linear_tiled_128x64, 64, 16, false, 2);
TILED(grouped_tiled_128x128, 128, 16, true, 1);
TILED(grouped_tiled_128x64, 64, 16, true, 2);
