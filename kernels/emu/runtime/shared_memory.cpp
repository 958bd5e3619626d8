// Shared memory: where variables lie, and what is checked around them.
#include "scheduler.h"
#include <cstdlib>

namespace emu {

// Bytes after each variable that nobody may write (ASan does it better and needs no values).
constexpr size_t GAP_BYTES = 64;
constexpr unsigned char GAP_VALUE = 0xa5, UNINITIALISED = 0xff;
constexpr size_t SHARED_END = RESERVED_BYTES + SHARED_BYTES;

static size_t dynamic_end(const Block *block) { return (block->dynamic_offset + block->dynamic_bytes + 7) & ~(size_t)7; }

void prepare_shared(Block *block) {
    const Launch *launch = block->worker->launch;
    if (!block->arena) block->arena = (unsigned char *)aligned_alloc(ARENA_BYTES, ARENA_BYTES);
    if (!block->arena) {
        fprintf(stderr, "emulator: no memory for a block's shared memory\n");
        abort();
    }
    __asan_unpoison_memory_region(block->arena, ARENA_BYTES);
    block->dynamic_offset = RESERVED_BYTES + launch->config.shared_skew;
    block->dynamic_bytes = launch->shared_bytes;
    block->statics.clear();
    // Uninitialised shared memory reads as NaN. Static variables lie at the upper end; the rest is not touched.
    const size_t end = dynamic_end(block);
    size_t statics = SHARED_END - STATIC_BYTES - 4096;
    if (statics < end) statics = end;
    fill_quietly(block->arena + RESERVED_BYTES, UNINITIALISED, end - RESERVED_BYTES);
    fill_quietly(block->arena + statics, UNINITIALISED, ARENA_BYTES - statics);
    if (EMU_ASAN) {
        __asan_poison_memory_region(block->arena, ARENA_BYTES);
        __asan_unpoison_memory_region(block->arena + block->dynamic_offset, block->dynamic_bytes);
    } else {
        fill_quietly(block->arena + end, GAP_VALUE, GAP_BYTES);
    }
}

static bool overwritten(const unsigned char *gap) {
    for (size_t i = 0; i < GAP_BYTES; i++)
        if (gap[i] != GAP_VALUE) return true;
    return false;
}

void check_shared_ends(Block *block) {
    if (EMU_ASAN) return;
    Launch *launch = block->worker->launch;
    const std::string kernel = std::string("kernel ") + launch->kernel->name;
    if (overwritten(block->arena + dynamic_end(block)))
        return launch->set_error(kernel + ": write beyond the end of dynamic shared memory");
    for (const StaticVariable &variable : block->statics)
        if (overwritten(block->arena + variable.offset + variable.bytes))
            return launch->set_error(kernel + ": write beyond the end of shared variable " + variable.name);
}

// The place of a variable in the launch's layout; offset 0 when there is no room.
static StaticVariable lay_out(Launch *launch, const Block *block, StaticVariable variable, size_t align) {
    std::lock_guard<std::mutex> guard(launch->mutex);
    for (const StaticVariable &known : launch->layout)
        if (known.tag == variable.tag) return known;
    const size_t lowest = block->dynamic_offset + block->dynamic_bytes + GAP_BYTES;
    const size_t needed = variable.bytes + GAP_BYTES;
    if (launch->layout_end < lowest + needed + align || launch->static_bytes + variable.bytes > STATIC_BYTES)
        return variable;
    variable.offset = (launch->layout_end - needed) & ~(align - 1);
    launch->layout_end = variable.offset;
    launch->static_bytes += variable.bytes;
    launch->layout.push_back(variable);
    return variable;
}

void *static_shared(const void *tag, size_t bytes, size_t align, const char *name) {
    Block *block = me()->block;
    for (const StaticVariable &variable : block->statics)
        if (variable.tag == tag) return block->arena + variable.offset;
    Quiet quiet;
    Launch *launch = block->worker->launch;
    const StaticVariable variable = lay_out(launch, block, {tag, 0, bytes, name}, align);
    if (!variable.offset)
        fail("shared memory exhausted: %s (%zu bytes) does not fit beside %zu static bytes (at most %zu) and %zu dynamic "
             "ones", name, bytes, launch->static_bytes, STATIC_BYTES, block->dynamic_bytes);
    block->statics.push_back(variable);
    __asan_unpoison_memory_region(block->arena + variable.offset, bytes);
    if (!EMU_ASAN) fill_quietly(block->arena + variable.offset + bytes, GAP_VALUE, GAP_BYTES);
    return block->arena + variable.offset;
}

void *dyn_shared() {
    const Block *block = me()->block;
    return block->arena + block->dynamic_offset;
}

unsigned smem_offset(const void *address) {
    const Worker *w = worker;
    for (unsigned i = 0; i < w->resident; i++) {
        const uintptr_t offset = (uintptr_t)address - (uintptr_t)w->blocks[i]->arena;
        if (offset < ARENA_BYTES) return (unsigned)offset;
    }
    fail("address %p is not in shared memory", address);
}

void *smem_ptr(unsigned offset, unsigned bytes) {
    if (offset < RESERVED_BYTES || offset + bytes > SHARED_END)
        fail("shared memory offset %u (+%u) is out of range", offset, bytes);
    return me()->block->arena + offset;
}

std::string describe_shared(const Block *block, size_t offset) {
    for (const StaticVariable &variable : block->statics)
        if (offset >= variable.offset && offset < variable.offset + variable.bytes)
            return std::string("shared variable ") + variable.name + ", byte " + std::to_string(offset - variable.offset);
    return "dynamic shared memory, byte " + std::to_string((ptrdiff_t)(offset - block->dynamic_offset));
}

}  // namespace emu
