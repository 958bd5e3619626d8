// A libcuda without a GPU: the calls that the GPU driver (kernels/src/cuda/gpu) makes, on host memory. Kernels are handed to the
// emulator by the test that loads this library (kernels/tests/gpu), which also gives device memory.
//
// As strict as the real one, or stricter: what is queued runs as late as it may, at the next synchronisation; pageable
// memory, too, is read that late (as GPUs with access to the host's pages do); a call without a current context, with a handle that is
// not alive, or on a stream that records fails; an error of a kernel stays until the process ends.
//
// The environment chooses what there is and what fails:
//   FAKE_CUDA_VERSION=13000  FAKE_CUDA_DEVICES=1  FAKE_CUDA_CAPABILITY=90  FAKE_CUDA_MEMORY=268435456
//   FAKE_CUDA_FAIL=cuMemAllocAsync:2:1    the call fails with code 2, after one success
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

// Codes of cuda.h.
enum : int {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
    INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, ILLEGAL_STATE = 401, NOT_FOUND = 500, NOT_READY = 600,
    ILLEGAL_ADDRESS = 700, LAUNCH_FAILED = 719, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901
};

// What the test provides. `sizes` gives the number of parameters, or -1; `launch` runs a kernel to its end, 0 on success.
struct Hooks {
    void *(*alloc)(size_t bytes);
    void (*free)(void *ptr);
    int (*sizes)(const char *name, size_t *sizes, int room);
    int (*launch)(const char *name, const unsigned *grid, const unsigned *block, unsigned shared, void **arguments);
};

using Op = std::function<int()>;
struct Function { std::string name; int max_dynamic_shared; };
struct Event { bool recorded, reached; std::chrono::steady_clock::time_point time; };
struct Graph { std::vector<Op> ops; };

std::mutex mutex;
Hooks hooks;
bool initialized;
int lost;                                   // the sticky error
std::map<uintptr_t, size_t> device, pinned; // allocations: begin, bytes
size_t used, cached;                        // of the pool; cached is freed but not given back
uint64_t threshold;
std::set<void *> alive;                     // streams, modules, events, graphs
std::map<std::string, Function *> functions;
std::vector<Op> queue, recorded;
bool capturing, invalidated;
std::string call_log;
char context, pool;                         // only their addresses matter
thread_local void *current;

long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}
size_t memory() { return (size_t)number("FAKE_CUDA_MEMORY", 256 << 20); }

void note(const char *format, ...) {
    char line[256];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    call_log += line;
    call_log += '\n';
}

// The code that FAKE_CUDA_FAIL asks for.
int injected(const char *call) {
    static const std::string spec = getenv("FAKE_CUDA_FAIL") ? getenv("FAKE_CUDA_FAIL") : "";
    static long seen;
    const std::string prefix = std::string(call) + ":";
    if (spec.compare(0, prefix.size(), prefix) != 0) return SUCCESS;
    char *rest;
    const int code = (int)strtol(spec.c_str() + prefix.size(), &rest, 10);
    if (seen++ < (*rest == ':' ? atol(rest + 1) : 0)) return SUCCESS;
    if (code >= ILLEGAL_ADDRESS && code <= LAUNCH_FAILED) lost = code;
    return code;
}

// The address range, or its end, lies in one allocation of `ranges`.
bool inside(const std::map<uintptr_t, size_t> &ranges, uintptr_t begin, size_t bytes) {
    auto next = ranges.upper_bound(begin);
    if (next == ranges.begin()) return false;
    --next;
    return begin + bytes <= next->first + next->second;
}

int flush() {
    std::vector<Op> ops;
    ops.swap(queue);
    for (Op &op : ops) {
        if (!lost) lost = op();
    }
    cached = cached < threshold ? cached : threshold;
    return lost;
}

// Queued or recorded.
int enqueue(Op op) {
    (capturing ? recorded : queue).push_back(std::move(op));
    return SUCCESS;
}

Op copy(uintptr_t dst, uintptr_t src, size_t bytes, bool to_device) {
    return [=]() -> int {
        if (!inside(device, to_device ? dst : src, bytes)) return ILLEGAL_ADDRESS;
        memcpy((void *)dst, (const void *)src, bytes);
        return SUCCESS;
    };
}

int not_while_capturing() {
    if (!capturing) return SUCCESS;
    invalidated = true;
    return CAPTURE_UNSUPPORTED;
}

template <class T>
void give(void **out, T *object) {
    alive.insert(object);
    *out = object;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) int
