// Kernels: looked up by name in the shared library of tests/plugins/host_cuda, which holds the same sources compiled for
// the host. The PTX says which kernels a library has and how large their parameters are.
#include "driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <map>

namespace {

struct Kernel {
    std::string name;
    std::vector<size_t> parameters;  // bytes of each
    int most_shared_bytes = 48 << 10;
};

struct Library {
    std::map<std::string, Kernel> kernels;
};

// Of tests/plugins/host_cuda/runner.cpp. The seed shuffles the order of blocks, warps and lanes.
using RunKernel = int (*)(const char* name, const unsigned* grid, const unsigned* block, unsigned shared_bytes,
                          void** arguments, unsigned long long seed);

using ConditionSet = int (*)(unsigned number, unsigned long long* handle, unsigned* value);

struct Runner {
    RunKernel run;
    ConditionSet condition_set;
};

Runner runner() {
    static const Runner found = [] {
        const char* const path = getenv("STAND_IN_KERNELS");
        void* const library = path ? dlopen(path, RTLD_NOW) : nullptr;
        if (!library) complain("STAND_IN_KERNELS=%s can't be loaded: %s", path ? path : "", path ? dlerror() : "unset");
        if (!library) return Runner{};
        return Runner{reinterpret_cast<RunKernel>(dlsym(library, "run_kernel")),
                      reinterpret_cast<ConditionSet>(dlsym(library, "condition_set"))};
    }();
    return found;
}

// `.param .u64 .ptr .align 1 name_param_0` has 8 bytes, `.param .align 8 .b8 name_param_1[16]` has 16.
size_t bytes_of(const std::string& parameter) {
    for (const char* const type : {".u", ".s", ".b", ".f"}) {
        const size_t at = parameter.find(type);
        if (at == std::string::npos) continue;
        const size_t bracket = parameter.find('[');
        const size_t elements = bracket == std::string::npos ? 1 : std::stoul(parameter.substr(bracket + 1));
        return std::stoul(parameter.substr(at + 2)) / 8 * elements;
    }
    return 0;
}

std::vector<size_t> parameters_of(const std::string& declaration) {
    std::vector<size_t> sizes;
    for (size_t at = declaration.find(".param "); at != std::string::npos;) {
        const size_t next = declaration.find(".param ", at + 1);
        sizes.push_back(bytes_of(declaration.substr(at + 6, next == std::string::npos ? next : next - at - 6)));
        at = next;
    }
    return sizes;
}

Result cuLibraryLoadData(Library** out, const char* code, void*, void**, unsigned, void*, void**, unsigned) {
    auto lock = locked();
    const std::string text = code, mark = ".entry ";
    auto* const library = new Library;
    for (size_t at = text.find(mark); at != std::string::npos; at = text.find(mark, at + 1)) {
        const size_t start = at + mark.size(), open = text.find('(', start), close = text.find(')', open);
        const std::string name = text.substr(start, open - start);
        library->kernels[name] = Kernel{name, parameters_of(text.substr(open, close - open))};
    }
    *out = library;
    if (library->kernels.empty()) {
        delete library;
        return INVALID_PTX;
    }
    count("live_libraries");
    return SUCCESS;
}

Result cuLibraryUnload(Library* library) {
    auto lock = locked();
    delete library;
    count("live_libraries", -1);
    return SUCCESS;
}

Result cuLibraryGetKernel(Kernel** out, Library* library, const char* name) {
    auto lock = locked();
    const auto found = library->kernels.find(name);
    if (found == library->kernels.end()) return NOT_FOUND;
    *out = &found->second;
    return SUCCESS;
}

Result cuKernelSetAttribute(int attribute, int value, Kernel* kernel, int) {
    auto lock = locked();
    constexpr int MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;
    if (attribute == MAX_DYNAMIC_SHARED_SIZE_BYTES) kernel->most_shared_bytes = value;
    return SUCCESS;
}

struct LaunchConfig {  // CUlaunchConfig
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    Stream* stream;
    void* attributes;
    unsigned attribute_count;
};

bool is_launchable(const LaunchConfig& config, const Kernel& kernel) {
    const uint64_t threads = uint64_t{config.block[0]} * config.block[1] * config.block[2];
    const uint64_t blocks = uint64_t{config.grid[0]} * config.grid[1] * config.grid[2];
    return threads > 0 && threads <= 1024 && blocks > 0 && config.grid[0] < (1u << 31) && config.grid[1] < 65536 &&
           config.grid[2] < 65536 && static_cast<int>(config.shared_bytes) <= kernel.most_shared_bytes;
}

struct Call {  // with the arguments as they are now: the caller's memory is its own again at once
    Kernel kernel;
    LaunchConfig config;
    std::vector<std::vector<uint64_t>> values;

    void run() {
        std::vector<void*> arguments;
        for (auto& value : values) arguments.push_back(value.data());
        const auto [run_kernel, condition_set] = runner();
        count("kernels");  // also the seed, so that no two launches run in the same order
        const auto seed = static_cast<unsigned long long>(device().counts["kernels"]);
        if (!run_kernel || run_kernel(kernel.name.c_str(), config.grid, config.block, config.shared_bytes,
                                      arguments.data(), seed)) {
            return fail(LAUNCH_FAILED, "kernel %s did not run", kernel.name.c_str());
        }
        unsigned long long handle;
        unsigned value;
        for (unsigned number = 0; condition_set(number, &handle, &value); ++number) {
            if (number) return fail(LAUNCH_FAILED, "threads of kernel %s race to set a condition", kernel.name.c_str());
            set_condition(handle, value);
        }
    }
};

Result cuLaunchKernelEx(const LaunchConfig* config, Kernel* kernel, void** arguments, void**) {
    auto lock = locked();
    if (!is_launchable(*config, *kernel)) {
        complain("%s can't be launched with its grid, block or shared memory", kernel->name.c_str());
        return INVALID_VALUE;
    }
    auto call = std::make_shared<Call>(Call{*kernel, *config, {}});
    for (size_t i = 0; i < kernel->parameters.size(); ++i) {
        call->values.emplace_back((kernel->parameters[i] + 7) / 8);
        memcpy(call->values.back().data(), arguments[i], kernel->parameters[i]);
    }
    return submit(config->stream, KERNEL, [call] { call->run(); });
}

}  // namespace

const std::vector<Entry>& kernel_entries() {
    static const std::vector<Entry> entries{
        ENTRY("cuLibraryLoadData", 12000, cuLibraryLoadData),
        ENTRY("cuLibraryUnload", 12000, cuLibraryUnload),
        ENTRY("cuLibraryGetKernel", 12000, cuLibraryGetKernel),
        ENTRY("cuKernelSetAttribute", 12000, cuKernelSetAttribute),
        ENTRY("cuLaunchKernelEx", 11060, cuLaunchKernelEx),
    };
    return entries;
}
