// How far a block's input is from the one that its slot was filled with: plugins/oracle.py::signals, in one pass.
//
// A warp takes a token and leaves eight numbers of it in the scratch; the last block of a row to finish turns those of
// all its tokens into the row's nine signals. Every sum has a fixed order that does not depend on the grid, so neither
// do the results' bits.
#include "elements.cuh"
#include "reduce.cuh"

constexpr int LOADS = 3;  // of each tensor that a lane has under way at once
constexpr int CACHED_RATIOS = 2048;

constexpr int SIGNAL_COUNT = 9;  // plugins/service_parts.py::SIGNAL_COUNT
constexpr int SUMS = 8;          // over a token's channels

struct alignas(16) TokenStatistics {  // plugins/kernels.py::TOKEN_STATISTICS floats
    float ratio;          // ‖x − x̄‖ / (‖x̄‖ + ε); inf where a number is not finite or its square is not
    float distance;       // ‖x − x̄‖
    float deviation;      // of the channels of x
    float deviation_ref;  // of the channels of x̄
    float change;         // mean over channels of |x − x̄|
    float size_ref;       // of |x̄|
    float change_square;  // of (x − x̄)²
    float square_ref;     // of x̄²
};

// E[(x − s)²] − E[x − s]² needs no second pass. s is one of the x, so the first term is at most D times the variance,
// and rounding leaves that positive for any width there is (a thousandth of it is lost at worst, for D = 10⁴).
__device__ inline float deviation_of(float sum, float sum_of_squares, float width) {
    const float mean = sum / width;
    return sqrtf(sum_of_squares / width - mean * mean);
}

template <typename E, int W>
__device__ inline void add_elements(float (&sums)[SUMS], Raw<E, W> raw, Raw<E, W> raw_ref, float shift, float shift_ref) {
    float x[W], x_ref[W];
    unpack(raw, x);
    unpack(raw_ref, x_ref);
#pragma unroll
    for (int k = 0; k < W; ++k) {
        const float difference = x[k] - x_ref[k], above = x[k] - shift, above_ref = x_ref[k] - shift_ref;
        sums[0] = fmaf(difference, difference, sums[0]);
        sums[1] = fmaf(x_ref[k], x_ref[k], sums[1]);
        sums[2] += above;
        sums[3] = fmaf(above, above, sums[3]);
        sums[4] += above_ref;
        sums[5] = fmaf(above_ref, above_ref, sums[5]);
        sums[6] += fabsf(difference);
        sums[7] += fabsf(x_ref[k]);
    }
}

// One token, by the whole warp; W elements of each tensor at a time.
template <typename E, int W>
__device__ TokenStatistics statistics_of(const E* token, const E* reference, int width) {
    const float shift = to_float(token[0]), shift_ref = to_float(reference[0]);
    float sums[SUMS] = {};
    for (int start = threadIdx.x % WARP * W; start < width; start += LOADS * WARP * W) {
        Raw<E, W> raw[LOADS], raw_ref[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int channel = start + i * WARP * W;
            if (channel < width) {
                raw[i] = load<E, W>(token + channel);
                raw_ref[i] = load<E, W>(reference + channel);
            }
        }
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            if (start + i * WARP * W < width) add_elements(sums, raw[i], raw_ref[i], shift, shift_ref);
        }
    }
    sum_over_warp(sums);
    TokenStatistics result;
    const float wide = static_cast<float>(width);
    result.distance = sqrtf(sums[0]);
    // A sum that overflows could give x/inf = 0, which would pass for "nothing changed".
    result.ratio = is_finite(sums[0]) && is_finite(sums[1]) ? result.distance / (sqrtf(sums[1]) + EPSILON)
                                                            : __uint_as_float(0x7f800000u);
    result.deviation = deviation_of(sums[2], sums[3], wide);
    result.deviation_ref = deviation_of(sums[4], sums[5], wide);
    result.change = sums[6] / wide;
    result.size_ref = sums[7] / wide;
    result.change_square = sums[0] / wide;
    result.square_ref = sums[1] / wide;
    return result;
}

// The rank-th largest ratio, bit by bit from the top: as no ratio is negative or NaN, their bits order as they do.
__device__ float largest_ratio(const float4* halves, int tokens, int rank) {
    __shared__ unsigned cached[CACHED_RATIOS];
    for (int i = threadIdx.x; i < tokens && i < CACHED_RATIOS; i += blockDim.x) {
        cached[i] = __float_as_uint(__ldcg(halves + 2 * i).x);
    }
    unsigned found = 0;
    for (int bit = 30; bit >= 0; --bit) {
        const unsigned candidate = found | 1u << bit;
        int count = 0;
        for (int start = 0; start < tokens; start += blockDim.x) {
            const int i = start + threadIdx.x;
            bool at_least = false;
            if (i < tokens) {  // each thread reads what it has cached itself
                at_least = (i < CACHED_RATIOS ? cached[i] : __float_as_uint(__ldcg(halves + 2 * i).x)) >= candidate;
            }
            count += __syncthreads_count(at_least);
        }
        if (count >= rank) found = candidate;
    }
    return __uint_as_float(found);
}

