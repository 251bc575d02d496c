// Numbers that are not finite, tensor by tensor.

#include <atomic>

#include "common.h"

namespace {

constexpr int64_t SHARE = 1 << 14;  // numbers that are looked at by one thread

}  // namespace

extern "C" {

// flags [n]: 1 for each of n tensors of ``counts`` numbers that holds one that is not finite, or 0.
void nonfinite(const float* const* tensors, const int64_t* counts, double* flags, int64_t number,
               int64_t threads) {
  for (int64_t i = 0; i < number; ++i) {
    std::atomic<bool> all{true};
    const int64_t shares = (counts[i] + SHARE - 1) / SHARE;
    divided(shares, threads, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * SHARE, behind = std::min(end * SHARE, counts[i]);
      if (!finite(tensors[i] + first, behind - first)) all = false;
    });
    flags[i] = all ? 0 : 1;
  }
}
}
