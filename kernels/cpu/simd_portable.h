// Vectors of four floats in the compiler's own vector types: NEON on 64-bit Arm, SSE2 on x86-64.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "storage.h"

namespace tokenmix::cpu {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
constexpr int width = 4;
#if defined(__aarch64__)
constexpr int tile_rows = 12;  // with two vectors of columns: 24 of 32 registers are sums
#else
constexpr int tile_rows = 6;  // 12 of 16
#endif

inline Vec broadcast(float x) { return Vec{x, x, x, x}; }
inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }
// Contracted where the processor has a fused multiply-add.
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// b if either is NaN.
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline float sum_of(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float max_of(Vec x) {
  const Vec pairs = max(x, Vec{x[2], x[3], x[0], x[1]});
  return pairs[0] > pairs[1] ? pairs[0] : pairs[1];
}

// Elements of a's lower (upper) half and b's in turn.
inline Vec zip_low(Vec a, Vec b) { return Vec{a[0], b[0], a[1], b[1]}; }
inline Vec zip_high(Vec a, Vec b) { return Vec{a[2], b[2], a[3], b[3]}; }

// x = whole + fraction, |fraction| <= 1/2; whole in the lowest bits, as the sum with 1.5 * 2**23.
// Clamped to where the power is 0 or infinite; NaN stays.
struct Split {
  Vec whole, fraction;
};
inline Split split(Vec x) {
  const Vec shift = broadcast(12582912.0f), low = broadcast(-127.0f), high = broadcast(128.0f);
  x = low > x ? low : x;
  x = high < x ? high : x;
  const Vec whole = x + shift;
  return {whole, x - (whole - shift)};
}
// Below 2**-126 the result is off by less than 2**-127. NaN gets no exponent, which might end it.
inline Vec times_power_of_two(Vec x, Vec whole) {
  const Bits is_number = reinterpret_cast<Bits>(whole == whole);
  const Bits exponent = (reinterpret_cast<Bits>(whole) << 23) & is_number;
  return reinterpret_cast<Vec>(reinterpret_cast<Bits>(x) + exponent);
}

inline float to_float(Bfloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline void round_to(Bfloat16* to, float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to->bits = static_cast<uint16_t>(x != x ? bits >> 16 | 0x40 : rounded);
}

inline float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13;
  // The exponent's bias changes by 112; the product is exact, for subnormal numbers too.
  const float finite = std::bit_cast<float>(magnitude) * 0x1p112f;
  const bool is_finite = magnitude < 0x7c00u << 13;
  const uint32_t bits = is_finite ? std::bit_cast<uint32_t>(finite) : magnitude | 0x7f800000u;
  return std::bit_cast<float>(bits | sign);
}

inline void round_to(Float16* to, float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t result;
  if (magnitude > 0x7f800000) {
    result = 0x7e00 | (magnitude >> 13 & 0x1ff);
  } else if (magnitude >= 0x477ff000) {  // 65,520 and more round to infinity
    result = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: the sum's lowest bits are the result
    result = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    result = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(result | sign);
}

template <class Half>
inline Vec load(const Half* from) {
  return Vec{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
}
template <class Half>
inline void store(Half* to, Vec x) {
  for (int i = 0; i < width; ++i) round_to(to + i, x[i]);
}

}  // namespace
}  // namespace tokenmix::cpu
