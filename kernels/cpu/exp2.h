// The exponential of the softmax. Include the instruction set's vectors first.
#pragma once

namespace tokenmix::cpu {
namespace {

// 2**x = 2**whole * 2**fraction. The polynomial is minimax on [-1/2, 1/2] with 1 exact at 0; with
// its rounded coefficients its relative error is below 0.27 * 2**-24. The error is largest just
// below 1, where that is 0.27 ulp; the last sum's rounding adds 0.5 ulp, that of the factor before
// it, times 1/2, 0.25 ulp, earlier ones 0.04 ulp: 1.1 ulp in all, and 1.4 ulp without a fused
// multiply-add. NaN stays, 2**-inf is 0, 2**inf is inf, 2**0 is 1.
inline Vec exp2(Vec x) {
  const auto [whole, r] = split(x);
  Vec p = broadcast(0x1.41fbbcp-13f);
  p = fma(p, r, broadcast(0x1.5f3e54p-10f));
  p = fma(p, r, broadcast(0x1.3b2d4cp-7f));
  p = fma(p, r, broadcast(0x1.c6aee8p-5f));
  p = fma(p, r, broadcast(0x1.ebfbdcp-3f));
  p = fma(p, r, broadcast(0x1.62e43p-1f));
  p = fma(p, r, broadcast(1.0f));
  return times_power_of_two(p, whole);
}

}  // namespace
}  // namespace tokenmix::cpu
