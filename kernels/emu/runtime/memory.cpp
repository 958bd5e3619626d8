// "Device" memory: pages of its own for each allocation, so that an overrun and a use after free fault.
#include "launch.h"
#include <map>
#include <mutex>
#include <string.h>
#include <sys/mman.h>

namespace {

constexpr size_t PAGE = 4096, ALIGNMENT = 16;
constexpr unsigned char UNINITIALISED = 0xff;

struct Allocation {
    char *pages;
    size_t page_bytes, bytes;
};

std::mutex mutex;
// Never destroyed: other threads may free memory while the process ends.
std::map<void *, Allocation> &allocations = *new std::map<void *, Allocation>();

}  // namespace

void *emu_alloc(size_t bytes) {
    const size_t page_bytes = ((bytes + PAGE - 1) / PAGE + 1) * PAGE;
    char *pages = (char *)mmap(nullptr, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) return nullptr;
    char *guard = pages + page_bytes - PAGE;
    mprotect(guard, PAGE, PROT_NONE);
    char *start = guard - (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    memset(start, UNINITIALISED, guard - start);
    std::lock_guard<std::mutex> lock(mutex);
    allocations[start] = {pages, page_bytes, bytes};
    return start;
}

int emu_free(void *address) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = allocations.find(address);
    if (found == allocations.end()) return 1;
    const Allocation allocation = found->second;
    int intact = 1;
    for (char *p = (char *)address + allocation.bytes; p < allocation.pages + allocation.page_bytes - PAGE; p++)
        intact &= *(unsigned char *)p == UNINITIALISED;
    munmap(allocation.pages, allocation.page_bytes);
    allocations.erase(found);
    return intact;
}
