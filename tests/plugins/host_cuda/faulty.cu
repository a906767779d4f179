// Kernels with the faults that the CPU's stand-in must find. Each takes values (n,), as many as the block has threads.

// Half of the threads don't come to the barrier.
extern "C" __global__ void faulty_barrier(float* values) {
    if (threadIdx.x < blockDim.x / 2) __syncthreads();
    values[threadIdx.x] = 0.0f;
}

// Half of a warp's lanes don't come to the shuffle.
extern "C" __global__ void faulty_shuffle(float* values) {
    if (threadIdx.x % 2 == 0) values[threadIdx.x] = __shfl_xor_sync(0xffffffffu, values[threadIdx.x], 2);
}

// Writes one place before the start.
extern "C" __global__ void faulty_write(float* values) { (values - 1)[threadIdx.x] = 0.0f; }

// Reads one place past the end, and does nothing with it.
extern "C" __global__ void faulty_read(float* values) {
    const volatile float unused = values[threadIdx.x + 1];
    (void)unused;
}

// Reads what another warp has written, with no barrier between: what it finds depends on who was first.
extern "C" __global__ void faulty_race(float* values) {
    __shared__ float shared[1024];
    shared[threadIdx.x] = values[threadIdx.x];
    values[threadIdx.x] = shared[(threadIdx.x + 32) % blockDim.x];
    __syncthreads();
    shared[threadIdx.x] = -1.0f;
}
