// Storage formats by their definition, in double: independent of the kernel's conversions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/cpu/attention.h"

namespace tokenmix::cpu::testing {

struct Format {
  int bits, fraction_bits;

  int exponent_bits() const { return bits - 1 - fraction_bits; }
  int bias() const { return (1 << (exponent_bits() - 1)) - 1; }
  uint32_t infinity() const { return ((1u << exponent_bits()) - 1) << fraction_bits; }
  int64_t size() const { return bits / 8; }
  // Largest relative error of rounding to nearest, and half the smallest subnormal number.
  double roundoff() const { return std::ldexp(1.0, -fraction_bits - 1); }
  double underflow() const { return std::ldexp(1.0, -bias() - fraction_bits); }
};

inline Format format_of(Storage storage) {
  switch (storage) {
    case Storage::bfloat16:
      return {16, 7};
    case Storage::float16:
      return {16, 10};
    default:
      return {32, 23};
  }
}

inline const char* name_of(Storage storage) {
  switch (storage) {
    case Storage::bfloat16:
      return "bfloat16";
    case Storage::float16:
      return "float16";
    default:
      return "float32";
  }
}

inline double decode(Format format, uint32_t pattern) {
  const uint32_t magnitude = pattern & ((1u << (format.bits - 1)) - 1);
  const double sign = pattern >> (format.bits - 1) ? -1 : 1;
  if (magnitude > format.infinity()) return std::numeric_limits<double>::quiet_NaN();
  if (magnitude == format.infinity()) return sign * std::numeric_limits<double>::infinity();
  const int exponent = static_cast<int>(magnitude >> format.fraction_bits);
  double fraction = magnitude & ((1u << format.fraction_bits) - 1);
  if (exponent > 0) fraction += 1 << format.fraction_bits;
  const int unit = (exponent > 0 ? exponent : 1) - format.bias() - format.fraction_bits;
  return sign * std::ldexp(fraction, unit);
}

// Rounds to nearest, ties to even; a NaN becomes one with the sign bit clear.
inline uint32_t encode(Format format, double x) {
  if (std::isnan(x)) return format.infinity() + 1;
  const uint32_t sign = std::signbit(x) ? 1u << (format.bits - 1) : 0;
  if (std::isinf(x)) return sign + format.infinity();
  if (x == 0) return sign;
  const int smallest = 1 - format.bias();
  const int exponent = std::max(std::ilogb(x), smallest);
  const double units = std::nearbyint(std::ldexp(std::fabs(x), format.fraction_bits - exponent));
  // A normal number's hidden bit carries into the exponent field, as does rounding up.
  const int64_t magnitude = (static_cast<int64_t>(exponent - smallest) << format.fraction_bits) +
                            static_cast<int64_t>(units);
  return sign + static_cast<uint32_t>(std::min<int64_t>(magnitude, format.infinity()));
}

inline double load(Format format, const void* data, int64_t index) {
  uint32_t pattern = 0;  // Little-endian: the low bytes come first.
  std::memcpy(&pattern, static_cast<const char*>(data) + index * format.size(),
              static_cast<size_t>(format.size()));
  return decode(format, pattern);
}

inline void store(Format format, void* data, int64_t index, double x) {
  const uint32_t pattern = encode(format, x);
  std::memcpy(static_cast<char*>(data) + index * format.size(), &pattern,
              static_cast<size_t>(format.size()));
}

}  // namespace tokenmix::cpu::testing