// What every call begins with; CONTEXT for those that need one.
#define BEGIN                                          \
    std::lock_guard<std::mutex> guard(mutex);          \
    if (const int code = injected(__func__)) return code; \
    if (lost) return lost;
#define CONTEXT                                        \
    BEGIN                                              \
    if (!initialized) return NOT_INITIALIZED;          \
    if (current != &context) return INVALID_CONTEXT;
#define ALIVE(handle) \
    if (!alive.count(handle)) return INVALID_HANDLE

// ---- For the test.
extern "C" __attribute__((visibility("default"))) void fake_cuda_install(const Hooks *given) { hooks = *given; }
extern "C" __attribute__((visibility("default"))) const char *fake_cuda_log() { return call_log.c_str(); }
// Objects and allocations that were not given back.
extern "C" __attribute__((visibility("default"))) size_t fake_cuda_live() {
    return alive.size() + device.size() + pinned.size();
}

// ---- Errors, devices, contexts.
EXPORT cuGetErrorName(int code, const char **name) {
    static thread_local char text[32];
    snprintf(text, sizeof text, "FAKE_ERROR_%d", code);
    *name = text;
    return SUCCESS;
}
EXPORT cuGetErrorString(int, const char **text) {
    *text = "the fake driver says so";
    return SUCCESS;
}
// A real libnvrtc asks for it, and takes the answer that there is nothing.
EXPORT cuGetExportTable(const void **table, const void *) {
    *table = nullptr;
    return NOT_FOUND;
}
EXPORT cuDriverGetVersion(int *version) {
    *version = (int)number("FAKE_CUDA_VERSION", 13000);
    return SUCCESS;
}
EXPORT cuInit(unsigned flags) {
    BEGIN
    if (flags) return INVALID_VALUE;
    if (number("FAKE_CUDA_DEVICES", 1) == 0) return NO_DEVICE;
    initialized = true;
    return SUCCESS;
}
EXPORT cuDeviceGetCount(int *count) {
    BEGIN
    if (!initialized) return NOT_INITIALIZED;
    *count = (int)number("FAKE_CUDA_DEVICES", 1);
    return SUCCESS;
}
EXPORT cuDeviceGet(int *handle, int ordinal) {
    BEGIN
    if (!initialized) return NOT_INITIALIZED;
    if (ordinal < 0 || ordinal >= number("FAKE_CUDA_DEVICES", 1)) return INVALID_DEVICE;
    *handle = ordinal;
    return SUCCESS;
}
EXPORT cuDeviceGetName(char *name, int length, int handle) {
    BEGIN
    snprintf(name, (size_t)length, "Fake %d", handle);
    return SUCCESS;
}
EXPORT cuDeviceTotalMem_v2(size_t *bytes, int) {
    BEGIN
    *bytes = memory();
    return SUCCESS;
}
EXPORT cuDeviceGetAttribute(int *value, int attribute, int) {
    BEGIN
    const int capability = (int)number("FAKE_CUDA_CAPABILITY", 90);
    switch (attribute) {
    case 16: *value = 4; break;           // MULTIPROCESSOR_COUNT
    case 38: *value = 1 << 20; break;     // L2_CACHE_SIZE
    case 75: *value = capability / 10; break;
    case 76: *value = capability % 10; break;
    case 97: *value = 227 << 10; break;   // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    default: return INVALID_VALUE;
    }
    return SUCCESS;
}
EXPORT cuDevicePrimaryCtxRetain(void **out, int) {
    BEGIN
    if (!initialized) return NOT_INITIALIZED;
    *out = &context;
    return SUCCESS;
}
EXPORT cuCtxSetCurrent(void *made_current) {
    BEGIN
    current = made_current;
    note("cuCtxSetCurrent");
    return SUCCESS;
}

