// Kernels over latent images, a few thousand float32 each: plugins/oracle.py::extrapolate and ::output_error.
#include "elements.cuh"
#include "reduce.cuh"

constexpr int COLUMNS = 5;        // of the sampler's table: core/samplers.py::COLUMNS

// latents, noise, latents_out, model_output (B, elements); history (T, B, elements); factors (T,); step (1,): a row of
// coefficients (S, 5). Grid: blocks of an image × images.
extern "C" __global__ void __launch_bounds__(256)
    adacorr_extrapolate(const float* latents, const float* history, const float* factors, const long long* step,
                        const float* coefficients, const float* noise, int elements, int evaluations,
                        float* latents_out, float* model_output) {
    const float* const of = coefficients + step[0] * COLUMNS;  // of the latents, of the output, of the noise
    const long long stride = static_cast<long long>(gridDim.y) * elements;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += gridDim.x * blockDim.x) {
        const long long place = static_cast<long long>(blockIdx.y) * elements + i;
        float output = 0.0f;
        for (int t = 0; t < evaluations; ++t) output = fmaf(factors[t], history[t * stride + place], output);
        const float mean = fmaf(of[1], output, of[0] * latents[place]);
        model_output[place] = output;
        latents_out[place] = fmaf(of[2], noise[place], mean);
    }
}

// predicted, fresh (B, elements); error (B,). Grid: 1 × images.
extern "C" __global__ void __launch_bounds__(512)
    adacorr_output_error(const float* predicted, const float* fresh, int elements, float* error) {
    predicted += static_cast<long long>(blockIdx.y) * elements;
    fresh += static_cast<long long>(blockIdx.y) * elements;
    float sums[2] = {};
    for (int i = threadIdx.x; i < elements; i += blockDim.x) {
        const float difference = predicted[i] - fresh[i];
        sums[0] = fmaf(difference, difference, sums[0]);
        sums[1] = fmaf(fresh[i], fresh[i], sums[1]);
    }
    sum_over_block(sums);
    if (threadIdx.x == 0) {  // a sum that overflows could give x/inf = 0, which would pass for a perfect prediction
        error[blockIdx.y] = is_finite(sums[1]) ? sqrtf(sums[0]) / (sqrtf(sums[1]) + EPSILON) : sums[1];
    }
}
