// A launch from beginning to end: the kernel is looked up, host threads run its blocks, and faults become errors.
#include "scheduler.h"
#include <csignal>
#include <ucontext.h>

namespace emu {

namespace {

Kernel *kernels;

const Kernel *find_kernel(const char *name) {
    for (const Kernel *kernel = kernels; kernel; kernel = kernel->next)
        if (!strcmp(kernel->name, name)) return kernel;
    return nullptr;
}

// ---- Workers are kept, since their stacks and arenas are large. Never destroyed: a thread may run while the process ends.
std::mutex pool_mutex;
std::vector<Worker *> &pool = *new std::vector<Worker *>();

Worker *take_worker() {
    std::lock_guard<std::mutex> guard(pool_mutex);
    if (pool.empty()) return new Worker();
    Worker *w = pool.back();
    pool.pop_back();
    return w;
}

void give_worker(Worker *w) {
    std::lock_guard<std::mutex> guard(pool_mutex);
    pool.push_back(w);
}

// ---- Wild pointers: a fault inside a kernel becomes an error of the launch
#if defined(__x86_64__) && !EMU_ASAN

__thread uintptr_t fault_address;

// Where a faulting fiber goes on.
void after_fault() { fail("invalid memory access at address %p", (void *)fault_address); }

void on_fault(int signal_number, siginfo_t *info, void *context) {
    if (!cur) {
        // Not ours: the access is repeated and ends the process.
        signal(signal_number, SIG_DFL);
        return;
    }
    constexpr greg_t RED_ZONE = 256;
    fault_address = (uintptr_t)info->si_addr;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    registers[REG_RSP] = ((registers[REG_RSP] - RED_ZONE) & ~(greg_t)15) - 8;
    registers[REG_RIP] = (greg_t)after_fault;
}

void catch_faults() {
    if (__tsan_release) return;  // ThreadSanitizer has its own handler and its own report
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, nullptr);
        sigaction(SIGBUS, &action, nullptr);
    });
}

#else
void catch_faults() {}
#endif

// Runs a worker on a signal stack of its own, since a fiber's may be what is exhausted.
void run_with_signal_stack(Worker *w) {
    static thread_local std::vector<char> memory(64 << 10);
    stack_t stack{}, before{};
    stack.ss_sp = memory.data();
    stack.ss_size = memory.size();
    sigaltstack(&stack, &before);
    run_blocks(w);
    sigaltstack(&before, nullptr);
}

void run_all_blocks(Launch *launch) {
    unsigned count = launch->config.threads ? launch->config.threads : std::thread::hardware_concurrency();
    count = std::clamp(count, 1u, launch->num_blocks / launch->cluster);
    std::vector<Worker *> workers;
    for (unsigned i = 0; i < count; i++) workers.push_back(take_worker());
    std::vector<std::thread> threads;
    for (Worker *w : workers) w->launch = launch;
    for (unsigned i = 1; i < count; i++) threads.emplace_back(run_with_signal_stack, workers[i]);
    run_with_signal_stack(workers[0]);
    for (std::thread &thread : threads) thread.join();
    for (Worker *w : workers) give_worker(w);
}

// What is wrong with a request, or nothing.
std::string check(const emu_request &r, const Kernel *kernel) {
    if (!kernel) return "there is no such kernel";
    if (r.num_arguments != kernel->num_parameters)
        return "takes " + std::to_string(kernel->num_parameters) + " arguments, got " + std::to_string(r.num_arguments);
    const uint64_t threads = (uint64_t)r.block[0] * r.block[1] * r.block[2];
    if (!threads || threads > MAX_THREADS) return "a block of " + std::to_string(threads) + " threads";
    const uint64_t blocks = (uint64_t)r.grid[0] * r.grid[1] * r.grid[2];
    if (!blocks || blocks > INT32_MAX) return "a grid of " + std::to_string(blocks) + " blocks";
    if (r.config.shared_skew % 16 || r.shared_bytes + r.config.shared_skew > SHARED_BYTES)
        return std::to_string(r.shared_bytes) + " bytes of dynamic shared memory";
    if (r.config.cluster > 1 && blocks % r.config.cluster) return "the grid is not a multiple of the cluster";
    return "";
}

void report_sites(const Launch &launch, const emu_report *report) {
    if (!report->on_site) return;
    for (const Site &site : launch.sites) report->on_site(report->context, (int)site.kind, site.file, site.line);
}

}  // namespace

void register_kernel(Kernel *kernel) {
    kernel->next = kernels;
    kernels = kernel;
}

}  // namespace emu

int emu_launch(const emu_request *request, emu_report *report) {
    using namespace emu;
    const Kernel *kernel = find_kernel(request->kernel);
    std::string error = check(*request, kernel);
    if (!error.empty()) {
        snprintf(report->error, report->error_bytes, "kernel %s: %s", request->kernel, error.c_str());
        return 1;
    }
    const unsigned *grid = request->grid, *block = request->block;
    Launch launch;
    launch.kernel = kernel;
    launch.arguments = request->arguments;
    launch.grid = dim3(grid[0], grid[1], grid[2]);
    launch.block = dim3(block[0], block[1], block[2]);
    launch.shared_bytes = request->shared_bytes;
    launch.num_blocks = grid[0] * grid[1] * grid[2];
    launch.cluster = request->config.cluster ? request->config.cluster : 1;
    launch.config = request->config;
    catch_faults();
    run_all_blocks(&launch);
    report->stats = launch.stats;
    report_sites(launch, report);
    if (!launch.failed) return 0;
    if (launch.error_code[0])
        launch.error += "\n  now:    " + describe_code(launch.error_code[0]) + "\n  before: " + describe_code(launch.error_code[1]);
    snprintf(report->error, report->error_bytes, "%s", launch.error.c_str());
    return 1;
}

int emu_kernel_parameters(const char *name, unsigned *sizes, unsigned capacity) {
    const emu::Kernel *kernel = emu::find_kernel(name);
    if (!kernel) return -1;
    std::copy_n(kernel->parameter_sizes, std::min(kernel->num_parameters, capacity), sizes);
    return (int)kernel->num_parameters;
}
