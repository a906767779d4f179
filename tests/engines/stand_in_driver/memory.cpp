// Memory. An allocation has pages of its own between two that nobody may touch, and its address is never used again.
// Device memory is closed to the process but for the time in which queued work runs, so that the host can't touch it.
#include "driver.h"

#include <sys/mman.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <map>

namespace {

constexpr size_t PAGE = 4096;
constexpr unsigned char CANARY = 0xDB, GARBAGE = 0xCB;  // behind an allocation; in a fresh one

struct Allocation {
    size_t size;
    bool pinned;
    bool freed;  // by the host; work that was queued before may still use it
    size_t pages() const { return (size + PAGE) / PAGE * PAGE; }  // at least a byte of canary
};

struct Pool {
    uint64_t release_threshold = 0;
};

std::map<uint64_t, Allocation>& allocations() {
    static std::map<uint64_t, Allocation> all;
    return all;
}

size_t used_bytes = 0;
int opened = 0;

unsigned char* bytes(uint64_t address) { return reinterpret_cast<unsigned char*>(address); }

uint64_t allocate(size_t size, bool pinned) {
    Allocation allocation{size, pinned, false};
    const size_t pages = allocation.pages();
    void* const mapped = mmap(nullptr, pages + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return 0;
    const uint64_t address = reinterpret_cast<uint64_t>(mapped) + PAGE;
    mprotect(bytes(address), pages, PROT_READ | PROT_WRITE);
    memset(bytes(address), GARBAGE, size);
    memset(bytes(address) + size, CANARY, pages - size);
    if (!pinned && !opened) mprotect(bytes(address), pages, PROT_NONE);
    allocations()[address] = allocation;
    count(pinned ? "live_pinned" : "live_allocations");
    if (!pinned) used_bytes += size;
    return address;
}

bool is_damaged(uint64_t address, const Allocation& allocation) {
    const unsigned char* const end = bytes(address) + allocation.pages();
    return std::any_of(bytes(address) + allocation.size, const_cast<unsigned char*>(end),
                       [](unsigned char byte) { return byte != CANARY; });
}

void unmap(uint64_t address) {  // the pages stay reserved, so that a late access faults
    const auto found = allocations().find(address);
    if (found == allocations().end()) return fail(ILLEGAL_ADDRESS, "memory at %#lx is freed twice", address);
    mprotect(bytes(address), found->second.pages(), PROT_READ | PROT_WRITE);
    if (is_damaged(address, found->second)) fail(ILLEGAL_ADDRESS, "something wrote past the memory at %#lx", address);
    madvise(bytes(address), found->second.pages(), MADV_DONTNEED);
    mprotect(bytes(address), found->second.pages(), PROT_NONE);
    allocations().erase(found);
}

Allocation* live(uint64_t address) {
    const auto found = allocations().find(address);
    return found == allocations().end() || found->second.freed ? nullptr : &found->second;
}

void forget(uint64_t address, Allocation* allocation) {  // by the host
    allocation->freed = true;
    if (!allocation->pinned) used_bytes -= allocation->size;
    count(allocation->pinned ? "live_pinned" : "live_allocations", -1);
    (void)address;
}

struct sigaction earlier_action;

void on_fault(int signal, siginfo_t* info, void*) {  // then the fault comes again, to whom it came before
    const uint64_t address = reinterpret_cast<uint64_t>(info->si_addr);
    for (const auto& [start, allocation] : allocations()) {
        if (start <= address && address < start + allocation.pages()) {
            complain("the host touches device memory at %#lx, in an allocation of %zu bytes", address, allocation.size);
        }
    }
    sigaction(signal, &earlier_action, nullptr);
}

void watch_faults() {
    static bool watching = false;
    if (watching) return;
    watching = true;
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, &earlier_action);
}

Result cuMemAlloc(uint64_t* out, size_t size) {
    auto lock = locked();
    watch_faults();
    if (capture_forbids("cuMemAlloc")) return CAPTURE_UNSUPPORTED;
    if (size > free_memory()) return OUT_OF_MEMORY;
    *out = allocate(size, false);
    return *out ? SUCCESS : OUT_OF_MEMORY;
}

Result cuMemAllocFromPoolAsync(uint64_t* out, size_t size, Pool*, Stream* stream) {
    auto lock = locked();
    watch_faults();
    if (stream->status != NONE) return CAPTURE_UNSUPPORTED;
    if (size > free_memory()) return OUT_OF_MEMORY;
    *out = allocate(size, false);
    return *out ? SUCCESS : OUT_OF_MEMORY;
}

Result cuMemFree(uint64_t address) {
    auto lock = locked();
    if (capture_forbids("cuMemFree")) return CAPTURE_UNSUPPORTED;
    Allocation* const allocation = live(address);
    if (!allocation) return INVALID_VALUE;
    run_all();  // the driver waits for the device here
    forget(address, allocation);
    unmap(address);
    return SUCCESS;
}

Result cuMemFreeAsync(uint64_t address, Stream* stream) {
    auto lock = locked();
    Allocation* const allocation = live(address);
    if (!allocation) return INVALID_VALUE;
    const Result result = submit(stream, MEMORY, [address] { unmap(address); });
    if (result == SUCCESS) forget(address, allocation);
    return result;
}

Result cuMemAllocHost(void** out, size_t size) {
    auto lock = locked();
    if (capture_forbids("cuMemAllocHost")) return CAPTURE_UNSUPPORTED;
    *out = bytes(allocate(size, true));
    return *out ? SUCCESS : OUT_OF_MEMORY;
}

Result cuMemFreeHost(void* pointer) {  // doesn't wait here, so that work which still needs it is caught
    auto lock = locked();
    if (capture_forbids("cuMemFreeHost")) return CAPTURE_UNSUPPORTED;
    const uint64_t address = reinterpret_cast<uint64_t>(pointer);
    Allocation* const allocation = live(address);
    if (!allocation) return INVALID_VALUE;
    forget(address, allocation);
    unmap(address);
    return SUCCESS;
}

Result cuMemcpyAsync(uint64_t target, uint64_t source, size_t size, Stream* stream) {
    auto lock = locked();
    if (!is_usable(target, size) || !is_usable(source, size)) {
        complain("a copy of %zu bytes from %#lx to %#lx leaves what is allocated and pinned", size, source, target);
        return INVALID_VALUE;
    }
    count("copies");
    return submit(stream, COPY, [=] {
        if (is_usable(target, size) && is_usable(source, size)) {
            memmove(bytes(target), bytes(source), size);
        } else {
            fail(ILLEGAL_ADDRESS, "a copy from %#lx to %#lx runs after its memory was freed", source, target);
        }
    });
}

template <typename Value>
Result set(uint64_t target, Value value, size_t elements, Stream* stream) {
    auto lock = locked();
    if (!is_usable(target, elements * sizeof(Value))) return INVALID_VALUE;
    return submit(stream, SET, [=] {
        if (!is_usable(target, elements * sizeof(Value))) {
            return fail(ILLEGAL_ADDRESS, "memory at %#lx is filled after it was freed", target);
        }
        for (size_t i = 0; i < elements; ++i) memcpy(bytes(target) + i * sizeof(Value), &value, sizeof(Value));
    });
}

Result cuMemGetInfo(size_t* free, size_t* total) {
    auto lock = locked();
    *free = free_memory();
    *total = total_memory();
    return SUCCESS;
}

Result cuMemPoolCreate(Pool** out, const void*) {
    auto lock = locked();
    *out = new Pool;
    count("live_pools");
    return SUCCESS;
}

Result cuMemPoolDestroy(Pool* pool) {
    auto lock = locked();
    delete pool;
    count("live_pools", -1);
    return SUCCESS;
}

Result cuDeviceGetMemPool(Pool** out, int) {
    static Pool pool;
    *out = &pool;
    return SUCCESS;
}

Result cuMemPoolSetAccess(Pool*, const void*, size_t) { return SUCCESS; }

Result cuMemPoolGetAttribute(Pool* pool, int, uint64_t* value) {
    *value = pool->release_threshold;
    return SUCCESS;
}

Result cuMemPoolSetAttribute(Pool* pool, int, const uint64_t* value) {
    pool->release_threshold = *value;
    return SUCCESS;
}

}  // namespace

