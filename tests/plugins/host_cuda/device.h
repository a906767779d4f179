// What the kernels use of CUDA, for a host compiler: plugins/cuda/*.cu run on the CPU as they are.
//
// Blocks run one after the other and the threads of a block as fibres (scheduler.h), so that barriers, shuffles and
// shared memory mean what they mean on a GPU. What this can't show: anything that depends on blocks, or the lanes of a
// warp, running at the same time (what a block leaves for others too late, or without a fence), and the last bit of a
// double's sine or logarithm.
#pragma once

#define ADACORR_HOST

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "scheduler.h"

#define __global__
#define __device__
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)

using std::min;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return float4{x, y, z, w}; }

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline double __longlong_as_double(long long bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline long long __double_as_longlong(double value) {
    long long bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Of the device's runtime: chooses a case of the conditional graph node that a handle stands for.
inline void cudaGraphSetConditional(unsigned long long condition, unsigned value) {
    host_cuda::set_condition(condition, value);
}

inline float4 __ldcg(const float4* address) { return *address; }
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
    const unsigned old = *address;
    *address = old >= limit ? 0 : old + 1;
    return old;
}

inline void __syncthreads() { host_cuda::wait_for_block(false); }
inline int __syncthreads_count(int predicate) { return host_cuda::wait_for_block(predicate != 0); }
inline float __shfl_xor_sync(unsigned lanes, float value, int mask) {
    return __uint_as_float(host_cuda::exchange_in_warp(lanes, __float_as_uint(value), static_cast<unsigned>(mask)));
}

inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

// sin(πx) and cos(πx) for 0 ≤ x, reduced exactly to the first eighth of a turn.
inline void sincospi(double x, double* sine, double* cosine) {
    constexpr double pi = 3.14159265358979323846;
    const double quarter = std::nearbyint(2.0 * x), rest = x - 0.5 * quarter;
    const double s = std::sin(pi * rest), c = std::cos(pi * rest);
    const double sines[4] = {s, c, -s, -c}, cosines[4] = {c, -s, -c, s};
    const int turned = static_cast<int>(std::fmod(quarter, 4.0));
    *sine = sines[turned];
    *cosine = cosines[turned];
}

// The 16-bit formats, rounded to nearest even as cvt.rn does.
inline float float_from_half_bits(unsigned short bits) {
    const unsigned sign = static_cast<unsigned>(bits & 0x8000u) << 16;
    const unsigned exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(mantissa), -24), __uint_as_float(sign | 1u));
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline unsigned short half_bits_from_float(float value) {
    const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
    const float size = std::fabs(value);
    if (size != size) return static_cast<unsigned short>(0x7fff);
    if (size >= 65520.0f) return static_cast<unsigned short>(sign | 0x7c00u);
    if (size < 6.103515625e-5f) {  // subnormal: whole multiples of 2⁻²⁴; 1024 of them are the smallest normal
        return static_cast<unsigned short>(sign | static_cast<unsigned>(std::nearbyint(std::ldexp(size, 24))));
    }
    const unsigned magnitude = bits & 0x7fffffffu;
    const unsigned rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return static_cast<unsigned short>(sign | (rounded - (112u << 23)) >> 13);
}
inline unsigned short bfloat_bits_from_float(float value) {
    const unsigned bits = __float_as_uint(value);
    if (value != value) return static_cast<unsigned short>(0x7fff);
    return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
