// Standard normals of Philox4x64-10, the generator of NumPy's np.random.Philox: plugins/oracle.py::philox_normals.
//
// A thread makes the four numbers of one counter, so that any part of a sequence can be made by itself, anywhere.

struct Counter {
    unsigned long long words[4];
};

constexpr unsigned long long FACTOR_0 = 0xD2E7470EE14C6C93ull, FACTOR_1 = 0xCA5A826395121157ull;

__device__ inline Counter philox(Counter counter, unsigned long long key_0, unsigned long long key_1) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned long long* const in = counter.words;
        counter = Counter{{__umul64hi(FACTOR_1, in[2]) ^ in[1] ^ key_0, FACTOR_1 * in[2],
                           __umul64hi(FACTOR_0, in[0]) ^ in[3] ^ key_1, FACTOR_0 * in[0]}};
        key_0 += 0x9E3779B97F4A7C15ull;
        key_1 += 0xBB67AE8584CAA73Bull;
    }
    return counter;
}

// In (0, 1], so that its logarithm exists.
__device__ inline double uniform(unsigned long long bits) {
    return static_cast<double>((bits >> 11) + 1) * (1.0 / 9007199254740992.0);
}

// Box and Muller's two normals of two uniforms.
__device__ inline void normals(unsigned long long bits_0, unsigned long long bits_1, float& first, float& second) {
    const double radius = sqrt(-2.0 * log(uniform(bits_0)));
    double sine, cosine;
    sincospi(2.0 * uniform(bits_1), &sine, &cosine);
    first = static_cast<float>(radius * cosine);
    second = static_cast<float>(radius * sine);
}

// keys (B, 2): an image's seed and number, as unsigned; draw (1,): how many times `elements` numbers came before; noise
// (B, elements). A draw starts at a counter of its own. Grid: blocks of an image × images.
extern "C" __global__ void __launch_bounds__(128)
    adacorr_philox_normal(const unsigned long long* keys, const unsigned long long* draw, int elements, float* noise) {
    const int counters = (elements + 3) / 4;
    noise += static_cast<long long>(blockIdx.y) * elements;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < counters; i += gridDim.x * blockDim.x) {
        const Counter start{{draw[0] * counters + i + 1, 0, 0, 0}};  // NumPy's first numbers are those of counter 1
        const Counter bits = philox(start, keys[2 * blockIdx.y], keys[2 * blockIdx.y + 1]);
        float values[4];
        normals(bits.words[0], bits.words[1], values[0], values[1]);
        normals(bits.words[2], bits.words[3], values[2], values[3]);
        for (int k = 0; k < 4 && 4 * i + k < elements; ++k) noise[4 * i + k] = values[k];
    }
}