bool is_usable(uint64_t address, size_t count) {
    auto found = allocations().upper_bound(address);
    if (found == allocations().begin()) return false;
    --found;
    return address + count <= found->first + found->second.size;
}

size_t total_memory() { return static_cast<size_t>(setting("STAND_IN_MEMORY_MIB", 256)) << 20; }
size_t free_memory() { return total_memory() - used_bytes; }

void set_accessible(bool accessible) {
    opened += accessible ? 1 : -1;
    if (opened != (accessible ? 1 : 0)) return;
    for (const auto& [address, allocation] : allocations()) {
        if (!allocation.pinned) {
            mprotect(bytes(address), allocation.pages(), accessible ? PROT_READ | PROT_WRITE : PROT_NONE);
        }
    }
}

void check_canaries() {
    for (const auto& [address, allocation] : allocations()) {
        if (is_damaged(address, allocation)) {
            fail(ILLEGAL_ADDRESS, "something wrote past the %zu bytes at %#lx", allocation.size, address);
        }
    }
}

const std::vector<Entry>& memory_entries() {
    static const std::vector<Entry> entries{
        ENTRY("cuMemAlloc", 3020, cuMemAlloc),
        ENTRY("cuMemAllocFromPoolAsync", 11020, cuMemAllocFromPoolAsync),
        ENTRY("cuMemFree", 3020, cuMemFree),
        ENTRY("cuMemFreeAsync", 11020, cuMemFreeAsync),
        ENTRY("cuMemAllocHost", 3020, cuMemAllocHost),
        ENTRY("cuMemFreeHost", 2000, cuMemFreeHost),
        ENTRY("cuMemcpyAsync", 4000, cuMemcpyAsync),
        ENTRY("cuMemsetD8Async", 3020, set<uint8_t>),
        ENTRY("cuMemsetD16Async", 3020, set<uint16_t>),
        ENTRY("cuMemsetD32Async", 3020, set<uint32_t>),
        ENTRY("cuMemGetInfo", 3020, cuMemGetInfo),
        ENTRY("cuMemPoolCreate", 11020, cuMemPoolCreate),
        ENTRY("cuMemPoolDestroy", 11020, cuMemPoolDestroy),
        ENTRY("cuDeviceGetMemPool", 11020, cuDeviceGetMemPool),
        ENTRY("cuDeviceGetDefaultMemPool", 11020, cuDeviceGetMemPool),
        ENTRY("cuMemPoolSetAccess", 11020, cuMemPoolSetAccess),
        ENTRY("cuMemPoolGetAttribute", 11020, cuMemPoolGetAttribute),
        ENTRY("cuMemPoolSetAttribute", 11020, cuMemPoolSetAttribute),
    };
    return entries;
}
