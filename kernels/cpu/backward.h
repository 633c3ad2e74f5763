// The backward pass. Include the instruction set's vectors first.
//
// Weights are recomputed from the forward pass's lse. With P the weights and dS the gradient of
// the logits of a block of queries, in float32,
//
//   dV += P^T dO     dK += dS^T Q     dQ = dS K     dS = P * (dO V^T - rowsum(dO * O)) * gain
//
// Each task sums the gradients of one row's key slots over a chunk of the row's queries. A second
// pass over the tokens adds up the sums of the slots that name a token, in order, and writes each
// gradient once. The number of chunks depends on the problem alone, so results do not depend on
// the number of threads.
#pragma once

#include <cstdint>

#include "exp2.h"
#include "pack.h"
#include "product.h"
#include "rows.h"
#include "scratch.h"

namespace tokenmix::cpu {
namespace {

constexpr int64_t backward_block = 96;             // queries
constexpr int64_t backward_key_block = 64;         // of one block of weights; whole panels
constexpr int64_t backward_key_superblock = 1024;  // packed at a time; whole key blocks
constexpr int64_t backward_tasks = 64;             // enough to balance many threads
constexpr int64_t min_chunk_blocks = 2;            // enough to pay for adding a chunk's sums
constexpr int64_t max_sums = int64_t{16} << 20;    // floats of key or value gradients; one video's
                                                   // if that is more

class BackwardPass {
 public:
  explicit BackwardPass(const Backward& call)
      : call_(call),
        problem_(call.problem),
        padded_dim_(rounded_up(problem_.head_dim, width)),
        num_rows_(num_rows_of(problem_)),
        num_queries_(Row{problem_, 0, 0, 0}.num_queries()),
        num_blocks_(max(1, ceil_div(num_queries_, backward_block))),
        num_chunks_(max(1, min(num_blocks_ / min_chunk_blocks,
                               ceil_div(backward_tasks,
                                        max(1, problem_.batch * problem_.num_heads * num_rows_))))),
        sums_size_(problem_.num_keys * padded_dim_),
        slots_(problem_, num_rows_) {}

  void run(const Threads& threads) {
    const int64_t tasks = problem_.num_heads * num_rows_ * num_chunks_;  // of a video
    const int64_t videos = max(1, min(problem_.batch, max_sums / max(1, tasks * sums_size_)));
    sums_ = {scratch(Buffer::key_grads, videos * tasks * sums_size_),
             scratch(Buffer::value_grads, videos * tasks * sums_size_)};
    for (first_video_ = 0; first_video_ < problem_.batch; first_video_ += videos) {
      const int64_t count = min(videos, problem_.batch - first_video_);
      parallel<&BackwardPass::run_tasks>(threads, count * tasks);
      parallel<&BackwardPass::write_tokens>(threads, count * slots_.num_tokens());
    }
    trim_scratch();
  }

 private:
  // Gradients of keys (in units of 1 / ln 2) and values: [slot, padded_dim].
  struct Sums {
    float *keys, *values;
  };

  // A superblock of the keys of one row.
  struct Packed {
    Panels key_columns, value_columns, key_rows;
    Gains gains;
    int64_t slot, num_keys;
  };

  template <void (BackwardPass::*body)(int64_t, int64_t) const>
  void parallel(const Threads& threads, int64_t num_tasks) {
    if (num_tasks == 0) return;
    threads.parallel_for(
        num_tasks,
        [](int64_t begin, int64_t end, void* context) {
          (static_cast<const BackwardPass*>(context)->*body)(begin, end);
        },
        this);
  }

  // Consecutive tasks are the chunks of one row, then of the next.
  void run_tasks(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end;) {
      const int64_t row = task / num_chunks_, head = row / num_rows_;
      const int64_t next = min(end, (row + 1) * num_chunks_);
      run_row({problem_, first_video_ + head / problem_.num_heads, head % problem_.num_heads,
               row % num_rows_},
              task - row * num_chunks_, next - row * num_chunks_, sums_of(task));
      task = next;
    }
  }

  Sums sums_of(int64_t task) const {
    return {sums_.keys + task * sums_size_, sums_.values + task * sums_size_};
  }

  // First block of a chunk, and first query of a block.
  int64_t block_of(int64_t chunk) const { return num_blocks_ * chunk / num_chunks_; }
  int64_t query_of(int64_t block) const { return num_queries_ * block / num_blocks_; }

