// The device, its one context, errors, and the door through which all functions are handed out.
#include "driver.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace {

int context;  // its address is the context's handle
thread_local int* current = nullptr;

Result cuInit(unsigned) { return setting("STAND_IN_DEVICES", 1) ? SUCCESS : NO_DEVICE; }

Result cuDriverGetVersion(int* version) {
    *version = static_cast<int>(setting("STAND_IN_DRIVER_VERSION", 13000));
    return SUCCESS;
}

Result cuDeviceGetCount(int* count) {
    *count = static_cast<int>(setting("STAND_IN_DEVICES", 1));
    return SUCCESS;
}

Result cuDeviceGet(int* handle, int ordinal) {
    *handle = ordinal;
    return ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}

Result cuDeviceGetName(char* name, int size, int) {
    snprintf(name, static_cast<size_t>(size), "stand-in");
    return SUCCESS;
}

Result cuDeviceGetUuid(char* uuid, int) {
    memset(uuid, 7, 16);
    return SUCCESS;
}

Result cuDeviceTotalMem(size_t* bytes, int) {
    *bytes = total_memory();
    return SUCCESS;
}

Result cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {  // CUdevice_attribute
        case 1: *value = 1024; break;        // threads of a block
        case 8: *value = 48 << 10; break;    // shared memory of a block
        case 10: *value = 32; break;         // threads of a warp
        case 16: *value = 132; break;        // multiprocessors
        case 38: *value = 50 << 20; break;   // L2
        case 39: *value = 2048; break;       // threads of a multiprocessor
        case 41: *value = 1; break;          // one address space with the host
        case 75: *value = static_cast<int>(setting("STAND_IN_SM", 90) / 10); break;
        case 76: *value = static_cast<int>(setting("STAND_IN_SM", 90) % 10); break;
        case 97: *value = 227 << 10; break;  // shared memory of a block that asks for it
        case 115: *value = 1; break;         // memory pools
        default: *value = 0;
    }
    return SUCCESS;
}

Result cuDevicePrimaryCtxRetain(int** out, int) {
    *out = &context;
    return SUCCESS;
}

Result cuDevicePrimaryCtxRelease(int) { return SUCCESS; }

Result cuCtxGetCurrent(int** out) {
    *out = current;
    return SUCCESS;
}

Result cuCtxSetCurrent(int* handle) {
    current = handle;
    return SUCCESS;
}

Result cuCtxGetDevice(int* out) {
    *out = 0;
    return current ? SUCCESS : static_cast<Result>(201);  // invalid context
}

Result cuCtxGetDevice_v2(int* out, int*) {
    *out = 0;
    return SUCCESS;
}

Result cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = *greatest = 0;
    return SUCCESS;
}

Result cuStreamGetCtx(Stream*, int** out) {
    *out = &context;
    return SUCCESS;
}

Result cuStreamGetCtx_v2(Stream*, int** out, void** green) {
    *out = &context;
    *green = nullptr;
    return SUCCESS;
}

Result cuStreamGetDevice(Stream*, int* out) {
    *out = 0;
    return SUCCESS;
}

const std::pair<int, const char*> error_names[] = {
    {SUCCESS, "CUDA_SUCCESS"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
    {INVALID_PTX, "CUDA_ERROR_INVALID_PTX"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
    {NOT_READY, "CUDA_ERROR_NOT_READY"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
};

Result cuGetErrorName(int error, const char** name) {
    for (const auto& [value, text] : error_names) {
        if (value == error) {
            *name = text;
            return SUCCESS;
        }
    }
    return INVALID_VALUE;
}

// Functions of the driver that are not here say so when they are called, not when they are looked up.
constexpr int MOST_MISSING = 640;
std::vector<std::string> missing_names;

template <int index>
Result missing() {
    complain("%s is not in the stand-in driver", missing_names[index].c_str());
    return NOT_SUPPORTED;
}

template <int... indices>
void* missing_function(int index, std::integer_sequence<int, indices...>) {
    static void* const functions[] = {reinterpret_cast<void*>(missing<indices>)...};
    return functions[index];
}

void* function_named(const std::string& name, int version) {
    void* best = nullptr;
    int best_version = -1;
    for (const auto* entries :
         {&device_entries(), &memory_entries(), &stream_entries(), &graph_entries(), &kernel_entries(),
          &condition_entries()}) {
        for (const Entry& entry : *entries) {
            if (name == entry.name && entry.version <= version && entry.version > best_version) {
                best = entry.function;
                best_version = entry.version;
            }
        }
    }
    if (best) return best;
    missing_names.push_back(name);
    return missing_function(static_cast<int>(missing_names.size()) - 1,
                            std::make_integer_sequence<int, MOST_MISSING>());
}

void say(const char* format, va_list arguments) {
    char text[512];
    vsnprintf(text, sizeof text, format, arguments);
    fprintf(stderr, "stand-in driver: %s\n", text);
}

}  // namespace

Device& device() {
    static Device* const only = new Device;  // never destroyed: Python's last objects go after static ones would
    return *only;
}

long setting(const char* name, long otherwise) {
    const char* const value = getenv(name);
    return value ? atol(value) : otherwise;
}

void complain(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    say(format, arguments);
    va_end(arguments);
}

void fail(Result failure, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    say(format, arguments);
    va_end(arguments);
    if (device().failure == SUCCESS) device().failure = failure;
}

const std::vector<Entry>& device_entries() {
    static const std::vector<Entry> entries{
        ENTRY("cuInit", 2000, cuInit),
        ENTRY("cuDriverGetVersion", 2020, cuDriverGetVersion),
        ENTRY("cuDeviceGetCount", 2000, cuDeviceGetCount),
        ENTRY("cuDeviceGet", 2000, cuDeviceGet),
        ENTRY("cuDeviceGetName", 2000, cuDeviceGetName),
        ENTRY("cuDeviceGetUuid", 9020, cuDeviceGetUuid),
        ENTRY("cuDeviceTotalMem", 3020, cuDeviceTotalMem),
        ENTRY("cuDeviceGetAttribute", 2000, cuDeviceGetAttribute),
        ENTRY("cuDevicePrimaryCtxRetain", 7000, cuDevicePrimaryCtxRetain),
        ENTRY("cuDevicePrimaryCtxRelease", 7000, cuDevicePrimaryCtxRelease),
        ENTRY("cuCtxGetCurrent", 4000, cuCtxGetCurrent),
        ENTRY("cuCtxSetCurrent", 4000, cuCtxSetCurrent),
        ENTRY("cuCtxGetDevice", 2000, cuCtxGetDevice),
        ENTRY("cuCtxGetDevice", 13000, cuCtxGetDevice_v2),
        ENTRY("cuCtxGetStreamPriorityRange", 5050, cuCtxGetStreamPriorityRange),
        ENTRY("cuStreamGetCtx", 9020, cuStreamGetCtx),
        ENTRY("cuStreamGetCtx", 12050, cuStreamGetCtx_v2),
        ENTRY("cuStreamGetDevice", 12080, cuStreamGetDevice),
        ENTRY("cuGetErrorName", 6000, cuGetErrorName),
        ENTRY("cuGetErrorString", 6000, cuGetErrorName),
    };
    return entries;
}

extern "C" int cuGetProcAddress_v2(const char* name, void** out, int version, uint64_t, int* status) {
    auto lock = locked();
    *out = function_named(name, version);
    if (status) *status = 0;
    return SUCCESS;
}

// What a test asks: how often something happened, or how much of it is alive. Runs nothing.
extern "C" long stand_in_count(const char* what) {
    auto lock = locked();
    return device().counts[what];
}
