// The definition in plain float32, with faults to plant that the tolerance has to notice.
#pragma once

#include "kernels/cpu/attention.h"

namespace tokenmix::cpu::testing {

enum class Fault {
  none,
  wrong_key,
  dropped_key,
  dropped_key_of_one_query,
  key_counted_twice,
  missing_gain,
  gain_on_unscaled_keys,
  gain_missing_in_gradients,
  exponential_off_at_half,     // by 1e-5 where the argument's fraction is above 1/2
  exponential_off_everywhere,  // by 1e-5; cancels but in lse
  exponential_off_in_backward,
  natural_lse,
  rounded_weights,   // to bfloat16
  rounded_products,  // logits to 12 bits
  delta_of_next_query,
  last_query_missing_in_gradients,
  repeated_key_overwrites,
  unselected_not_zeroed,
  element_not_written,
  write_past_row,
};
constexpr int num_faults = static_cast<int>(Fault::write_past_row) + 1;

const char* name_of(Fault);
void naive_forward(const Forward&, Fault);
void naive_backward(const Backward&, Fault);

}  // namespace tokenmix::cpu::testing
