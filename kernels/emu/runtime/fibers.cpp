// Context switches between the threads of a block.
#include "scheduler.h"
#include <cstdlib>
#include <sys/mman.h>
#if !defined(__linux__)
#error "the CUDA emulator needs Linux: build the tests of the CUDA kernels there"
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

__thread Fiber *cur;
__thread Worker *worker;

#if defined(__x86_64__)
// Saves the callee-saved registers of the System V ABI on the stack and continues on another one.
extern "C" void emu_switch(void **save_stack_pointer, void *stack_pointer);
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch, .-emu_switch
)");

static void *first_frame(char *stack, void (*entry)()) {
    void **top = (void **)(stack + STACK_BYTES);
    *--top = nullptr;  // the ABI wants rsp = 8 mod 16 at a function's entry
    *--top = (void *)entry;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    return top;
}
#else
// Some fifty times slower: swapcontext makes a system call for the signal mask.
static void emu_switch(void **save_stack_pointer, void *stack_pointer) {
    ucontext_t here;
    *save_stack_pointer = &here;
    swapcontext(&here, (ucontext_t *)stack_pointer);
}

static void *first_frame(char *stack, void (*entry)()) {
    // At the far end of the stack, which grows towards it; a thread that comes so far has overrun its stack.
    ucontext_t *context = (ucontext_t *)stack;
    getcontext(context);
    context->uc_stack.ss_sp = stack + sizeof *context;
    context->uc_stack.ss_size = STACK_BYTES - sizeof *context;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}
#endif

void switch_to(Thread *to, bool final) {
    Thread *from = me();
    void *dead;
    void **save = &worker->main_stack_pointer;
    if (from) save = from->done || final ? &dead : &from->stack_pointer;
    cur = to;
    worker->stats.switches++;
    constexpr unsigned NO_ORDER = 1;  // a switch orders nothing between two CUDA threads
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to ? to->tsan_fiber : worker->main_tsan_fiber, NO_ORDER);
#if EMU_ASAN
    void **fake = from ? &from->asan_fake_stack : &worker->main_fake_stack;
    __sanitizer_start_switch_fiber(from && from->done ? nullptr : fake, to ? to->stack : worker->main_stack,
                                   to ? STACK_BYTES : worker->main_stack_bytes);
#endif
    emu_switch(save, to ? to->stack_pointer : worker->main_stack_pointer);
#if EMU_ASAN
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(me() ? me()->asan_fake_stack : worker->main_fake_stack, &bottom, &bytes);
#endif
}

// The bottom of every fiber's stack.
static void run_thread() {
#if EMU_ASAN
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    // The first fiber comes from the worker, whose stack nobody else names.
    if (!worker->main_stack) {
        worker->main_stack = bottom;
        worker->main_stack_bytes = bytes;
    }
#endif
    Thread *t = me();
    sync_acquire(&t->block->start);
    worker->launch->kernel->entry(worker->launch->arguments);
    if (t->first_copy != t->end_copy)
        fail("the thread returns with %u cp.async that it has not waited for", t->end_copy - t->first_copy);
    if (!t->block->warps[t->warp].wgmma.empty()) fail("the thread returns with a wgmma that was not waited for");
    t->done = true;
    t->block->num_done++;
    t->block->warps[t->warp].done |= 1u << t->lane;
    sync_release(&t->block->end);
    clear_runnable(t);
    switch_to(pick(worker));
    abort();  // nobody switches to a thread that is done
}

static char *new_stack() {
    constexpr size_t GUARD = 4096;
    void *memory = mmap(nullptr, STACK_BYTES + GUARD, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "emulator: no memory for the stack of a CUDA thread\n");
        abort();
    }
    mprotect(memory, GUARD, PROT_NONE);
    return (char *)memory + GUARD;
}

void prepare_fiber(Thread *t) {
    if (!t->stack) t->stack = new_stack();
    if (__tsan_create_fiber && !t->tsan_fiber) {
        char name[32];
        snprintf(name, sizeof name, "CUDA thread %u", t->rank);
        t->tsan_fiber = __tsan_create_fiber(0);
        __tsan_set_fiber_name(t->tsan_fiber, name);
    }
    __asan_unpoison_memory_region(t->stack, STACK_BYTES);
    t->stack_pointer = first_frame(t->stack, run_thread);
    t->asan_fake_stack = nullptr;
}

}  // namespace emu
