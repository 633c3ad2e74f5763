// The forward pass. Include the instruction set's vectors first.
//
// A row's keys and values are packed once, as the two products read them. Queries pass in blocks
// whose logits stay in the first-level cache between the products. Keys that are too many for one
// block of logits pass in blocks too, with a running maximum and sum (Milakov and Gimelshein,
// "Online normalizer calculation for softmax", 2018); then a chunk of many query blocks shares each
// key block, so that packed keys are read from far memory rarely.
//
// Products is the arithmetic of the two products: Float32Products or TileProducts.
#pragma once

#include <cstdint>

#include "pack.h"
#include "rows.h"
#include "scratch.h"
#include "softmax.h"

namespace tokenmix::cpu {
namespace {

constexpr int64_t blocks_of_chunk = 8;      // if there are many blocks of keys
constexpr int64_t max_whole_keys = 640;     // in one block
constexpr int64_t forward_key_block = 512;  // otherwise; whole panels and tiles

// Heads that pass together, since a token's heads usually lie side by side in memory: as many as
// leave room for their keys and values in the second-level cache, and as there are for each thread.
constexpr int64_t max_group = 16;
constexpr int64_t group_bytes = 1 << 20;

template <class Products>
class ForwardPass {
  using Packed = typename Products::Packed;

 public:
  ForwardPass(const Forward& call, int64_t num_threads)
      : call_(call),
        problem_(call.problem),
        products_(call),
        padded_dim_(rounded_up(problem_.head_dim, width)),
        padded_keys_(rounded_up(problem_.num_keys, 2 * width)),
        key_block_(problem_.num_keys > max_whole_keys ? forward_key_block : padded_keys_),
        num_rows_(num_rows_of(problem_)),
        num_queries_(Row{problem_, 0, 0, 0}.num_queries()),
        num_chunks_(ceil_div(num_queries_, padded_keys_ > key_block_
                                               ? Products::block * blocks_of_chunk
                                               : Products::block)) {
    const int64_t fitting = group_bytes / (4 * (products_.keys_size() + products_.values_size()));
    const int64_t sharing = problem_.batch * problem_.num_heads * num_rows_ / num_threads;
    const int64_t group = max(1, min(max_group, min(fitting, sharing)));
    num_groups_ = ceil_div(problem_.num_heads, group);
  }

  int64_t num_tasks() const { return problem_.batch * num_groups_ * num_rows_ * num_chunks_; }

  // Consecutive tasks are the chunks of one row of a group of heads, then of the next.
  void run(int64_t begin, int64_t end) const {
    [[maybe_unused]] const typename Products::Thread thread;
    for (int64_t task = begin; task < end;) {
      const int64_t row = task / num_chunks_, group = row / num_rows_;
      const int64_t next = min(end, (row + 1) * num_chunks_);
      const int64_t part = group % num_groups_;
      const int64_t head = problem_.num_heads * part / num_groups_;
      run_group({problem_, group / num_groups_, head, row % num_rows_},
                problem_.num_heads * (part + 1) / num_groups_ - head, task - row * num_chunks_,
                next - row * num_chunks_);
      task = next;
    }
    trim_scratch();
  }

 private:
  // The row of `first` and the heads after it.
  void run_group(const Row& first, int64_t num_heads, int64_t begin, int64_t end) const {
    float* keys = scratch(Buffer::key_columns, num_heads * products_.keys_size());
    float* values = scratch(Buffer::value_rows, num_heads * products_.values_size());
    Packed packed[max_group];
    for (int64_t i = 0; i < num_heads; ++i) {
      packed[i] = products_.pack(first.of_head(first.head + i), keys + i * products_.keys_size(),
                                 values + i * products_.values_size());
    }
    const bool gained = problem_.cross_frame_gain != 1.0f;
    const Gains gains =
        gained ? Gains(first, products_.factor(), padded_keys_,
                       scratch(Buffer::gains, problem_.num_frames * padded_keys_))
               : Gains();
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t query = num_queries_ * chunk / num_chunks_;
      const int64_t count = num_queries_ * (chunk + 1) / num_chunks_ - query;
      for (int64_t i = 0; i < num_heads; ++i) {
        const Row row = first.of_head(first.head + i);
        if (gained) {
          run_chunk<Factors::each>(row, query, count, packed[i], gains);
        } else {
          run_chunk<Products::factors>(row, query, count, packed[i], gains);
        }
      }
    }
  }