// ---- Memory.
EXPORT cuDeviceGetDefaultMemPool(void **out, int) {
    BEGIN
    *out = &pool;
    return SUCCESS;
}
EXPORT cuMemPoolSetAttribute(void *which, int attribute, void *value) {
    CONTEXT
    if (which != &pool || attribute != 4) return INVALID_VALUE;
    threshold = *(uint64_t *)value;
    return SUCCESS;
}
EXPORT cuMemPoolGetAttribute(void *which, int attribute, void *value) {
    CONTEXT
    if (which != &pool || (attribute != 5 && attribute != 7)) return INVALID_VALUE;
    *(uint64_t *)value = attribute == 5 ? used + cached : used;
    return SUCCESS;
}
EXPORT cuMemGetInfo_v2(size_t *free, size_t *total) {
    CONTEXT
    *total = memory();
    *free = memory() - used - cached;
    return SUCCESS;
}
EXPORT cuMemAllocAsync(unsigned long long *out, size_t bytes, void *stream) {
    CONTEXT
    ALIVE(stream);
    if (const int code = not_while_capturing()) return code;
    if (!bytes) return INVALID_VALUE;
    if (used + bytes > memory()) return OUT_OF_MEMORY;
    void *ptr = hooks.alloc(bytes);
    if (!ptr) return OUT_OF_MEMORY;
    cached -= bytes < cached ? bytes : cached;
    used += bytes;
    device[(uintptr_t)ptr] = bytes;
    *out = (uintptr_t)ptr;
    return SUCCESS;
}
EXPORT cuMemFreeAsync(unsigned long long ptr, void *stream) {
    CONTEXT
    ALIVE(stream);
    if (const int code = not_while_capturing()) return code;
    if (!device.count(ptr)) return INVALID_VALUE;
    used -= device[ptr];
    cached += device[ptr];
    note("cuMemFreeAsync");
    return enqueue([ptr] {
        device.erase(ptr);
        hooks.free((void *)ptr);
        return SUCCESS;
    });
}
EXPORT cuMemHostAlloc(void **out, size_t bytes, unsigned flags) {
    CONTEXT
    *out = aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095);
    pinned[(uintptr_t)*out] = bytes;
    note("cuMemHostAlloc flags %u", flags);
    return SUCCESS;
}
EXPORT cuMemFreeHost(void *ptr) {
    CONTEXT
    if (!pinned.erase((uintptr_t)ptr)) return INVALID_VALUE;
    free(ptr);
    return SUCCESS;
}
EXPORT cuMemcpyHtoDAsync_v2(unsigned long long dst, const void *src, size_t bytes, void *stream) {
    CONTEXT
    ALIVE(stream);
    return enqueue(copy(dst, (uintptr_t)src, bytes, true));
}
EXPORT cuMemcpyDtoHAsync_v2(void *dst, unsigned long long src, size_t bytes, void *stream) {
    CONTEXT
    ALIVE(stream);
    enqueue(copy((uintptr_t)dst, src, bytes, false));
    // To pageable memory it is synchronous.
    return capturing || inside(pinned, (uintptr_t)dst, bytes) ? SUCCESS : flush();
}
EXPORT cuMemsetD8Async(unsigned long long dst, unsigned char value, size_t bytes, void *stream) {
    CONTEXT
    ALIVE(stream);
    return enqueue([=]() -> int {
        if (!inside(device, dst, bytes)) return ILLEGAL_ADDRESS;
        memset((void *)dst, value, bytes);
        return SUCCESS;
    });
}

// ---- Kernels.
EXPORT cuModuleLoadData(void **out, const void *image) {
    CONTEXT
    // A cubin, a fatbin, and what the libnvrtc beside this file makes.
    const char *known[] = {"\x7f" "ELF", "\x50\xed\x55\xba", "FAKE"};
    for (const char *magic : known) {
        if (memcmp(image, magic, 4) == 0) return give(out, new char), SUCCESS;
    }
    return INVALID_IMAGE;
}
EXPORT cuModuleUnload(void *module) {
    CONTEXT
    ALIVE(module);
    alive.erase(module);
    delete (char *)module;
    return SUCCESS;
}
EXPORT cuModuleGetFunction(void **out, void *module, const char *name) {
    CONTEXT
    ALIVE(module);
    size_t sizes[64];
    if (hooks.sizes(name, sizes, 64) < 0) return NOT_FOUND;
    Function *&function = functions[name];
    if (!function) function = new Function{name, 48 << 10};
    *out = function;
    return SUCCESS;
}
EXPORT cuFuncGetAttribute(int *value, int attribute, void *) {
    CONTEXT
    if (attribute != 1) return INVALID_VALUE;  // SHARED_SIZE_BYTES
    *value = 1024;
    return SUCCESS;
}
EXPORT cuFuncSetAttribute(void *function, int attribute, int value) {
    CONTEXT
    if (attribute != 8 || value + 1024 > 227 << 10) return INVALID_VALUE;  // MAX_DYNAMIC_SHARED_SIZE_BYTES
    ((Function *)function)->max_dynamic_shared = value;
    return SUCCESS;
}
EXPORT cuLaunchKernel(void *handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                      void *stream, void **arguments, void **extra) {
    CONTEXT
    ALIVE(stream);
    const Function *function = (const Function *)handle;
    if (!gx || !gy || !gz || bx * by * bz == 0 || bx * by * bz > 1024 || extra) return INVALID_VALUE;
    if ((int)shared > function->max_dynamic_shared) return INVALID_VALUE;
    size_t sizes[64];
    const int count = hooks.sizes(function->name.c_str(), sizes, 64);
    // Values are read now, as the real driver does; eight-byte words keep them aligned.
    std::vector<std::vector<uint64_t>> values;
    for (int i = 0; i < count; i++) {
        values.emplace_back((sizes[i] + 7) / 8);
        memcpy(values.back().data(), arguments[i], sizes[i]);
    }
    return enqueue([=]() mutable -> int {
        std::vector<void *> pointers;
        for (auto &value : values) pointers.push_back(value.data());
        const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
        return hooks.launch(function->name.c_str(), grid, block, shared, pointers.data()) ? LAUNCH_FAILED : SUCCESS;
    });
}