// The signals of a row, by one block; a token's statistics are two float4.
__device__ void write_signals(const float4* halves, int tokens, float* signals) {
    float sums[SUMS] = {};
    for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
        const float4 of_token = __ldcg(halves + 2 * i), means = __ldcg(halves + 2 * i + 1);
        sums[0] = fmaf(of_token.x, of_token.x, sums[0]);
        sums[1] += of_token.y;
        sums[2] += of_token.z;
        sums[3] += of_token.w;
        sums[4] += means.x;
        sums[5] += means.y;
        sums[6] += means.z;
        sums[7] += means.w;
    }
    sum_over_block(sums);
    const int rank = tokens - static_cast<int>((95ll * tokens + 99) / 100) + 1;  // plugins/oracle.py::p95_rank
    const float p95 = largest_ratio(halves, tokens, rank);
    if (threadIdx.x == 0) {
        const float count = static_cast<float>(tokens);
        const float spread = sums[2] / count, spread_ref = sums[3] / count;
        signals[0] = sqrtf(sums[0] / count);
        signals[1] = p95;
        signals[2] = fabsf(spread - spread_ref) / (spread_ref + EPSILON);
        signals[3] = sums[1] / count;
        signals[4] = spread;
#pragma unroll
        for (int i = 4; i < SUMS; ++i) signals[i + 1] = sums[i] / count;
    }
}

// Whether this block is the last of its row to come here; what the others wrote before is then visible to it.
//
// The counter wraps to 0 at the last one, ready for the next launch. A row of one block needs none.
__device__ bool is_last_of_row(unsigned* counter) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        last = true;
        if (gridDim.x > 1) {
            __threadfence();
            last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
            __threadfence();
        }
    }
    __syncthreads();
    return last;
}

// Grid: blocks of a row × rows; any number of whole warps in a block, and any number of blocks.
template <typename E>
__device__ void signals_of_row(const E* tokens, const E* reference, int count, int width, float* signals,
                               float* scratch) {
    const long long row = blockIdx.y;
    TokenStatistics* const of_row = reinterpret_cast<TokenStatistics*>(scratch) + row * (count + 1);
    TokenStatistics* const statistics = of_row + 1;  // behind a counter
    tokens += row * count * width;
    reference += row * count * width;
    const bool vectors = width % vector_width<E> == 0 && aligned(tokens) && aligned(reference);
    const int warps = blockDim.x / WARP;
    for (int i = blockIdx.x * warps + threadIdx.x / WARP; i < count; i += gridDim.x * warps) {
        const E* const token = tokens + static_cast<long long>(i) * width;
        const E* const token_ref = reference + static_cast<long long>(i) * width;
        const TokenStatistics found = vectors ? statistics_of<E, vector_width<E>>(token, token_ref, width)
                                              : statistics_of<E, 1>(token, token_ref, width);
        if (threadIdx.x % WARP == 0) {
            float4* const halves = reinterpret_cast<float4*>(statistics + i);
            halves[0] = make_float4(found.ratio, found.distance, found.deviation, found.deviation_ref);
            halves[1] = make_float4(found.change, found.size_ref, found.change_square, found.square_ref);
        }
    }
    if (is_last_of_row(reinterpret_cast<unsigned*>(of_row))) {
        write_signals(reinterpret_cast<const float4*>(statistics), count, signals + row * SIGNAL_COUNT);
    }
}

// tokens, reference (R, N, D); signals (R, 9). scratch (R, N + 1, 8) must be zero before its first launch with these
// sizes, and each launch leaves it fit for the next; where the grid has one block per row, it may hold anything.
#define SIGNALS(NAME, ELEMENT)                                                                                    \
    extern "C" __global__ void __launch_bounds__(1024)                                                            \
        adacorr_signals_##NAME(const ELEMENT* tokens, const ELEMENT* reference, int count, int width,             \
                               float* signals, float* scratch) {                                                  \
        signals_of_row<ELEMENT>(tokens, reference, count, width, signals, scratch);                               \
    }
SIGNALS(float32, float)
SIGNALS(float16, Float16)
SIGNALS(bfloat16, BFloat16)
#undef SIGNALS
