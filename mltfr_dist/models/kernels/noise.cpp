// Rows whose noise alone may make them the best, without a matrix of noise.

#include <cmath>
#include <functional>

#include "common.h"

namespace {

constexpr int64_t SOME = 512;
constexpr double DRAWS = 1 << 24;
constexpr double MARGIN = 0.01;  // over what fp32 and its epsilons change of a Gumbel number

// lowbias32 (`draws.py: mix32`) of one query's word and some rows', upper 24 bits.
void draw(uint32_t query, const uint32_t* rows, int64_t count, int32_t* numbers) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t z = query ^ rows[i];
    z = (z ^ z >> 16) * 0x7FEB352Du;
    z = (z ^ z >> 15) * 0x846CA68Bu;
    numbers[i] = (int32_t)((z ^ z >> 16) >> 8);
  }
}

// The lowest number whose Gumbel value may reach that of ``number`` less ``reach``.
int32_t threshold(int32_t number, double reach) {
  const double value = -std::log(-std::log(std::max(number, 1) / DRAWS)) - MARGIN - reach;
  return (int32_t)std::max(0.0, DRAWS * (std::exp(-std::exp(-value)) - 1e-9) - 2);
}

}  // namespace

extern "C" {

// For each query the indices of all rows whose number may come within ``reach`` of the K-th largest
// one, ascending: queries [G], rows [S] words -> indices [G, C], counts [G]. A count above C says
// that some are left out.
void noisy_candidates(const uint32_t* queries, const uint32_t* rows, int32_t* indices,
                      int64_t* counts, double reach, int64_t num_queries, int64_t num_rows,
                      int64_t num_kept, int64_t capacity, int64_t threads) {
  divided(num_queries, threads, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> numbers(padded(num_rows)), top(num_kept);
    for (int64_t g = begin; g < end; ++g) {
      std::fill(top.begin(), top.end(), -1);  // descending
      for (int64_t first = 0; first < num_rows; first += SOME) {
        const int64_t count = std::min(SOME, num_rows - first);
        int32_t* some = &numbers[first];
        draw(queries[g], rows + first, count, some);
        int32_t largest = -1;
        for (int64_t i = 0; i < count; ++i) largest = std::max(largest, some[i]);
        for (int64_t i = 0; largest > top.back() && i < count; ++i) {
          if (some[i] <= top.back()) continue;
          const auto after = std::upper_bound(top.begin(), top.end(), some[i], std::greater<>());
          std::move_backward(after, top.end() - 1, top.end());
          *after = some[i];
        }
      }
      const int32_t least = threshold(top.back(), reach);
      int64_t near = 0;
      for (int64_t first = 0; first < num_rows; first += SOME) {
        const int64_t count = std::min(SOME, num_rows - first);
        const int32_t* some = &numbers[first];
        int32_t largest = -1;
        for (int64_t i = 0; i < count; ++i) largest = std::max(largest, some[i]);
        for (int64_t i = 0; largest >= least && i < count; ++i) {
          if (some[i] < least) continue;
          if (near < capacity) indices[g * capacity + near] = (int32_t)(first + i);
          ++near;
        }
      }
      counts[g] = near;
    }
  });
}
}
