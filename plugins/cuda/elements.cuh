// Elements of tokens: float32, float16 or bfloat16 in memory, float32 in registers; and 16-byte loads of them.
//
// The two 16-bit formats are plain bits here, converted by one instruction each, so that the kernels need no header of
// the CUDA toolkit: NVRTC compiles them as they are, and a host compiler does with tests/plugins/host_cuda/device.h.
#pragma once

constexpr float EPSILON = 1e-6f;  // plugins/oracle.py::EPSILON

struct Float16 {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

#ifndef ADACORR_HOST
__device__ inline float float_from_half_bits(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ inline unsigned short half_bits_from_float(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
__device__ inline unsigned short bfloat_bits_from_float(float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(Float16 value) { return float_from_half_bits(value.bits); }
__device__ inline float to_float(BFloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

__device__ inline void from_float(float value, float& element) { element = value; }
__device__ inline void from_float(float value, Float16& element) { element.bits = half_bits_from_float(value); }
__device__ inline void from_float(float value, BFloat16& element) { element.bits = bfloat_bits_from_float(value); }

// Elements of type E that one access moves: 16 bytes of them, or a single one.
template <typename E>
constexpr int vector_width = 16 / static_cast<int>(sizeof(E));

// What is loaded stays in the form that it has in memory until it is used: half the registers of its floats.
template <typename E, int W>
struct Raw {
    uint4 words;
};
template <typename E>
struct Raw<E, 1> {
    E element;
};

template <typename E, int W>
__device__ inline Raw<E, W> load(const E* address) {
    Raw<E, W> raw;
    if constexpr (W == 1) {
        raw.element = *address;
    } else {
        raw.words = *reinterpret_cast<const uint4*>(address);
    }
    return raw;
}

template <typename E, int W>
__device__ inline void store(E* address, const Raw<E, W>& raw) {
    if constexpr (W == 1) {
        *address = raw.element;
    } else {
        *reinterpret_cast<uint4*>(address) = raw.words;
    }
}

__device__ inline void unpack_word(unsigned word, float*, float* values) { values[0] = __uint_as_float(word); }
__device__ inline void unpack_word(unsigned word, Float16*, float* values) {
    values[0] = float_from_half_bits(static_cast<unsigned short>(word & 0xffffu));
    values[1] = float_from_half_bits(static_cast<unsigned short>(word >> 16));
}
__device__ inline void unpack_word(unsigned word, BFloat16*, float* values) {
    values[0] = __uint_as_float(word << 16);
    values[1] = __uint_as_float(word & 0xffff0000u);
}

__device__ inline unsigned pack_word(const float* values, float*) { return __float_as_uint(values[0]); }
__device__ inline unsigned pack_word(const float* values, Float16*) {
    return half_bits_from_float(values[0]) | static_cast<unsigned>(half_bits_from_float(values[1])) << 16;
}
__device__ inline unsigned pack_word(const float* values, BFloat16*) {
    return bfloat_bits_from_float(values[0]) | static_cast<unsigned>(bfloat_bits_from_float(values[1])) << 16;
}

template <typename E, int W>
__device__ inline void unpack(const Raw<E, W>& raw, float (&values)[W]) {
    if constexpr (W == 1) {
        values[0] = to_float(raw.element);
    } else {
        E* const format = nullptr;
        unpack_word(raw.words.x, format, values);
        unpack_word(raw.words.y, format, values + W / 4);
        unpack_word(raw.words.z, format, values + W / 2);
        unpack_word(raw.words.w, format, values + W / 4 * 3);
    }
}

template <typename E, int W>
__device__ inline Raw<E, W> pack(const float (&values)[W]) {
    Raw<E, W> raw;
    if constexpr (W == 1) {
        from_float(values[0], raw.element);
    } else {
        E* const format = nullptr;
        raw.words.x = pack_word(values, format);
        raw.words.y = pack_word(values + W / 4, format);
        raw.words.z = pack_word(values + W / 2, format);
        raw.words.w = pack_word(values + W / 4 * 3, format);
    }
    return raw;
}

__device__ inline bool aligned(const void* address) {
    return reinterpret_cast<unsigned long long>(address) % 16 == 0;
}

__device__ inline bool is_finite(float value) { return fabsf(value) <= 3.402823466e38f; }  // false for NaN
