// Element-wise arithmetic that compilers vectorise: conversions, the exponential, sums over rows. Everything
// here is inline, branch-free and computes in fp32; loops that use it carry `#pragma omp simd`, which also
// says that an output may be the same array as an input.
#pragma once

#include <bit>
#include <cstdint>

#include "core/bfloat16.h"

namespace hybridmoe::cpu {

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

// Rounds to nearest even; a NaN stays one.
template <class C>
inline C from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const std::uint32_t word = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  const std::uint32_t quiet = (word >> 16) | 0x40u;
  BFloat16 result;
  result.bits = static_cast<std::uint16_t>((word & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  return result;
}

// e^x for x <= 0 (and what rounding leaves above it) within 2 ulp; 0 below -87.3, NaN for NaN. x = n ln 2 + r
// with |r| <= ln 2 / 2, and the polynomial of Cephes' expf (Moshier) for e^r.
inline float exp_nonpositive(float x) {
  constexpr float kLow = -87.33654f;
  // 1.5 · 2^23 + 127: adding it rounds to an integer, whose low bits are those of the exponent field of 2^n.
  constexpr float kShift = 12582912.f + 127.f;
  const float t = x < kLow ? kLow : x;  // a comparison with NaN is false: it passes through
  const float shifted = t * 1.44269504088896341f + kShift;
  const float n = shifted - kShift;
  const float r = (t - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const float power = std::bit_cast<float>(std::bit_cast<std::uint32_t>(shifted) << 23);
  return x < kLow ? 0.f : p * power;
}

inline float sigmoid(float x) {
  const float e = exp_nonpositive(x < 0 ? x : -x);
  return (x < 0 ? e : 1.f) / (1.f + e);
}

}  // namespace hybridmoe::cpu
