// Token-mixing attention on a CPU: plain structs in, raw pointers out, no PyTorch.
//
// For query token s of frame t, and with r its row of key slots (see RowOf):
//
//   logit_j     = scale * gain(t, j) * <query[t, s], key[key_index[r, j]]>
//   gain(t, j)  = 1 if key_frame[r, j] is t or -1, else cross_frame_gain
//   output[t,s] = sum_j softmax(logit)_j * value[key_index[r, j]]
//
// All arithmetic is float32, whatever the storage type, except in the forward pass of bfloat16
// tensors with amx: its softmax weights are rounded to bfloat16, and subnormals count as zero.
// Results are the same bits for any number of threads. Source: Token Mixing (AAAI 2023), Eq. 8.
#pragma once

#include <cstdint>

namespace tokenmix::cpu {

enum class Storage { float32, bfloat16, float16 };

// Which queries share a row of key slots: those of the whole video (one row), of one frame
// (num_frames rows), or the same token of all frames (num_tokens rows).
enum class RowOf { video, frame, token };

// A tensor [batch, frame, token, head, head_dim], contiguous in head_dim; strides in elements.
struct Strided {
  void* data;
  int64_t batch, frame, token, head;
};

inline constexpr int max_head_dim = 256;

// head_dim is 1 to max_head_dim; num_keys at least 1.
struct Problem {
  Storage storage;
  int64_t batch, num_frames, num_queries, num_heads, head_dim;
  // Of key and value; num_tokens counts the tokens of one frame. Keys that arrive already selected
  // are one frame of num_keys tokens, with a null key_index: slot j is token j.
  int64_t num_tokens, num_key_frames;
  RowOf row_of;
  int64_t num_rows, num_keys;
  const int32_t* key_index;  // [num_rows, num_keys]: frame * num_tokens + token; or null
  const int32_t* key_frame;  // [num_rows, num_keys]; null if cross_frame_gain is 1
  float cross_frame_gain;
  float scale;
};

struct Forward {
  Problem problem;
  Strided query, key, value;  // read
  Strided output;             // written, with the storage type of the problem
  float* lse;                 // written: [batch, num_heads, num_frames, num_queries], base 2
};

struct Backward {
  Problem problem;
  Strided output_grad, query, key, value, output;  // read
  const float* lse;
  Strided query_grad, key_grad, value_grad;  // written, tokens that no slot names with zero
};

// Runs body(begin, end, context) on disjoint ranges that together are 0..num_tasks, on up to
// `count` threads at once.
struct Threads {
  int64_t count;
  void (*parallel_for)(int64_t num_tasks, void (*body)(int64_t begin, int64_t end, void* context),
                       void* context);
};

// Instruction sets, each a build of the same source; `portable` is NEON on 64-bit Arm, `amx` is
// avx512 with products in tiles for the forward pass of bfloat16.
enum class Isa { portable, avx2, avx512, amx };

const char* name_of(Isa);
bool is_supported(Isa);  // compiled in, and this processor has it
Isa best();              // the widest that is supported

void forward(const Forward&, const Threads&, Isa);
void backward(const Backward&, const Threads&, Isa);

}  // namespace tokenmix::cpu
