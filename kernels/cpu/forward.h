// The forward pass. Include the instruction set's vectors first.
//
// A row's keys are packed once, transposed, and its values once, both as float32. Queries pass in
// blocks whose logits stay in the first-level cache between the two products. Keys that are too
// many for one block of logits pass in blocks too, with a running maximum and sum (Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018); then a chunk of many query
// blocks shares each key block, so that packed keys are read from far memory rarely.
#pragma once

#include <cstdint>

#include "pack.h"
#include "product.h"
#include "rows.h"
#include "scratch.h"
#include "softmax.h"

namespace tokenmix::cpu {
namespace {

constexpr int64_t forward_block = 24;        // queries
constexpr int64_t forward_blocks = 16;       // of a chunk, if there are many blocks of keys
constexpr int64_t max_whole_keys = 640;      // in one block
constexpr int64_t forward_key_block = 256;   // otherwise; whole panels

class ForwardPass {
 public:
  ForwardPass(const Forward& call)
      : call_(call),
        problem_(call.problem),
        padded_dim_(rounded_up(problem_.head_dim, width)),
        padded_keys_(rounded_up(problem_.num_keys, panel_width)),
        key_block_(problem_.num_keys > max_whole_keys ? forward_key_block : padded_keys_),
        num_rows_(num_rows_of(problem_)),
        num_queries_(Row{problem_, 0, 0, 0}.num_queries()) {
    const int64_t largest = padded_keys_ > key_block_ ? forward_block * forward_blocks : forward_block;
    num_chunks_ = (num_queries_ + largest - 1) / largest;
  }

  int64_t num_tasks() const {
    return problem_.batch * problem_.num_heads * num_rows_ * num_chunks_;
  }

  // Consecutive tasks are the chunks of one row, then of the next.
  void run(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end;) {
      const int64_t row = task / num_chunks_, head = row / num_rows_;
      const int64_t last = min(end, (row + 1) * num_chunks_);
      run({problem_, head / problem_.num_heads, head % problem_.num_heads, row % num_rows_},
          task - row * num_chunks_, last - row * num_chunks_);
      task = last;
    }
    trim_scratch();
  }

 private:
  void run(const Row& row, int64_t begin, int64_t end) const {
    const int64_t dim = problem_.head_dim, num_keys = problem_.num_keys;
    const auto reader = [&](const Strided& tensor) {
      return [&](int64_t slot, float* to) {
        read_row(problem_.storage, tensor, row.offset(tensor, row.key(slot)), dim, 1.0f, to);
      };
    };
    const Panels keys = pack_columns(num_keys, dim, reader(call_.key),
                                     scratch(Buffer::key_columns, padded_keys_ * padded_dim_));
    const Panels values =
        pack_rows(num_keys, dim, reader(call_.value),
                  scratch(Buffer::value_rows, num_keys * rounded_up(dim, panel_width)));
    const bool gained = problem_.cross_frame_gain != 1.0f;
    const Gains gains =
        gained ? Gains(row, padded_keys_,
                       scratch(Buffer::gains, problem_.num_frames * padded_keys_))
               : Gains();
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = num_queries_ * chunk / num_chunks_;
      const int64_t last = num_queries_ * (chunk + 1) / num_chunks_;
      if (gained) {
        run_chunk<true>(row, first, last - first, keys, values, gains);
      } else {
        run_chunk<false>(row, first, last - first, keys, values, gains);
      }
    }
  }

