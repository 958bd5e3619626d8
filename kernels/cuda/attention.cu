// Attention over keys and values in bf16; see attention_items.cuh.
#include "attention_items.cuh"

#define ATTENTION(D)                                                                                                              \
    ATTENTION_KERNELS(D, false, )                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128, 3) attention_combine_##D(const AttentionArgs args) { combine<D>(args); }    \
    KERNEL(attention_combine_##D);

ATTENTION(16)
ATTENTION(32)
ATTENTION(64)
ATTENTION(80)
ATTENTION(96)
ATTENTION(128)
ATTENTION(192)
ATTENTION(256)
