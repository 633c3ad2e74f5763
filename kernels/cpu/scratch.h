// Working memory that each thread keeps between calls, so that no call pays for page faults.
#pragma once

#include <cstdint>

namespace tokenmix::cpu {

// What a buffer holds; each kind has its own memory.
enum class Buffer {
  key_columns,
  value_columns,
  key_rows,
  value_rows,
  gains,
  queries,
  logits,
  outputs,
  maxima,
  output_grads,
  weight_grads,
  query_grads,
  key_grads,
  value_grads,
  token_begins,
  token_slots,
  count,
};

// At least `size` floats of this thread, 64-byte aligned, contents undefined. Valid until the
// thread asks for the same buffer again.
float* scratch(Buffer, int64_t size);

// Frees this thread's buffers that are too large to keep.
void trim_scratch();

}  // namespace tokenmix::cpu
