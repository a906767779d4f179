// What a slot says a block or a span would give, and its blend with a fresh output: plugins/oracle.py::predict, ::blend
// and ::combine.
//
// A thread takes the same channels of a few tokens, so that it makes their weights c·g once, adds every kept result to
// them in float32 and writes them once: one pass over everything, the residual's add fused in.
#include "elements.cuh"

constexpr int TOKENS = 2;  // of a thread
constexpr int THREADS = 128;
constexpr int BLOCKS = 7;  // of a multiprocessor: leaves 72 registers, enough for all of a pair's loads at once

// A slot: `history` (T, U, R, N, D) of results before their gates, `modulation` (S, R, 3U, D), and for each of the T
// evaluations its row of `modulation` and its coefficient. R is the grid's height.
template <typename E>
struct Slot {
    const E* history;
    const E* modulation;
    const long long* gate_steps;
    const float* coefficients;
    int tokens, width, evaluations, units;
};

template <typename E, int W>
__device__ inline void add_weighted(float (&sums)[W], const float (&weights)[W], const Raw<E, W>& raw) {
    float values[W];
    unpack(raw, values);
#pragma unroll
    for (int k = 0; k < W; ++k) sums[k] = fmaf(weights[k], values[k], sums[k]);
}

// Adds Σᵤ (c·gateᵤ) ⊙ results[u] of UNITS units to the sums of tokens, whose places in a row are given: the loads are all
// under way before any of them is used. `gates` points at the first unit's; each unit has three rows of modulation.
template <typename E, int W, int UNITS>
__device__ inline void add_units(float (&sums)[TOKENS][W], const E* results, const E* gates_of_units, float coefficient,
                                 long long stride, int width, const int (&places)[TOKENS]) {
    Raw<E, W> raw[UNITS][TOKENS], gates[UNITS];
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) raw[unit][i] = load<E, W>(results + unit * stride + places[i]);
        gates[unit] = load<E, W>(gates_of_units + 3 * unit * width);
    }
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
        float weights[W];
        unpack(gates[unit], weights);
#pragma unroll
        for (int k = 0; k < W; ++k) weights[k] *= coefficient;
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) add_weighted(sums[i], weights, raw[unit][i]);
    }
}

// Adds Σₜ Σᵤ (cₜ·gateᵤ) ⊙ history[t, u] to the sums of tokens. Units come in pairs, the attention and the MLP of a
// transformer block, or alone, where a part is a half of one.
template <typename E, int W>
__device__ inline void add_history(float (&sums)[TOKENS][W], const Slot<E>& slot, const int (&places)[TOKENS],
                                   int channel) {
    const long long row_size = static_cast<long long>(slot.tokens) * slot.width, stride = gridDim.y * row_size;
    const E* results = slot.history + blockIdx.y * row_size;
    for (int evaluation = 0; evaluation < slot.evaluations; ++evaluation) {
        const float coefficient = slot.coefficients[evaluation];
        const long long row = slot.gate_steps[evaluation] * gridDim.y + blockIdx.y;
        const E* gates = slot.modulation + (row * 3 * slot.units + 2) * slot.width + channel;
        int left = slot.units;
#pragma unroll 1
        for (; left > 1; left -= 2, results += 2 * stride, gates += 6 * slot.width) {
            add_units<E, W, 2>(sums, results, gates, coefficient, stride, slot.width, places);
        }
        if (left > 0) {
            add_units<E, W, 1>(sums, results, gates, coefficient, stride, slot.width, places);
            results += stride;
        }
    }
}

// What becomes of W elements: `cached`, `fresh`, or a mix. A weight of 0 or 1 reads one side only, so that a NaN of the
// other can't come through.
template <typename E, int W>
__device__ inline Raw<E, W> blended(const float (&cached)[W], const E* fresh, float weight) {
    if (weight <= 0.0f) return pack<E, W>(cached);
    const Raw<E, W> raw = load<E, W>(fresh);
    if (weight >= 1.0f) return raw;
    float values[W];
    unpack(raw, values);
#pragma unroll
    for (int k = 0; k < W; ++k) values[k] = fmaf(weight, values[k], (1.0f - weight) * cached[k]);
    return pack<E, W>(values);
}

// One row, W elements at a time; `fresh` may be null where the weight is 0.
template <typename E, int W>
__device__ void update_row(const E* base, const Slot<E>& slot, const E* fresh, float weight, E* out) {
    const int vectors = slot.width / W, groups = (slot.tokens + TOKENS - 1) / TOKENS;
    const long long row = static_cast<long long>(blockIdx.y) * slot.tokens * slot.width;
    for (int item = blockIdx.x * blockDim.x + threadIdx.x; item < vectors * groups; item += gridDim.x * blockDim.x) {
        const int channel = item % vectors * W, first = item / vectors * TOKENS;
        int places[TOKENS];  // past the last token, the last one again: no access needs a condition
        float sums[TOKENS][W];
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) {
            places[i] = min(first + i, slot.tokens - 1) * slot.width + channel;
        }
        if (weight < 1.0f) {
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) unpack(load<E, W>(base + row + places[i]), sums[i]);
            add_history<E, W>(sums, slot, places, channel);
        }
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) {
            const long long place = row + places[i];
            store<E, W>(out + place, blended<E, W>(sums[i], fresh + place, weight));
        }
    }
}

