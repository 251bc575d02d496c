// Rows that may be among the best of a query, by rounded products whose error is bounded.
#pragma once

#include "rounded.h"

namespace {

constexpr int NONE = -32768;    // smaller than all other 16-bit numbers
constexpr int64_t FIRST = 512;  // rows that are looked at before there is a bound

// The k-th largest of 16-bit numbers, ``count`` of them, in whole blocks: bit by bit, as what k of
// them reach.
int kth_largest(const int16_t* numbers, int64_t count, int64_t k) {
  int kth = NONE;
  for (int bit = 1 << 15; bit; bit >>= 1) {
    const Sums below = Sums::of((int16_t)(kth + bit - 1));
    int64_t reaching = 0;
    for (int64_t i = 0; i < count; i += BLOCK)
      reaching += __builtin_popcount(Sums::read(numbers + i).above(below));
    kth += reaching >= k ? bit : 0;
  }
  return kth;
}

int kth_largest(std::vector<int16_t>& numbers, int64_t k) {
  const size_t count = numbers.size();
  numbers.resize((count + BLOCK - 1) / BLOCK * BLOCK, NONE);
  const int kth = kth_largest(numbers.data(), (int64_t)numbers.size(), k);
  numbers.resize(count);
  return kth;
}

// What may be among the best of one query.
struct Candidates {
  int64_t sought, groups;  // a power of two
  int window, behind = NONE;  // candidates are larger than ``behind``
  std::vector<int16_t> values, largest;  // of candidates; of groups of rows
  std::vector<int32_t> ids;

  explicit Candidates(int64_t sought, int window = 0)
      : sought(sought), groups(sought <= 32 ? 8 : 16), window(window),
        largest(groups * LANES, NONE) {
    values.reserve(RESERVED);
    ids.reserve(RESERVED);
  }

  // Those of another query are forgotten.
  void begin(int of_window) {
    window = of_window;
    behind = NONE;
    values.clear();
    ids.clear();
    std::fill(largest.begin(), largest.end(), NONE);
  }

  // Of the block from row ``id`` on, of which ``left`` are there at most.
  void group(const Sums& sums, int64_t id, int64_t left) {
    if (left < BLOCK) return;  // what is not there would count as zero
    int16_t* best = largest.data() + (id & (groups * LANES - 1));
    Sums::read(best).larger(sums).put(best);
  }

  // A bound from the largest of the groups: K of them hold K rows at least that large.
  void bound() { behind = std::max(behind, kth_largest(largest, sought) - window - 1); }

  // ``sought`` rows have products of at least ``least``, on the scale of the sums, from which
  // those may err by half the window.
  void bound(float least) {
    const float limit = std::floor(least) - 0.5f * (float)window - 1;
    behind = std::max(behind, (int)std::max(limit, (float)NONE));
  }

  // Of the block from row ``id`` on, of which ``left`` are there at most, those with a bit in
  // ``above``.
  void take(const int16_t* sums, uint32_t above, int64_t id, int64_t left) {
    if (left < BLOCK) above &= (uint32_t{1} << left) - 1;
    for (; above; above &= above - 1) {
      const int row = __builtin_ctz(above);
      values.push_back(sums[row]);
      ids.push_back((int32_t)(id + row));
    }
  }

  void drop() {
    if ((int64_t)values.size() <= sought) return;
    behind = std::max(behind, kth_largest(values, sought) - window - 1);
    int64_t kept = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      values[kept] = values[i];
      ids[kept] = ids[i];
      kept += values[i] > behind;
    }
    values.resize(kept);
    ids.resize(kept);
  }
};

}  // namespace