  // Sets `sums` and those after it to the sums of the chunks from begin to end.
  void run_row(const Row& row, int64_t begin, int64_t end, Sums sums) const {
    const int64_t num_keys = problem_.num_keys, size = min(num_keys, backward_key_superblock);
    const bool whole = size == num_keys;
    fill_zero(sums.keys, (end - begin) * sums_size_);
    fill_zero(sums.values, (end - begin) * sums_size_);
    Packed packed;
    if (problem_.cross_frame_gain != 1.0f) {
      const int64_t stride = rounded_up(num_keys, panel_width);
      packed.gains = Gains(row, 1, stride, scratch(Buffer::gains, problem_.num_frames * stride));
    }
    const int64_t first_query = query_of(block_of(begin));
    const int64_t grads = whole ? backward_block : query_of(block_of(end)) - first_query;
    float* query_grads = scratch(Buffer::query_grads, grads * padded_dim_);
    for (int64_t slot = 0; slot < num_keys; slot += size) {
      pack(row, slot, min(size, num_keys - slot), packed);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t offset = (chunk - begin) * sums_size_ + slot * padded_dim_;
        const Sums superblock{sums.keys + offset, sums.values + offset};
        for (int64_t block = block_of(chunk); block < block_of(chunk + 1); ++block) {
          float* block_grads =
              whole ? query_grads : query_grads + (query_of(block) - first_query) * padded_dim_;
          if (packed.gains.exist()) {
            run_block<true>(row, block, packed, superblock, block_grads);
          } else {
            run_block<false>(row, block, packed, superblock, block_grads);
          }
        }
      }
    }
  }

  void pack(const Row& row, int64_t slot, int64_t num_keys, Packed& packed) const {
    const int64_t dim = problem_.head_dim;
    const int64_t columns = rounded_up(num_keys, panel_width) * padded_dim_;
    const auto reader = [&](const Strided& tensor) {
      return [&, slot](int64_t i, float* to) {
        const int64_t later = min(slot + i + 8, problem_.num_keys - 1);
        prefetch<Access::read>(tensor, row, row.key(later));
        read(tensor, row, row.key(slot + i), 1.0f, to);
      };
    };
    packed.slot = slot;
    packed.num_keys = num_keys;
    packed.key_columns = pack_columns(num_keys, dim, reader(call_.key),
                                      scratch(Buffer::key_columns, columns));
    packed.value_columns = pack_columns(num_keys, dim, reader(call_.value),
                                        scratch(Buffer::value_columns, columns));
    packed.key_rows =
        pack_rows(num_keys, dim, reader(call_.key),
                  scratch(Buffer::key_rows, num_keys * rounded_up(dim, panel_width)));
  }

  template <bool gained>
  void run_block(const Row& row, int64_t block, const Packed& packed, Sums sums,
                 float* query_grads) const {
    const int64_t dim = problem_.head_dim, dim_vectors = vectors_of(dim);
    const int64_t first = query_of(block), count = query_of(block + 1) - first;
    if (count == 0) return;
    constexpr int64_t stride = backward_key_block + 16;  // an odd number of cache lines
    float* queries = scratch(Buffer::queries, backward_block * padded_dim_);
    float* output_grads = scratch(Buffer::output_grads, backward_block * padded_dim_);
    float* weights = scratch(Buffer::logits, backward_block * stride);
    float* weight_grads = scratch(Buffer::weight_grads, backward_block * stride);
    float lse[backward_block], means[backward_block];
    Place place = row.query(first);
    for (int64_t i = 0; i < count; ++i) {
      float* grad = output_grads + i * padded_dim_;
      float output[max_head_dim + width];
      read(call_.query, row, place, log2_factor(problem_.scale), queries + i * padded_dim_);
      read(call_.output_grad, row, place, 1.0f, grad);
      read(call_.output, row, place, 1.0f, output);
      lse[i] = call_.lse[row.lse_offset(place)];
      means[i] = dot(grad, output, padded_dim_);
      place = row.next(place);
    }
    const Panels query_rows{queries, padded_dim_, panel_width};
    const Panels output_grad_rows{output_grads, padded_dim_, panel_width};
    for (int64_t key = 0; key < packed.num_keys; key += backward_key_block) {
      const int64_t num_keys = min(backward_key_block, packed.num_keys - key);
      const int64_t vectors = vectors_of(num_keys);
      product<Left::rows, false>(count, vectors, dim, queries, padded_dim_,
                                 packed.key_columns.from_column(key), {weights, stride});
      product<Left::rows, false>(count, vectors, dim, output_grads, padded_dim_,
                                 packed.value_columns.from_column(key), {weight_grads, stride});
      place = row.query(first);
      for (int64_t i = 0; i < count; ++i) {
        const float* gains = gained ? packed.gains.of(place.frame, packed.slot + key) : nullptr;
        differentiate<gained>(gains, lse[i], means[i], vectors, weights + i * stride,
                              weight_grads + i * stride);
        place = row.next(place);
      }
      prefetch_queries(row, first, count, key, num_keys, packed.num_keys);
      product<Left::columns, true>(num_keys, dim_vectors, count, weights, stride,
                                   output_grad_rows,
                                   {sums.values + key * padded_dim_, padded_dim_});
      product<Left::columns, true>(num_keys, dim_vectors, count, weight_grads, stride, query_rows,
                                   {sums.keys + key * padded_dim_, padded_dim_});
      const Panels key_rows = packed.key_rows.from_row(key);
      const Matrix to{query_grads, padded_dim_};
      if (packed.slot + key > 0) {
        product<Left::rows, true>(count, dim_vectors, num_keys, weight_grads, stride, key_rows, to);
      } else {
        product<Left::rows, false>(count, dim_vectors, num_keys, weight_grads, stride, key_rows,
                                   to);
      }
    }
    if (packed.slot + packed.num_keys < problem_.num_keys) return;
    place = row.query(first);
    for (int64_t i = 0; i < count; ++i) {
      write_row(problem_.storage, query_grads + i * padded_dim_, dim, problem_.scale,
                call_.query_grad, row.offset(call_.query_grad, place));
      place = row.next(place);
    }
  }

