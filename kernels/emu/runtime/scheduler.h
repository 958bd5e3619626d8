// What the run-time's own files share: blocks, warps, threads, and the scheduler's few verbs. Kernels never see this.
#pragma once
#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "cuda_on_cpu.h"
#include "launch.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#else
#define EMU_ASAN 0
#define __asan_poison_memory_region(address, bytes) ((void)0)
#define __asan_unpoison_memory_region(address, bytes) ((void)0)
#endif

#if defined(__SANITIZE_THREAD__)
#error "the run-time must not be built with ThreadSanitizer: its hand-over between fibers would look like races"
#endif

namespace emu {

constexpr unsigned MAX_THREADS = 1024, MAX_WARPS = 32, LANES = 32;
// A block's shared memory: the first KiB is reserved by the system, as on sm_90.
constexpr size_t ARENA_BYTES = 256 << 10, SHARED_BYTES = 227 << 10, RESERVED_BYTES = 1024, STATIC_BYTES = 48 << 10;
constexpr size_t STACK_BYTES = EMU_ASAN ? 256 << 10 : 64 << 10;
// Groups of lanes with different masks that may meet in one warp at a time, and the bytes that a lane brings.
constexpr unsigned MAX_GROUPS = 6, SLOT_BYTES = 48;

enum class Wait { None, Warp, Barrier, Cluster, Mbarrier };

// Lanes of a warp that meet. Two buffers, since a lane may read the last meeting while another already comes to the next.
struct Group {
    uint32_t mask, arrived, present[2];
    int op, line;
    const char *file;
    unsigned epoch;
    alignas(16) unsigned char slot[2][LANES][SLOT_BYTES];
    char order[2];  // their addresses name the edges of __syncwarp
};

// A wgmma that has been issued; `d` is each lane's accumulator.
struct PendingWgmma {
    int columns;
    float *d[LANES];
    WgmmaOperands operands;
    unsigned group;
};

// One instruction of a warp, put together from its lanes' accesses to shared memory.
struct WarpAccess {
    uint32_t lanes = 0;
    unsigned bytes = 0;
    uint32_t offset[LANES];
};
// The accesses of one place in the source since the whole warp last met; made[l] is how many lane l has made.
struct AccessSite {
    const char *file;
    int line;
    unsigned bytes, made[LANES];
    std::vector<WarpAccess> open;
};

struct Warp {
    uint32_t exist, runnable, done;
    unsigned num_groups;
    Group groups[MAX_GROUPS];
    std::vector<PendingWgmma> wgmma;
    unsigned wgmma_groups;
    std::vector<AccessSite> accesses;
    unsigned priority;
};

struct Thread : Fiber {
    void *stack_pointer;
    char *stack;
    void *tsan_fiber, *asan_fake_stack;
    // The last meeting, for warp_read.
    Group *met;
    unsigned met_buffer;
    // What it waits for, and where in the source.
    Wait wait;
    uint64_t wait_for;
    uint32_t wait_mask;
    const char *wait_file;
    int wait_line;
    bool done;
};

struct Barrier {
    unsigned arrived, count, epoch;
    const char *file;
    int line;
    uint32_t waiting[MAX_WARPS];
    char order[2];
};

struct StaticVariable {
    const void *tag;
    size_t offset, bytes;
    const char *name;
};

struct Worker;
struct Races;

struct Block {
    Thread *threads = nullptr;
    Warp warps[MAX_WARPS];
    unsigned num_threads, num_warps, num_done, index;
    Barrier barriers[16];
    uint32_t runnable_warps;
    unsigned char *arena = nullptr;
    size_t dynamic_offset, dynamic_bytes;
    std::vector<StaticVariable> statics;
    Worker *worker;
    Races *races = nullptr;
    char start, end;  // edges from and to the host
};

struct Site {
    SiteKind kind;
    const char *file;
    int line;
    bool skip;
};

struct Launch {
    const Kernel *kernel;
    void **arguments;
    dim3 grid, block;
    unsigned shared_bytes, num_blocks, cluster;
    emu_config config;
    std::atomic<unsigned> next_block{0};
    std::atomic<bool> failed{false};
    // Guards all below, which workers share.
    std::mutex mutex;
    std::string error;
    // Code addresses that the error is about, to be looked up when no fiber runs any more.
    uintptr_t error_code[2] = {0, 0};
    emu_stats stats{};
    std::vector<Site> sites;
    // One layout of static shared memory per launch, so that a variable lies at the same offset in every block of a cluster.
    std::vector<StaticVariable> layout;
    size_t layout_end = RESERVED_BYTES + SHARED_BYTES, static_bytes = 0;

