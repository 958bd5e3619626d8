// A race check of shared memory, by happens-before (the method of FastTrack, Flanagan and Freund 2009, with the shadow words of
// ThreadSanitizer): it reports two accesses that no barrier orders, whichever order they happened to run in.
//
// The kernels are compiled with -fsanitize=thread but linked without its run-time: the compiler's calls before each access land
// here. Time is counted in generations, which a barrier of the whole block ends: what happened in an earlier one is ordered
// before everything in this one. Only within a generation do threads keep clocks, which __syncwarp, named barriers and
// mbarriers pass on. Not checked: global memory (scripts/sanitize-kernels does that), clusters, and what TMA and wgmma touch.
#include "scheduler.h"
#include <dlfcn.h>
#include <sys/mman.h>

namespace emu {

#if EMU_RACES

namespace {

constexpr unsigned WORD_BYTES = 4, ACCESSES_PER_WORD = 4;
constexpr size_t WORDS = ARENA_BYTES / WORD_BYTES;

// What somebody knows of each thread's time in this generation.
struct Clock {
    uint32_t generation = 0;
    std::vector<uint16_t> known;
};

// One access to a word of shared memory, in 64 bits; see encode.
using Access = uint64_t;

template <class T>
T *zero_pages(size_t count) {
    void *memory = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : (T *)memory;
}

}  // namespace

struct Races {
    uint32_t generation = 0;
    bool active = false;
    unsigned num_threads = 0;
    Clock threads[MAX_THREADS];
    std::unordered_map<const void *, Clock> objects;
    Access *accesses = zero_pages<Access>(WORDS * ACCESSES_PER_WORD);
    // The lower half of the code address of each.
    uint32_t *code = zero_pages<uint32_t>(WORDS * ACCESSES_PER_WORD);
};

// ---- Clocks

// The clock, empty if it is of an earlier generation.
static Clock &current(const Races &races, Clock &clock) {
    if (clock.generation == races.generation) return clock;
    clock.generation = races.generation;
    clock.known.assign(races.num_threads, 0);
    return clock;
}

// A thread's own time starts at 1, so that 0 is "not known".
static Clock &clock_of(Races &races, unsigned rank) {
    Clock &clock = races.threads[rank];
    if (clock.generation == races.generation) return clock;
    current(races, clock).known[rank] = 1;
    return clock;
}

__attribute__((optimize("O3"))) static void join(Clock &into, const Clock &from) {
    uint16_t *a = into.known.data();
    const uint16_t *b = from.known.data();
    for (size_t i = 0, n = into.known.size(); i < n; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
}

static void release(void *object) {
    const Thread *t = me();
    if (!t || !t->block->races->active) return;
    Races &races = *t->block->races;
    Clock &mine = clock_of(races, t->rank);
    join(current(races, races.objects[object]), mine);
    uint16_t &now = mine.known[t->rank];
    if (now < UINT16_MAX) now++;  // beyond it the check sees less, and reports nothing wrong
}

static void acquire(void *object) {
    const Thread *t = me();
    if (!t || !t->block->races->active) return;
    Races &races = *t->block->races;
    const auto found = races.objects.find(object);
    if (found == races.objects.end() || found->second.generation != races.generation) return;
    join(clock_of(races, t->rank), found->second);
}

static void next_generation(Races &races) {
    constexpr uint32_t LAST = (1u << 30) - 1;
    if (races.generation++ < LAST) return;
    madvise(races.accesses, WORDS * ACCESSES_PER_WORD * sizeof(Access), MADV_DONTNEED);
    for (Clock &clock : races.threads) clock.generation = 0;
    races.objects.clear();
    races.generation = 1;
}

void races_order_all(Block *block) { next_generation(*block->races); }

void races_begin_block(Block *block) {
    if (!block->races) block->races = new Races();
    Races &races = *block->races;
    races.active = block->worker->resident == 1 && races.accesses && races.code;
    races.num_threads = block->num_threads;
    races.objects.clear();
    next_generation(races);
}

// ---- Accesses

// From the top: generation (30 bits), the thread's time (16), its rank (10), the bytes of the word (4), 2 unused, atomic, write.
static Access encode(uint32_t generation, uint16_t time, unsigned rank, unsigned bytes, bool atomic, bool write) {
    return (Access)generation << 34 | (Access)time << 18 | (Access)rank << 8 | bytes << 4 | (unsigned)atomic << 1 | (unsigned)write;
}
static uint32_t generation_of(Access a) { return (uint32_t)(a >> 34); }
static uint16_t time_of(Access a) { return (uint16_t)(a >> 18); }
static unsigned rank_of(Access a) { return a >> 8 & 1023; }
static unsigned bytes_of(Access a) { return a >> 4 & 15; }
static bool is_atomic(Access a) { return a & 2; }
static bool is_write(Access a) { return a & 1; }

[[noreturn]] static void report(Block *block, size_t offset, Access mine, Access theirs, uintptr_t code, uint32_t their_code) {
    const Thread *other = &block->threads[rank_of(theirs)];
    const uint3 i = other->thread_index, m = me()->thread_index;
    const dim3 b = me()->block_index;
    char text[400];
    snprintf(text, sizeof text,
             "kernel %s, block (%u,%u,%u): race on %s: thread (%u,%u,%u) %s it, thread (%u,%u,%u) has %s it, and no barrier "
             "lies between",
             worker->launch->kernel->name, b.x, b.y, b.z, describe_shared(block, offset).c_str(), m.x, m.y, m.z,
             is_write(mine) ? "writes" : "reads", i.x, i.y, i.z, is_write(theirs) ? "written" : "read");
    worker->launch->set_error(text, code, (code & ~(uintptr_t)UINT32_MAX) | their_code);
    switch_to(nullptr, true);
    __builtin_unreachable();
}

// Compares with what the word remembers, and remembers this access.
static void check_word(Races &races, const Clock &clock, size_t offset, Access mine, uintptr_t code) {
    Access *known = races.accesses + offset / WORD_BYTES * ACCESSES_PER_WORD;
    uint32_t *codes = races.code + offset / WORD_BYTES * ACCESSES_PER_WORD;
    // Where to put it: over an access of the same thread that it makes superfluous, else over one that is over, else anywhere.
    int over = -1, superfluous = -1;
    for (unsigned i = 0; i < ACCESSES_PER_WORD; i++) {
        const Access other = known[i];
        if (other == mine) return;
        if (generation_of(other) != races.generation) {
            over = (int)i;
            continue;
        }
        if (rank_of(other) == rank_of(mine)) {
            const bool covered = (bytes_of(other) & ~bytes_of(mine)) == 0;
            if (covered && is_atomic(other) == is_atomic(mine) && (is_write(mine) || !is_write(other))) superfluous = (int)i;
            continue;
        }
        if (!(bytes_of(other) & bytes_of(mine)) || !(is_write(other) || is_write(mine))) continue;
        if (is_atomic(other) && is_atomic(mine)) continue;
        if (clock.known[rank_of(other)] < time_of(other)) report(me()->block, offset, mine, other, code, codes[i]);
    }
    int slot = superfluous >= 0 ? superfluous : over;
    if (slot < 0) slot = (int)(rank_of(mine) % ACCESSES_PER_WORD);
    known[slot] = mine;
    codes[slot] = (uint32_t)code;
}

__attribute__((noinline)) static void check_access(const Thread *t, size_t offset, size_t bytes, bool write, bool atomic,
                                                   uintptr_t code) {
    Races &races = *t->block->races;
    if (!races.active) return;
    const Clock &clock = clock_of(races, t->rank);
    const uint16_t time = clock.known[t->rank];
    for (const size_t end = offset + bytes; offset < end;) {
        const size_t word = offset & ~(size_t)(WORD_BYTES - 1);
        const size_t next = word + WORD_BYTES < end ? word + WORD_BYTES : end;
        const unsigned mask = ((1u << (next - offset)) - 1) << (offset - word);
        check_word(races, clock, word, encode(races.generation, time, t->rank, mask, atomic, write), code);
        offset = next;
    }
}

// What the compiler calls before each access of a kernel.
static inline void on_access(const volatile void *address, size_t bytes, bool write, bool atomic, void *code) {
    const Thread *t = me();
    if (!t) return;
    const size_t offset = (uintptr_t)address - (uintptr_t)t->arena;
    if (__builtin_expect(offset >= ARENA_BYTES, 1)) return;
    check_access(t, offset, bytes, write, atomic, (uintptr_t)code);
}

void sync_release(void *object) { release(object); }
void sync_acquire(void *object) { acquire(object); }
void announce_write(void *address, unsigned bytes) { on_access(address, bytes, true, false, __builtin_return_address(0)); }

extern "C" {
#define EMU_ON_ACCESS(BYTES)                                                                                        \
    void __tsan_read##BYTES(void *address) { on_access(address, BYTES, false, false, __builtin_return_address(0)); } \
    void __tsan_write##BYTES(void *address) { on_access(address, BYTES, true, false, __builtin_return_address(0)); } \
    void __tsan_unaligned_read##BYTES(void *address) {                                                              \
        on_access(address, BYTES, false, false, __builtin_return_address(0));                                       \
    }                                                                                                               \
    void __tsan_unaligned_write##BYTES(void *address) {                                                             \
        on_access(address, BYTES, true, false, __builtin_return_address(0));                                        \
    }
EMU_ON_ACCESS(1)
EMU_ON_ACCESS(2)
EMU_ON_ACCESS(4)
EMU_ON_ACCESS(8)
EMU_ON_ACCESS(16)
void __tsan_read_range(void *address, size_t bytes) { on_access(address, bytes, false, false, __builtin_return_address(0)); }
void __tsan_write_range(void *address, size_t bytes) { on_access(address, bytes, true, false, __builtin_return_address(0)); }
void __tsan_vptr_update(void *, void *) {}
void __tsan_vptr_read(void *) {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void) {}
void __tsan_init(void) {}
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

#define EMU_ON_ATOMIC(BITS, T)                                                                                      \
    T __tsan_atomic##BITS##_load(const volatile T *address, int) {                                                  \
        on_access(address, sizeof(T), false, true, __builtin_return_address(0));                                    \
        return __atomic_load_n(address, __ATOMIC_RELAXED);                                                          \
    }                                                                                                               \
    int __tsan_atomic##BITS##_compare_exchange_strong(volatile T *address, T *expected, T value, int, int) {        \
        on_access(address, sizeof(T), true, true, __builtin_return_address(0));                                     \
        return __atomic_compare_exchange_n(address, expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);    \
    }
