// Kernels over latent images, a few thousand float32 each: plugins/oracle.py::extrapolate and ::output_error.
#include "elements.cuh"
#include "reduce.cuh"

constexpr int COLUMNS = 8;  // of the sampler's table: core/sampler_rows.py::COLUMNS
constexpr int LATENTS = 0, OUTPUT = 1, NOISE = 2, CARRIED = 5, CARRIED_OF_LATENTS = 6, CARRIED_OF_OUTPUT = 7;

// latents, noise, carried and the three results (B, elements); history (T, B, elements); factors (T,); step (1,): a row
// of coefficients (S, 8). Grid: blocks of an image × images.
extern "C" __global__ void __launch_bounds__(256)
    adacorr_extrapolate(const float* latents, const float* history, const float* factors, const long long* step,
                        const float* coefficients, const float* noise, const float* carried, int elements,
                        int evaluations, float* latents_out, float* model_output, float* carried_out) {
    const float* const of = coefficients + step[0] * COLUMNS;
    const long long stride = static_cast<long long>(gridDim.y) * elements;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += gridDim.x * blockDim.x) {
        const long long place = static_cast<long long>(blockIdx.y) * elements + i;
        float output = 0.0f;
        for (int t = 0; t < evaluations; ++t) output = fmaf(factors[t], history[t * stride + place], output);
        const float now = latents[place];
        const float mean = fmaf(of[CARRIED], carried[place], fmaf(of[OUTPUT], output, of[LATENTS] * now));
        model_output[place] = output;
        latents_out[place] = fmaf(of[NOISE], noise[place], mean);
        carried_out[place] = fmaf(of[CARRIED_OF_OUTPUT], output, of[CARRIED_OF_LATENTS] * now);
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