  // Turns logits into weights, and gradients of the weights into those of the logits. Padded slots
  // give numbers that nothing reads.
  template <bool gained>
  static void differentiate(const float* gains, float lse, float mean, int64_t vectors,
                            float* weights, float* grads) {
    const Vec shift = broadcast(-lse), means = broadcast(mean);
    for (int64_t i = 0; i < vectors * width; i += width) {
      const Vec logit = load(weights + i);
      const Vec gain = gained ? load(gains + i) : broadcast(1);
      const Vec exponent = gained ? fma(logit, gain, shift) : logit + shift;
      // No weight is above 1, whatever the rounding of huge logits; NaN stays.
      const Vec weight = exp2(min(broadcast(0), exponent));
      const Vec grad = weight * (load(grads + i) - means);
      store(weights + i, weight);
      store(grads + i, gained ? grad * gain : grad);
    }
  }

  void read(const Strided& tensor, const Row& row, Place place, float factor, float* to) const {
    read_row(problem_.storage, tensor, row.offset(tensor, place), problem_.head_dim, factor, to);
  }

  template <Access access>
  void prefetch(const Strided& tensor, const Row& row, Place place) const {
    prefetch_row<access>(problem_.storage, tensor, row.offset(tensor, place), problem_.head_dim);
  }

  // Asks for what a block of queries writes and the next one reads, a part for each key block.
  void prefetch_queries(const Row& row, int64_t first, int64_t count, int64_t key,
                        int64_t num_keys, int64_t all_keys) const {
    const int64_t begin = count * key / all_keys, end = count * (key + num_keys) / all_keys;
    Place place = row.query(first + begin), later = row.query(first + count + begin);
    for (int64_t i = begin; i < end; ++i) {
      prefetch<Access::write>(call_.query_grad, row, place);
      if (first + count + i < num_queries_) {
        prefetch<Access::read>(call_.query, row, later);
        prefetch<Access::read>(call_.output_grad, row, later);
        prefetch<Access::read>(call_.output, row, later);
      }
      place = row.next(place);
      later = row.next(later);
    }
  }

  // Adds up and writes the gradients of tokens, counted from the first video of `sums_`.
  void write_tokens(int64_t begin, int64_t end) const {
    float keys[max_head_dim + width], values[max_head_dim + width];
    constexpr auto ln_2 = 0.6931471805599453f;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t video = task / slots_.num_tokens(), token = task % slots_.num_tokens();
      const Place place{token / problem_.num_tokens, token % problem_.num_tokens};
      for (int64_t head = 0; head < problem_.num_heads; ++head) {
        fill_zero(keys, padded_dim_);
        fill_zero(values, padded_dim_);
        for (int64_t i = slots_.begin(token); i < slots_.begin(token + 1); ++i) {
          const auto [used_row, slot] = slots_.at(i);
          const int64_t row = (video * problem_.num_heads + head) * num_rows_ + used_row;
          for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
            const Sums sums = sums_of(row * num_chunks_ + chunk);
            add(sums.keys + slot * padded_dim_, padded_dim_, keys);
            add(sums.values + slot * padded_dim_, padded_dim_, values);
          }
        }
        const Row row{problem_, first_video_ + video, head, 0};
        write_row(problem_.storage, keys, problem_.head_dim, ln_2, call_.key_grad,
                  row.offset(call_.key_grad, place));
        write_row(problem_.storage, values, problem_.head_dim, 1.0f, call_.value_grad,
                  row.offset(call_.value_grad, place));
      }
    }
  }

  const Backward& call_;
  const Problem& problem_;
  int64_t padded_dim_, num_rows_, num_queries_, num_blocks_, num_chunks_, sums_size_;
  TokenSlots slots_;
  Sums sums_{};  // of every task of some videos
  int64_t first_video_ = 0;
};

inline void backward_pass(const Backward& call, const Threads& threads) {
  BackwardPass(call).run(threads);
}

}  // namespace
}  // namespace tokenmix::cpu