EMU_ON_ATOMIC(32, uint32_t)
EMU_ON_ATOMIC(64, uint64_t)
}

#else  // Built with a sanitizer, which looks at all of memory.

extern "C" void __tsan_write16(void *) __attribute__((weak));

void races_order_all(Block *) {}
void races_begin_block(Block *) {}
void sync_release(void *object) {
    if (__tsan_release) __tsan_release(object);
}
void sync_acquire(void *object) {
    if (__tsan_acquire) __tsan_acquire(object);
}
void announce_write(void *address, unsigned bytes) {
    if (__tsan_write16 && bytes == 16) __tsan_write16(address);
}

#endif

// A race is often found many times, in tests that look for it, and a look-up takes half a second.
static std::string look_up(const char *file, size_t address) {
    static std::mutex mutex;
    static std::map<size_t, std::string> &known = *new std::map<size_t, std::string>();
    std::lock_guard<std::mutex> guard(mutex);
    const auto found = known.find(address);
    if (found != known.end()) return found->second;
    char command[1200], line[512];
    snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", file, address);
    std::string text;
    FILE *output = popen(command, "r");
    while (output && fgets(line, sizeof line, output)) {
        std::string place(line, strcspn(line, " \n"));
        place.erase(0, place.rfind('/') + 1);
        text += (text.empty() ? "" : ", inlined at ") + place;
    }
    if (output) pclose(output);
    return known[address] = text.empty() ? "?" : text;
}

std::string describe_code(uintptr_t code) {
    Dl_info info;
    if (!dladdr((void *)code, &info) || !info.dli_fname) return "?";
    // One less: the address is where the call returns to, which may already be another line.
    return look_up(info.dli_fname, code - 1 - (uintptr_t)info.dli_fbase);
}

}  // namespace emu
