// Threads without a pool: every call starts its own.
#pragma once

#include <algorithm>
#include <thread>
#include <vector>

#include "kernels/cpu/attention.h"

namespace tokenmix::cpu::testing {

template <int64_t count>
Threads threads() {
  return {count, [](int64_t num_tasks, void (*body)(int64_t, int64_t, void*), void* context) {
            std::vector<std::thread> running;
            for (int64_t i = 0; i < count; ++i) {
              const int64_t begin = num_tasks * i / count, end = num_tasks * (i + 1) / count;
              if (begin < end) running.emplace_back(body, begin, end, context);
            }
            for (std::thread& thread : running) thread.join();
          }};
}

// One task at a time, the last first, whatever the number of threads announced.
template <int64_t count>
Threads backwards() {
  return {count, [](int64_t num_tasks, void (*body)(int64_t, int64_t, void*), void* context) {
            for (int64_t i = num_tasks; i-- > 0;) body(i, i + 1, context);
          }};
}

}  // namespace tokenmix::cpu::testing
