// Conversions between float32 and the storage types: every 16-bit pattern, and around every
// boundary of rounding.
#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "kernels/cpu/tests/conversions.h"
#include "kernels/cpu/tests/formats.h"
#include "kernels/cpu/tests/main.h"

namespace tokenmix::cpu::testing {
namespace {

constexpr int num_patterns = 1 << 16;
constexpr int64_t max_padding = 64;

const Conversions& conversions_of([[maybe_unused]] Isa isa) {
#ifdef __x86_64__
  if (isa == Isa::avx2) return avx2_conversions;
  if (isa == Isa::avx512) return avx512_conversions;
#endif
  return portable_conversions;
}

bool same(double x, double y) {
  return std::isnan(x) ? std::isnan(y) : x == y && std::signbit(x) == std::signbit(y);
}

void test_reading(const Conversions& conversions, Storage storage, Failures& failures) {
  std::vector<uint16_t> patterns(num_patterns);
  for (int i = 0; i < num_patterns; ++i) patterns[i] = static_cast<uint16_t>(i);
  std::vector<float> numbers(num_patterns + max_padding);
  conversions.read(storage, {patterns.data(), 0, 0, 0, 0}, 0, num_patterns, numbers.data());
  for (int i = 0; i < num_patterns; ++i) {
    failures.expect(same(numbers[i], decode(format_of(storage), patterns[i])),
                    std::string("reading ") + testing::name_of(storage) + " " + std::to_string(i));
  }
}

// Floats around every number that the format has, and around the middle between neighbours.
std::vector<float> boundaries(Format format) {
  std::vector<float> numbers = {NAN, -NAN, INFINITY, -INFINITY, 3.4e38f, -3.4e38f, 1e-45f, -1e-45f};
  for (uint32_t pattern = 0; pattern < format.infinity(); ++pattern) {
    const double low = decode(format, pattern);
    // Behind the largest number the next one would have been, were there no limit.
    const double high = pattern + 1 < format.infinity() ? decode(format, pattern + 1)
                                                        : 2 * low - decode(format, pattern - 1);
    for (const double x : {low, (low + high) / 2}) {
      const auto at = static_cast<float>(x);
      for (const float y : {std::nextafter(at, 0.0f), at, std::nextafter(at, INFINITY)}) {
        for (const float z : {y, -y}) numbers.push_back(z);
      }
    }
  }
  return numbers;
}

void test_writing(const Conversions& conversions, Storage storage, Failures& failures) {
  const Format format = format_of(storage);
  std::vector<float> numbers = boundaries(format);
  const size_t count = numbers.size();
  numbers.resize(count + max_padding);
  std::vector<uint16_t> patterns(count);
  conversions.write(storage, numbers.data(), static_cast<int64_t>(count),
                    {patterns.data(), 0, 0, 0, 0}, 0);
  for (size_t i = 0; i < count; ++i) {
    const bool right = std::isnan(numbers[i]) ? std::isnan(decode(format, patterns[i]))
                                              : patterns[i] == encode(format, numbers[i]);
    char text[100];
    std::snprintf(text, sizeof text, "writing %a as %s: %#06x", numbers[i],
                  testing::name_of(storage), patterns[i]);
    failures.expect(right, text);
  }
}

// Rows of every length, at every alignment, and nothing around them.
void test_lengths(const Conversions& conversions, Storage storage, Failures& failures) {
  const Format format = format_of(storage);
  for (int64_t size = 1; size <= 70; ++size) {
    for (int64_t offset = 0; offset < 3; ++offset) {
      const std::string text = std::string(testing::name_of(storage)) + " row of " +
                               std::to_string(size) + " at " + std::to_string(offset);
      // Exactly as large as the row, so that sanitizers notice a step outside.
      std::vector<char> memory((offset + size) * format.size());
      const Strided row{memory.data(), 0, 0, 0, 0};
      std::vector<float> from(size + max_padding, 99), to(size + max_padding);
      for (int64_t i = 0; i < size; ++i) from[i] = static_cast<float>(i % 7 - 3);
      conversions.write(storage, from.data(), size, row, offset);
      conversions.read(storage, row, offset, size, to.data());
      failures.expect(std::equal(from.begin(), from.begin() + size, to.begin()), text);
      for (int64_t i = 0; i < offset; ++i) {
        failures.expect(load(format, memory.data(), i) == 0, text + " writes before it");
      }

      std::vector<char> larger((offset + size + max_padding) * format.size(), 0x55);
      conversions.write(storage, from.data(), size, {larger.data(), 0, 0, 0, 0}, offset);
      failures.expect(std::all_of(larger.begin() + (offset + size) * format.size(), larger.end(),
                                  [](char byte) { return byte == 0x55; }),
                      text + " writes behind it");
    }
  }
}

int run(Isa isa, const Numbers&) {
  Failures failures;
  for (const Storage storage : {Storage::bfloat16, Storage::float16}) {
    test_reading(conversions_of(isa), storage, failures);
    test_writing(conversions_of(isa), storage, failures);
  }
  for (const Storage storage : {Storage::float32, Storage::bfloat16, Storage::float16}) {
    test_lengths(conversions_of(isa), storage, failures);
  }
  return failures.exit_status();
}

}  // namespace
}  // namespace tokenmix::cpu::testing

int main(int argc, char** argv) {
  using namespace tokenmix::cpu::testing;
  return run_for_isa(argc, argv, {}, run);
}