    // The first error is the one that is reported.
    void set_error(const std::string &text, uintptr_t code = 0, uintptr_t other_code = 0);
};

// A TMA load in flight.
struct PendingTma {
    void *dst, *barrier;
    TensorMap map;
    int coordinate[5], rank;
    Block *block;
};

// A host thread's part of a launch: the blocks that it runs together.
struct Worker {
    std::vector<Block *> blocks;
    unsigned resident = 0;
    Launch *launch = nullptr;
    void *main_stack_pointer = nullptr, *main_tsan_fiber = nullptr, *main_fake_stack = nullptr;
    const void *main_stack = nullptr;
    size_t main_stack_bytes = 0;
    uint64_t random_state = 1;
    emu_stats stats{};
    std::vector<Site> sites;
    std::vector<PendingTma> tma;
    unsigned cluster_arrived = 0;
    char cluster_order;
};
extern __thread Worker *worker __attribute__((tls_model("initial-exec")));

inline Thread *me() { return (Thread *)cur; }

inline uint64_t random_number(Worker *w) {
    uint64_t x = w->random_state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return w->random_state = x;
}
inline bool is_random(const Worker *w) { return w->launch->config.order == 2; }

inline void set_runnable(Block *block, unsigned warp, uint32_t lanes) {
    block->warps[warp].runnable |= lanes;
    if (block->warps[warp].runnable) block->runnable_warps |= 1u << warp;
}
inline void clear_runnable(Thread *t) {
    Warp &warp = t->block->warps[t->warp];
    warp.runnable &= ~(1u << t->lane);
    if (!warp.runnable) t->block->runnable_warps &= ~(1u << t->warp);
}

// ---- fibers.cpp
// Prepares a thread to run the kernel from its beginning.
void prepare_fiber(Thread *t);
// Goes on with another thread; null: back to the worker. `final`: this one never runs again.
void switch_to(Thread *to, bool final = false);

// ---- scheduler.cpp
// The thread to run next; null when none is left, or none can run, which is an error.
Thread *pick(Worker *w);
// Lets the schedule choose again.
void reschedule();
// Waits until somebody makes this thread runnable.
void block_on(Wait wait, uint64_t wait_for, uint32_t mask, const char *file, int line);
void run_blocks(Worker *w);

// ---- shared_memory.cpp
void prepare_shared(Block *block);
void check_shared_ends(Block *block);

// ---- bank_conflicts.cpp
void count_matrix_rows(const Group &group, unsigned buffer);
// Counts what has not come together to whole warps, now that all of the warp's lanes have met.
void flush_accesses(Worker *w, Warp &warp);

// ---- async.cpp
// Where TMA and wgmma put the byte at a shared offset; `bytes` is 0, 32, 64 or 128.
uint32_t swizzle(uint32_t offset, unsigned bytes);
// Lets one asynchronous operation take effect; false when none is pending.
bool run_pending_tma(Worker *w);

// ---- races.cpp
void races_begin_block(Block *block);
// All threads of the block know of all that happened.
void races_order_all(Block *block);
// Name and offset of a place in shared memory.
std::string describe_shared(const Block *block, size_t offset);
// File and line of a code address, as far as it can be found out.
std::string describe_code(uintptr_t code);

// ---- ThreadSanitizer's interface, present only when the program is linked with it
extern "C" {
void *__tsan_create_fiber(unsigned) __attribute__((weak));
void __tsan_switch_to_fiber(void *, unsigned) __attribute__((weak));
void *__tsan_get_current_fiber(void) __attribute__((weak));
void __tsan_set_fiber_name(void *, const char *) __attribute__((weak));
void __tsan_acquire(void *) __attribute__((weak));
void __tsan_release(void *) __attribute__((weak));
void AnnotateIgnoreReadsBegin(const char *, int) __attribute__((weak));
void AnnotateIgnoreReadsEnd(const char *, int) __attribute__((weak));
void AnnotateIgnoreWritesBegin(const char *, int) __attribute__((weak));
void AnnotateIgnoreWritesEnd(const char *, int) __attribute__((weak));
}

// Hides the run-time's bookkeeping from ThreadSanitizer, which intercepts the memmove of a std::vector.
struct Quiet {
    Quiet() {
        if (!AnnotateIgnoreReadsBegin) return;
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~Quiet() {
        if (!AnnotateIgnoreReadsEnd) return;
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    }
};

// Loops that GCC may not turn into memcpy and memset, which ThreadSanitizer would intercept.
inline void copy_quietly(void *dst, const void *src, unsigned bytes) {
    unsigned i = 0;
    for (; i + 4 <= bytes; i += 4) *(volatile uint32_t *)((char *)dst + i) = *(const volatile uint32_t *)((const char *)src + i);
    for (; i < bytes; i++) ((volatile char *)dst)[i] = ((const volatile char *)src)[i];
}
inline void fill_quietly(void *dst, unsigned char value, size_t bytes) {
    const uint64_t words = value * 0x0101010101010101ull;
    size_t i = 0;
    for (; ((uintptr_t)dst + i) % 8 && i < bytes; i++) ((volatile unsigned char *)dst)[i] = value;
    for (; i + 8 <= bytes; i += 8) *(volatile uint64_t *)((char *)dst + i) = words;
    for (; i < bytes; i++) ((volatile unsigned char *)dst)[i] = value;
}

}  // namespace emu
