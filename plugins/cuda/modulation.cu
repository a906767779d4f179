// What a block part's first unit computes on, and a linear probe of its mean: plugins/oracle.py::modulated and ::probe.
//
// A warp takes a token. The probe needs no modulated token: Σ_d wᵈ·(x̂ᵈ·(1 + scaleᵈ) + shiftᵈ) is linear in the
// normalised x̂, so four sums over the token's channels give it.
#include "elements.cuh"
#include "reduce.cuh"

constexpr float NORM_EPSILON = 1e-6f;  // plugins/oracle.py::NORM_EPSILON

// A row's modulation at this step: shift and scale of its first unit, (D) each. `rows` is 3U.
template <typename E>
struct Modulation {
    const E *shift, *scale;

    __device__ Modulation(const E* modulation, const long long* step, int rows, int width)
        : shift(modulation + (step[0] * gridDim.y + blockIdx.y) * rows * width), scale(shift + width) {}
};

struct Norm {
    float mean, rate;  // x̂ = (x − mean)·rate

    // From Σ(x − s) and Σ(x − s)²: s is one of the x, so the difference below loses little (signals.cu).
    __device__ Norm(float sum, float sum_of_squares, float shift, float width) {
        const float above = sum / width;
        mean = shift + above;
        rate = 1.0f / sqrtf(fmaxf(sum_of_squares / width - above * above, 0.0f) + NORM_EPSILON);
    }
};

template <typename E, int W>
__device__ void modulate_token(const E* token, const Modulation<E>& of, int width, E* out) {
    const float shift = to_float(token[0]);
    float sums[2] = {};
    for (int channel = threadIdx.x % WARP * W; channel < width; channel += WARP * W) {
        float x[W];
        unpack(load<E, W>(token + channel), x);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            sums[0] += x[k] - shift;
            sums[1] = fmaf(x[k] - shift, x[k] - shift, sums[1]);
        }
    }
    sum_over_warp(sums);
    const Norm norm(sums[0], sums[1], shift, static_cast<float>(width));
    for (int channel = threadIdx.x % WARP * W; channel < width; channel += WARP * W) {
        float x[W], scales[W], shifts[W];
        unpack(load<E, W>(token + channel), x);
        unpack(load<E, W>(of.scale + channel), scales);
        unpack(load<E, W>(of.shift + channel), shifts);
#pragma unroll
        for (int k = 0; k < W; ++k) x[k] = fmaf((x[k] - norm.mean) * norm.rate, 1.0f + scales[k], shifts[k]);
        store<E, W>(out + channel, pack<E, W>(x));
    }
}

template <typename E>
__device__ void modulate_row(const E* tokens, const E* modulation, const long long* step, int count, int width,
                             int rows, E* out) {
    const Modulation<E> of(modulation, step, rows, width);
    const long long row = static_cast<long long>(blockIdx.y) * count * width;
    const bool vectors =
        width % vector_width<E> == 0 && aligned(tokens) && aligned(modulation) && aligned(out);
    const int warps = blockDim.x / WARP;
    for (int i = blockIdx.x * warps + threadIdx.x / WARP; i < count; i += gridDim.x * warps) {
        const long long place = row + static_cast<long long>(i) * width;
        if (vectors) {
            modulate_token<E, vector_width<E>>(tokens + place, of, width, out + place);
        } else {
            modulate_token<E, 1>(tokens + place, of, width, out + place);
        }
    }
}

// Σ_d wᵈ·(1 + scaleᵈ)·x̂ᵈ of one token, in every lane.
template <typename E, int W>
__device__ float probe_token(const E* token, const Modulation<E>& of, const float* weights, int width) {
    const float shift = to_float(token[0]);
    float sums[4] = {};
    for (int channel = threadIdx.x % WARP * W; channel < width; channel += WARP * W) {
        float x[W], scales[W];
        unpack(load<E, W>(token + channel), x);
        unpack(load<E, W>(of.scale + channel), scales);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            const float above = x[k] - shift, weight = weights[channel + k] * (1.0f + scales[k]);
            sums[0] += above;
            sums[1] = fmaf(above, above, sums[1]);
            sums[2] = fmaf(weight, above, sums[2]);
            sums[3] += weight;
        }
    }
    sum_over_warp(sums);
    const Norm norm(sums[0], sums[1], shift, static_cast<float>(width));
    return (sums[2] - (norm.mean - shift) * sums[3]) * norm.rate;
}

// One block for a row: its sum has a fixed order, and no scratch is needed.
template <typename E>
__device__ void probe_row(const E* tokens, const E* modulation, const long long* step, const float* weights,
                          const float* bias, int count, int width, int rows, float* probe) {
    const Modulation<E> of(modulation, step, rows, width);
    const E* const row = tokens + static_cast<long long>(blockIdx.y) * count * width;
    const bool vectors = width % vector_width<E> == 0 && aligned(tokens) && aligned(modulation);
    float sums[2] = {};  // over tokens, of the normalised; over channels, of the shift
    for (int i = threadIdx.x / WARP; i < count; i += blockDim.x / WARP) {
        const E* const token = row + static_cast<long long>(i) * width;
        const float value = vectors ? probe_token<E, vector_width<E>>(token, of, weights, width)
                                    : probe_token<E, 1>(token, of, weights, width);
        if (threadIdx.x % WARP == 0) sums[0] += value;
    }
    for (int channel = threadIdx.x; channel < width; channel += blockDim.x) {
        sums[1] = fmaf(weights[channel], to_float(of.shift[channel]), sums[1]);
    }
    sum_over_block(sums);
    if (threadIdx.x == 0) probe[blockIdx.y] = sums[0] / static_cast<float>(count) + sums[1] + bias[0];
}

// tokens, tokens_out (R, N, D), modulation (S, R, rows, D), step (1,). Grid: blocks of a row × rows, of whole warps.
#define MODULATED(NAME, ELEMENT)                                                                                  \
    extern "C" __global__ void __launch_bounds__(1024)                                                            \
        adacorr_modulated_##NAME(const ELEMENT* tokens, const ELEMENT* modulation, const long long* step,         \
                                 int count, int width, int rows, ELEMENT* tokens_out) {                           \
        modulate_row<ELEMENT>(tokens, modulation, step, count, width, rows, tokens_out);                          \
    }
MODULATED(float32, float)
MODULATED(float16, Float16)
MODULATED(bfloat16, BFloat16)
#undef MODULATED

// As above, with weights (D) and bias (1,); probe (R,). Grid: 1 × rows.
#define PROBE(NAME, ELEMENT)                                                                                      \
    extern "C" __global__ void __launch_bounds__(512, 1)                                                         \
        adacorr_probe_##NAME(const ELEMENT* tokens, const ELEMENT* modulation, const long long* step,             \
                             const float* weights, const float* bias, int count, int width, int rows,             \
                             float* probe) {                                                                      \
        probe_row<ELEMENT>(tokens, modulation, step, weights, bias, count, width, rows, probe);                   \
    }
PROBE(float32, float)
PROBE(float16, Float16)
PROBE(bfloat16, BFloat16)
#undef PROBE
