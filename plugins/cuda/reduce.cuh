// Sums over a warp and over a block, always in the same order: the same bits at every launch.
#pragma once

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int MOST_WARPS = 32;  // in a block of 1024 threads, the largest there is

// Every lane gets the sums over the lanes of its warp, which must all be here.
template <int COUNT>
__device__ inline void sum_over_warp(float (&sums)[COUNT]) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sums[i] += __shfl_xor_sync(ALL_LANES, sums[i], step);
    }
}

// Every thread gets the sums over the threads of its block, which must all be here.
template <int COUNT>
__device__ inline void sum_over_block(float (&sums)[COUNT]) {
    __shared__ float of_warps[MOST_WARPS][COUNT];
    sum_over_warp(sums);
    const int warp = threadIdx.x / WARP;
    if (threadIdx.x % WARP == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) of_warps[warp][i] = sums[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        float total = 0.0f;
        for (int w = 0; w < static_cast<int>(blockDim.x) / WARP; ++w) total += of_warps[w][i];
        sums[i] = total;
    }
    __syncthreads();  // of_warps may be used again
}
