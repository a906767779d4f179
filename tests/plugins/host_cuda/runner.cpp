// The library that tests load: every kernel by its name, its arguments as cuLaunchKernel takes them.
#include <cstring>
#include <mutex>
#include <utility>

#include "device.h"

#include "kernels.cu"

#include "decisions.cu"

#include "faulty.cu"

namespace {

template <auto KERNEL>
struct Call;

template <typename... Arguments, void (*KERNEL)(Arguments...)>
struct Call<KERNEL> {
    template <std::size_t... I>
    static void with(void** arguments, std::index_sequence<I...>) {
        KERNEL(*static_cast<Arguments*>(arguments[I])...);
    }
    static void run(void** arguments) { with(arguments, std::index_sequence_for<Arguments...>{}); }
};

struct Entry {
    const char* name;
    host_cuda::Kernel kernel;
    int arguments;
};

template <typename... Arguments>
constexpr int argument_count(void (*)(Arguments...)) {
    return sizeof...(Arguments);
}

#define ENTRY(NAME) {#NAME, Call<NAME>::run, argument_count(NAME)}
#define ENTRIES(NAME) ENTRY(NAME##_float32), ENTRY(NAME##_float16), ENTRY(NAME##_bfloat16)
constexpr Entry KERNELS[] = {
    ENTRIES(adacorr_signals),   ENTRIES(adacorr_predict),    ENTRIES(adacorr_blend),
    ENTRIES(adacorr_combine),   ENTRIES(adacorr_modulated),  ENTRIES(adacorr_probe),
    ENTRY(adacorr_extrapolate), ENTRY(adacorr_output_error), ENTRY(adacorr_philox_normal),
    ENTRY(adacorr_decide),      ENTRY(adacorr_note_evaluation),
    ENTRY(faulty_barrier),      ENTRY(faulty_shuffle),       ENTRY(faulty_write),
    ENTRY(faulty_read),         ENTRY(faulty_race),
};

std::mutex one_at_a_time;  // the threads of a grid share globals
thread_local const char* error_text = "";

const Entry* entry_named(const char* name) {
    for (const Entry& entry : KERNELS) {
        if (std::strcmp(entry.name, name) == 0) return &entry;
    }
    return nullptr;
}

}  // namespace

extern "C" {

// How many arguments a kernel takes; -1 if there is none of that name.
int kernel_arguments(const char* name) {
    const Entry* const entry = entry_named(name);
    return entry == nullptr ? -1 : entry->arguments;
}

// The name of the kernel with this number, from 0 on; null past the last.
const char* kernel_name(unsigned number) {
    return number < sizeof KERNELS / sizeof *KERNELS ? KERNELS[number].name : nullptr;
}

// Runs a kernel over a grid, in an order of blocks, warps and lanes that `seed` shuffles (0: as numbered). `arguments`
// point at the values, as for cuLaunchKernel. Returns 0, or 1 with the reason in last_error().
int run_kernel(const char* name, const unsigned grid[3], const unsigned block[3], unsigned shared_bytes,
               void** arguments, unsigned long long seed) {
    const Entry* const entry = entry_named(name);
    error_text = entry == nullptr ? "there is no kernel of that name" : "";
    if (shared_bytes != 0) error_text = "these kernels take no dynamic shared memory";
    if (*error_text != 0) return 1;
    const std::lock_guard<std::mutex> guard(one_at_a_time);
    const char* const error = host_cuda::run_grid(
        entry->kernel, arguments, dim3{grid[0], grid[1], grid[2]}, dim3{block[0], block[1], block[2]}, seed);
    if (error != nullptr) error_text = error;
    return error != nullptr;
}

// Whether the last run told more than `number` conditions something, and what the next of them was told, in their order.
int condition_set(unsigned number, unsigned long long* handle, unsigned* value) {
    const auto& all = host_cuda::conditions();
    if (number >= all.size()) return 0;
    *handle = all[number].handle;
    *value = all[number].value;
    return 1;
}

const char* last_error() { return error_text; }

// The number formats by themselves, for a test over all their values.
float half_to_float(unsigned short bits) { return float_from_half_bits(bits); }
unsigned short float_to_half(float value) { return half_bits_from_float(value); }
unsigned short float_to_bfloat(float value) { return bfloat_bits_from_float(value); }
}