template <typename E>
__device__ void update(const E* base, const Slot<E>& slot, const E* fresh, float weight, E* out) {
    const bool vectors = slot.width % vector_width<E> == 0 && aligned(base) && aligned(slot.history) &&
                         aligned(slot.modulation) && aligned(fresh) && aligned(out);
    if (vectors) {
        update_row<E, vector_width<E>>(base, slot, fresh, weight, out);
    } else {
        update_row<E, 1>(base, slot, fresh, weight, out);
    }
}

// clip(γ·(ê − τ_reuse)/(τ_recompute − τ_reuse), 0, 1); 1 where that is no number, or the estimate is not finite.
__device__ inline float weight_of(float estimate, const float* thresholds) {
    const float raw = thresholds[2] * (estimate - thresholds[0]) / (thresholds[1] - thresholds[0]);
    return is_finite(estimate) && raw < 1.0f ? fmaxf(raw, 0.0f) : 1.0f;
}

// tokens, tokens_out (R, N, D); the rest as in Slot. Grid: blocks of a row × rows.
#define PREDICT(NAME, ELEMENT)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                    \
        adacorr_predict_##NAME(const ELEMENT* tokens, const ELEMENT* history, const ELEMENT* modulation,             \
                               const long long* gate_steps, const float* coefficients, int count, int width,         \
                               int evaluations, int units, ELEMENT* tokens_out) {                                    \
        const Slot<ELEMENT> slot{history, modulation, gate_steps, coefficients, count, width, evaluations, units};   \
        update<ELEMENT>(tokens, slot, nullptr, 0.0f, tokens_out);                                                    \
    }
PREDICT(float32, float)
PREDICT(float16, Float16)
PREDICT(bfloat16, BFloat16)
#undef PREDICT

// As predict over `base`, with fresh (R, N, D), estimate (R,), thresholds (τ_reuse, τ_recompute, γ) and weight (R,).
#define BLEND(NAME, ELEMENT)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                    \
        adacorr_blend_##NAME(const ELEMENT* base, const ELEMENT* history, const ELEMENT* modulation,                 \
                             const long long* gate_steps, const float* coefficients, const ELEMENT* fresh,           \
                             const float* estimate, const float* thresholds, int count, int width, int evaluations,  \
                             int units, ELEMENT* tokens_out, float* weight) {                                        \
        const Slot<ELEMENT> slot{history, modulation, gate_steps, coefficients, count, width, evaluations, units};   \
        const float share = weight_of(estimate[blockIdx.y], thresholds);                                             \
        if (blockIdx.x == 0 && threadIdx.x == 0) weight[blockIdx.y] = share;                                         \
        update<ELEMENT>(base, slot, fresh, share, tokens_out);                                                       \
    }
BLEND(float32, float)
BLEND(float16, Float16)
BLEND(bfloat16, BFloat16)
#undef BLEND

// A span's residuals: `history` (T, R, N, D) with a coefficient each, `scale` and `shift` (D).
template <typename E>
struct Residuals {
    const E* history;
    const float *coefficients, *scale, *shift;
    int tokens, width, evaluations;
};

// base + scale ⊙ Σₜ cₜ·history[t] + shift for one row, W elements at a time. A coefficient of ±1, a scale of 1 and a
// shift of 0 leave a residual's bits as they are.
template <typename E, int W>
__device__ void combine_row(const E* base, const Residuals<E>& of, E* out) {
    const int vectors = of.width / W, groups = (of.tokens + TOKENS - 1) / TOKENS;
    const long long row_size = static_cast<long long>(of.tokens) * of.width, row = blockIdx.y * row_size;
    for (int item = blockIdx.x * blockDim.x + threadIdx.x; item < vectors * groups; item += gridDim.x * blockDim.x) {
        const int channel = item % vectors * W, first = item / vectors * TOKENS;
        float summed[TOKENS][W] = {};
        int places[TOKENS];  // past the last token, the last one again, as in update_row
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) places[i] = min(first + i, of.tokens - 1) * of.width + channel;
        for (int t = 0; t < of.evaluations; ++t) {
            const E* const results = of.history + t * (gridDim.y * row_size) + row;
            float weights[W];
#pragma unroll
            for (int k = 0; k < W; ++k) weights[k] = of.coefficients[t] * of.scale[channel + k];
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) add_weighted(summed[i], weights, load<E, W>(results + places[i]));
        }
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) {
            float values[W];
            unpack(load<E, W>(base + row + places[i]), values);
#pragma unroll
            for (int k = 0; k < W; ++k) values[k] = values[k] + summed[i][k] + of.shift[channel + k];
            store<E, W>(out + row + places[i], pack<E, W>(values));
        }
    }
}

// base, tokens_out (R, N, D); the rest as in Residuals. Grid: blocks of a row × rows.
#define COMBINE(NAME, ELEMENT)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
        adacorr_combine_##NAME(const ELEMENT* base, const ELEMENT* history, const float* coefficients,               \
                               const float* scale, const float* shift, int count, int width, int evaluations,        \
                               ELEMENT* tokens_out) {                                                                \
        const Residuals<ELEMENT> of{history, coefficients, scale, shift, count, width, evaluations};                 \
        const bool vectors = width % vector_width<ELEMENT> == 0 && aligned(base) && aligned(history) &&              \
                             aligned(tokens_out);                                                                    \
        if (vectors) {                                                                                               \
            combine_row<ELEMENT, vector_width<ELEMENT>>(base, of, tokens_out);                                       \
        } else {                                                                                                     \
            combine_row<ELEMENT, 1>(base, of, tokens_out);                                                           \
        }                                                                                                            \
    }
COMBINE(float32, float)
COMBINE(float16, Float16)
COMBINE(bfloat16, BFloat16)
#undef COMBINE