  template <Factors factors>
  void run_chunk(const Row& row, int64_t first, int64_t count, const Packed& packed,
                 const Gains& gains) const {
    const int64_t padded_count = rounded_up(count, Products::rows), size = products_.query_size();
    float* queries = scratch(Buffer::queries, padded_count * size);
    float* outputs = scratch(Buffer::outputs, padded_count * padded_dim_);
    float* maxima = scratch(Buffer::maxima, 2 * count);
    float* sums = maxima + count;
    Place place = row.query(first);
    for (int64_t i = 0; i < count; ++i) {
      products_.read_query(row.offset(call_.query, place), queries + i * size);
      place = row.next(place);
    }
    for (int64_t i = count * size; i < padded_count * size; ++i) queries[i] = 0;
    for (int64_t slot = 0; slot < problem_.num_keys; slot += key_block_) {
      for (int64_t i = 0; i < count; i += Products::block) {
        run_block<factors>(row, first + i, min(Products::block, count - i), first + count + i, slot,
                           packed, gains, queries + i * size, outputs + i * padded_dim_,
                           maxima + i, sums + i);
      }
    }
    place = row.query(first);
    for (int64_t i = 0; i < count; ++i) {
      write_row(problem_.storage, outputs + i * padded_dim_, problem_.head_dim, 1.0f / sums[i],
                call_.output, row.offset(call_.output, place));
      call_.lse[row.lse_offset(place)] = maxima[i] + __builtin_log2f(sums[i]);
      place = row.next(place);
    }
  }

  // Attention of up to a block of queries to the key block at `slot`, added to what earlier blocks
  // gave. Queries from `later` on are needed soon.
  template <Factors factors>
  void run_block(const Row& row, int64_t first, int64_t count, int64_t later, int64_t slot,
                 const Packed& packed, const Gains& gains, const float* queries, float* outputs,
                 float* maxima, float* sums) const {
    const int64_t num_keys = min(key_block_, problem_.num_keys - slot);
    const int64_t vectors = vectors_of(num_keys);
    // An odd number of cache lines, so that equal columns of the rows fall into different sets.
    const int64_t stride = rounded_up(vectors * width, 16) | 16;
    float* logits = scratch(Buffer::logits, Products::block * stride);
    products_.logits(count, slot, num_keys, queries, packed, logits, stride);
    const float factor = products_.factor();
    const auto factors_of = [&](Place place) {
      return factors == Factors::each ? gains.of(place.frame, slot) : &factor;
    };
    // Apart from the exponentials, so that the maxima of many rows are under way at once.
    float new_maxima[Products::block];
    Place place = row.query(first), later_place = row.query(later);
    for (int64_t i = 0; i < count; ++i) {
      float* row_logits = logits + i * stride;
      for (int64_t j = num_keys; j < vectors * width; ++j) row_logits[j] = -__builtin_inff();
      const float max = scale_logits<factors>(row_logits, factors_of(place), vectors);
      new_maxima[i] = slot > 0 && max < maxima[i] ? maxima[i] : max;
      place = row.next(place);
    }
    place = row.query(first);
    for (int64_t i = 0; i < count; ++i) {
      if (slot + num_keys == problem_.num_keys) {
        prefetch<Access::write>(call_.output, row, place);
        if (later + i < num_queries_) prefetch<Access::read>(call_.query, row, later_place);
      }
      const float max = new_maxima[i];
      float* row_logits = logits + i * stride;
      auto* weights = reinterpret_cast<typename Products::Weight*>(row_logits);
      const float sum = exponentiate(row_logits, max, vectors, weights);
      products_.pad_weights(vectors, weights);
      if (slot > 0) {
        const float shrink = __builtin_exp2f(maxima[i] - max);
        sums[i] = sums[i] * shrink + sum;
        scale_row(shrink, padded_dim_, outputs + i * padded_dim_);
      } else {
        sums[i] = sum;
      }
      maxima[i] = max;
      place = row.next(place);
      later_place = row.next(later_place);
    }
    if (slot > 0) {
      products_.template outputs<true>(count, slot, num_keys, logits, stride, packed, outputs);
    } else {
      products_.template outputs<false>(count, slot, num_keys, logits, stride, packed, outputs);
    }
  }

  template <Access access>
  void prefetch(const Strided& tensor, const Row& row, Place place) const {
    prefetch_row<access>(problem_.storage, tensor, row.offset(tensor, place), problem_.head_dim);
  }

  const Forward& call_;
  const Problem& problem_;
  Products products_;
  int64_t padded_dim_, padded_keys_, key_block_, num_rows_, num_queries_, num_chunks_, num_groups_;
};

template <class Products>
void forward_pass(const Forward& call, const Threads& threads) {
  const ForwardPass<Products> pass(call, threads.count);
  if (pass.num_tasks() == 0) return;
  threads.parallel_for(
      pass.num_tasks(),
      [](int64_t begin, int64_t end, void* context) {
        static_cast<const ForwardPass<Products>*>(context)->run(begin, end);
      },
      const_cast<ForwardPass<Products>*>(&pass));
}

}  // namespace
}  // namespace tokenmix::cpu