  template <bool gained>
  void run_chunk(const Row& row, int64_t first, int64_t count, Panels keys, Panels values,
                 const Gains& gains) const {
    const int64_t dim = problem_.head_dim;
    float* queries = scratch(Buffer::queries, count * padded_dim_);
    float* outputs = scratch(Buffer::outputs, count * padded_dim_);
    float* maxima = scratch(Buffer::maxima, 2 * count);
    float* sums = maxima + count;
    for (int64_t i = 0; i < count; ++i) {
      read_row(problem_.storage, call_.query, row.offset(call_.query, row.query(first + i)), dim,
               log2_factor(problem_.scale), queries + i * padded_dim_);
    }
    for (int64_t slot = 0; slot < problem_.num_keys; slot += key_block_) {
      const int64_t num_keys = min(key_block_, problem_.num_keys - slot);
      const Panels key_block = keys.from_column(slot), value_block = values.from_row(slot);
      for (int64_t i = 0; i < count; i += forward_block) {
        run_block<gained>(row, first + i, min(forward_block, count - i), slot, num_keys,
                          queries + i * padded_dim_, key_block, value_block, gains,
                          outputs + i * padded_dim_, maxima + i, sums + i, first + count + i);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const Place place = row.query(first + i);
      write_row(problem_.storage, outputs + i * padded_dim_, dim, 1.0f / sums[i], call_.output,
                row.offset(call_.output, place));
      call_.lse[row.lse_offset(place)] = maxima[i] + __builtin_log2f(sums[i]);
    }
  }

  // Attention of up to forward_block queries to one block of keys, added to what earlier blocks
  // gave.
  template <bool gained>
  void run_block(const Row& row, int64_t first, int64_t count, int64_t slot, int64_t num_keys,
                 const float* queries, Panels keys, Panels values, const Gains& gains,
                 float* outputs, float* maxima, float* sums, int64_t next) const {
    const bool last = slot + num_keys == problem_.num_keys;
    const int64_t vectors = vectors_of(num_keys), dim_vectors = vectors_of(problem_.head_dim);
    // An odd number of cache lines, so that equal columns of the rows fall into different sets.
    const int64_t stride = rounded_up(vectors * width, 16) | 16;
    float* logits = scratch(Buffer::logits, forward_block * stride);
    product<Left::rows, false>(count, vectors, problem_.head_dim, queries, padded_dim_, keys,
                               {logits, stride});
    for (int64_t i = 0; i < count; ++i) {
      if (last) {
        prefetch_row<Access::write>(problem_.storage, call_.output,
                                    row.offset(call_.output, row.query(first + i)),
                                    problem_.head_dim);
        if (next + i < num_queries_) {
          prefetch_row<Access::read>(problem_.storage, call_.query,
                                     row.offset(call_.query, row.query(next + i)),
                                     problem_.head_dim);
        }
      }
      float* row_logits = logits + i * stride;
      for (int64_t j = num_keys; j < vectors * width; ++j) row_logits[j] = -__builtin_inff();
      const float* row_gains = gained ? gains.of(row.query(first + i).frame, slot) : nullptr;
      float max = max_logit<gained>(row_logits, row_gains, vectors);
      if (slot > 0 && max < maxima[i]) max = maxima[i];
      const float sum = exponentiate<gained>(row_logits, row_gains, max, vectors);
      if (slot > 0) {
        const float shrink = __builtin_exp2f(maxima[i] - max);
        sums[i] = sums[i] * shrink + sum;
        float* output = outputs + i * padded_dim_;
        for (int64_t d = 0; d < padded_dim_; d += width) {
          store(output + d, load(output + d) * broadcast(shrink));
        }
      } else {
        sums[i] = sum;
      }
      maxima[i] = max;
    }
    if (slot > 0) {
      product<Left::rows, true>(count, dim_vectors, num_keys, logits, stride, values,
                                {outputs, padded_dim_});
    } else {
      product<Left::rows, false>(count, dim_vectors, num_keys, logits, stride, values,
                                 {outputs, padded_dim_});
    }
  }

  const Forward& call_;
  const Problem& problem_;
  int64_t padded_dim_, padded_keys_, key_block_, num_rows_, num_queries_, num_chunks_;
};

inline void forward_pass(const Forward& call, const Threads& threads) {
  const ForwardPass pass(call);
  if (pass.num_tasks() == 0) return;
  threads.parallel_for(
      pass.num_tasks(),
      [](int64_t begin, int64_t end, void* context) {
        static_cast<const ForwardPass*>(context)->run(begin, end);
      },
      const_cast<ForwardPass*>(&pass));
}

}  // namespace
}  // namespace tokenmix::cpu