// ---- Streams, events, graphs.
EXPORT cuStreamCreate(void **out, unsigned flags) {
    CONTEXT
    note("cuStreamCreate flags %u", flags);
    return give(out, new char), SUCCESS;
}
EXPORT cuStreamDestroy_v2(void *stream) {
    CONTEXT
    ALIVE(stream);
    alive.erase(stream);
    delete (char *)stream;
    return flush();
}
EXPORT cuStreamSynchronize(void *stream) {
    CONTEXT
    ALIVE(stream);
    if (const int code = not_while_capturing()) return code;
    note("cuStreamSynchronize");
    return flush();
}
EXPORT cuEventCreate(void **out, unsigned) {
    CONTEXT
    return give(out, new Event{}), SUCCESS;
}
EXPORT cuEventDestroy_v2(void *event) {
    CONTEXT
    ALIVE(event);
    flush();
    alive.erase(event);
    delete (Event *)event;
    return SUCCESS;
}
EXPORT cuEventRecord(void *handle, void *stream) {
    CONTEXT
    ALIVE(handle);
    ALIVE(stream);
    if (const int code = not_while_capturing()) return code;
    Event *event = (Event *)handle;
    event->recorded = true;
    event->reached = false;
    return enqueue([event] {
        event->reached = true;
        event->time = std::chrono::steady_clock::now();
        return SUCCESS;
    });
}
EXPORT cuEventSynchronize(void *event) {
    CONTEXT
    ALIVE(event);
    return flush();
}
EXPORT cuEventQuery(void *event) {
    CONTEXT
    ALIVE(event);
    const Event *queried = (const Event *)event;
    return queried->recorded && !queried->reached ? NOT_READY : SUCCESS;
}
EXPORT cuEventElapsedTime(float *ms, void *start, void *end) {
    CONTEXT
    ALIVE(start);
    ALIVE(end);
    const Event *a = (const Event *)start, *b = (const Event *)end;
    if (!a->recorded || !b->recorded) return INVALID_HANDLE;
    if (!a->reached || !b->reached) return NOT_READY;
    *ms = std::chrono::duration<float, std::milli>(b->time - a->time).count();
    return SUCCESS;
}
EXPORT cuStreamBeginCapture_v2(void *stream, int) {
    CONTEXT
    ALIVE(stream);
    if (capturing) return ILLEGAL_STATE;
    capturing = true;
    invalidated = false;
    recorded.clear();
    return SUCCESS;
}
EXPORT cuStreamEndCapture(void *stream, void **out) {
    CONTEXT
    ALIVE(stream);
    *out = nullptr;
    if (!capturing) return ILLEGAL_STATE;
    capturing = false;
    if (invalidated) return CAPTURE_INVALIDATED;
    Graph *graph = new Graph{recorded};
    return give(out, graph), SUCCESS;
}
EXPORT cuGraphInstantiateWithFlags(void **out, void *graph, unsigned long long) {
    CONTEXT
    ALIVE(graph);
    return give(out, new Graph(*(Graph *)graph)), SUCCESS;
}
EXPORT cuGraphDestroy(void *graph) {
    CONTEXT
    ALIVE(graph);
    alive.erase(graph);
    delete (Graph *)graph;
    return SUCCESS;
}
EXPORT cuGraphExecDestroy(void *graph) { return cuGraphDestroy(graph); }
EXPORT cuGraphUpload(void *graph, void *stream) {
    CONTEXT
    ALIVE(graph);
    ALIVE(stream);
    note("cuGraphUpload");
    return SUCCESS;
}
EXPORT cuGraphLaunch(void *graph, void *stream) {
    CONTEXT
    ALIVE(graph);
    ALIVE(stream);
    for (const Op &op : ((Graph *)graph)->ops) enqueue(op);
    return SUCCESS;
}
