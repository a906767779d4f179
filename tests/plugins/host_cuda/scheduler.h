// Runs a grid on the CPU: one block at a time, its threads as fibres that change places at barriers and shuffles.
#pragma once

#include <vector>

struct dim3 {
    unsigned x, y, z;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fibre that is running

namespace host_cuda {

constexpr unsigned WARP_SIZE = 32;

// Called by kernels, in a fibre.
int wait_for_block(bool predicate);  // the number of threads whose predicate is true, once all have come
unsigned exchange_in_warp(unsigned lanes, unsigned value, unsigned mask);  // the value of lane number ^ mask

// What cudaGraphSetConditional was told in the last run, in order; the driver's stand-in acts on it after the kernel.
struct Condition {
    unsigned long long handle;
    unsigned value;
};
void set_condition(unsigned long long handle, unsigned value);
const std::vector<Condition>& conditions();

using Kernel = void (*)(void** arguments);

// Runs a grid. `seed` is 0 for blocks, warps and lanes in their order, else that of a shuffled one. Returns null, or
// what the kernel did that a GPU would punish with a hang or with garbage.
const char* run_grid(Kernel kernel, void** arguments, dim3 grid, dim3 block, unsigned long long seed);

}  // namespace host_cuda
