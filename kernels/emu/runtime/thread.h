// The running CUDA thread, its built-in variables, and shared memory.
#pragma once

namespace emu {

struct Block;

// One cp.async in flight.
struct Copy {
    void *dst;
    const void *src;
    unsigned bytes, source_bytes, group;
};

// The part of a CUDA thread that kernels see; the scheduler keeps the rest.
struct Fiber {
    uint3 thread_index;
    unsigned lane, warp, rank;
    Block *block;
    dim3 block_index, block_size, grid_size;
    // The block's shared memory, static and dynamic.
    unsigned char *arena;
    // A ring of copies in flight, and the number of groups committed so far.
    static constexpr unsigned MAX_COPIES = 64;
    Copy copies[MAX_COPIES];
    unsigned first_copy, end_copy, copy_groups;
};
extern __thread Fiber *cur __attribute__((tls_model("initial-exec")));

// Ends the launch with an error that says which thread of which block came here.
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

// A point where a random schedule may prefer another thread.
void maybe_yield();
// Decides for one asynchronous operation whether it takes effect at once.
bool async_now();

// An edge between threads for the race checks: what came before the release is known after the acquire.
void sync_release(void *object);
void sync_acquire(void *object);
// Tells the race checks of a write that happens behind the kernel's back.
void announce_write(void *address, unsigned bytes);

// ---- Shared memory
void *static_shared(const void *tag, size_t bytes, size_t align, const char *name);
void *dyn_shared();
// A generic address in the shared window, and back; both fail on what is not shared memory.
unsigned smem_offset(const void *address);
void *smem_ptr(unsigned offset, unsigned bytes);
// Counts bank conflicts of an access, and checks that it is aligned and in shared memory.
void shared_access(const void *address, unsigned bytes, const char *file, int line);

}  // namespace emu

#define threadIdx (emu::cur->thread_index)
#define blockIdx (emu::cur->block_index)
#define blockDim (emu::cur->block_size)
#define gridDim (emu::cur->grid_size)
static constexpr int warpSize = 32;

// In place of __shared__: SHARED(float, partial, [32]); DYN_SHARED(float, tiles);
#define SHARED(T, name, ...)                                                                     \
    typedef T name##_shared_t __VA_ARGS__;                                                       \
    static const char name##_shared_tag = 0;                                                     \
    name##_shared_t &name = *(name##_shared_t *)emu::static_shared(                              \
        &name##_shared_tag, sizeof(name##_shared_t),                                             \
        alignof(name##_shared_t) < 16 ? 16 : alignof(name##_shared_t), #name)
#define DYN_SHARED(T, name) T *name = (T *)emu::dyn_shared()
