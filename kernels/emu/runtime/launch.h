// The run-time's interface for its host: kernels/emu/src/runtime.rs declares the same.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" {

struct emu_config {
    int order;         // 0 forward, 1 reverse, 2 random, 3 random priorities of warps
    int asynchronous;  // 0 at once, 1 late, 2 random
    uint64_t seed;
    unsigned threads;      // host threads; 0: one per core
    unsigned cluster;      // blocks that run together; 0 and 1: each alone
    unsigned shared_skew;  // bytes before dynamic shared memory, a multiple of 16
    // A place that is to do nothing, or a null file.
    const char *skip_file;
    int skip_line, skip_kind;
};

struct emu_request {
    const char *kernel;
    unsigned grid[3], block[3], shared_bytes;
    void **arguments;
    unsigned num_arguments;
    emu_config config;
};

struct emu_stats {
    uint64_t switches, collectives, barriers;
    uint64_t ldmatrix_phases, ldmatrix_conflicts, shared_phases, shared_conflicts;
};

struct emu_report {
    emu_stats stats;
    char *error;
    size_t error_bytes;
    // Called after the launch, once for each place that it came to.
    void (*on_site)(void *context, int kind, const char *file, int line);
    void *context;
};

// Runs a kernel to its end. 0, or 1 with the report's error filled in.
int emu_launch(const emu_request *request, emu_report *report);
// The number of parameters, and up to `capacity` of their sizes; -1: no such kernel.
int emu_kernel_parameters(const char *name, unsigned *sizes, unsigned capacity);

// "Device" memory: 16-byte aligned, ends at a guard page, filled with NaN. Null when there is none.
void *emu_alloc(size_t bytes);
// Gives it back. 0 when the few bytes between its end and the guard page were overwritten, else 1.
int emu_free(void *address);

// Makes a tensor map. `stride_bytes` has one entry less than the rank. 0, or 1 on what cuTensorMapEncodeTiled would refuse.
struct emu_tensor {
    const void *base;
    unsigned rank, element_bytes, swizzle_bytes;
    uint64_t extent[5], stride_bytes[4];
    unsigned box[5];
};
int emu_tensor_map(void *map128, const emu_tensor *tensor);

}
