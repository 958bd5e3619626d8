// Attention over keys and values in F8E4M3; see attention_items.cuh. Split rows are merged by the kernels of attention.cu.
#include "attention_items.cuh"

ATTENTION_KERNELS(16, true, _f8)
ATTENTION_KERNELS(32, true, _f8)
ATTENTION_KERNELS(64, true, _f8)
ATTENTION_KERNELS(80, true, _f8)
ATTENTION_KERNELS(96, true, _f8)
ATTENTION_KERNELS(128, true, _f8)
ATTENTION_KERNELS(192, true, _f8)
ATTENTION_KERNELS(256, true, _f8)
