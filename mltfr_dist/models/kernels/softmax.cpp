// Exponentials of rows of logits, in place, and their sums: what torch does in four passes.

#include <cmath>

#include "exponential.h"

namespace {

constexpr int64_t SOME = 32 * WIDE;  // numbers whose exponentials are added up in fp32

float largest_of(const float* row, int64_t count, float largest) {
  Wide lanes = Wide{} + largest;
  int64_t i = 0;
  for (; i + WIDE <= count; i += WIDE) {
    const Wide x = get<Wide>(row + i);
    lanes = x > lanes ? x : lanes;
  }
  for (int64_t lane = 0; lane < WIDE; ++lane) largest = std::max(largest, lanes[lane]);
  for (; i < count; ++i) largest = std::max(largest, row[i]);
  return largest;
}

// row [count] becomes exp(row - largest); returns the sum.
double exponentiate(float* row, int64_t count, float largest) {
  double total = 0;
  int64_t i = 0;
  while (i + WIDE <= count) {
    Wide lanes{};
    for (const int64_t end = std::min(i + SOME, count); i + WIDE <= end; i += WIDE) {
      const Wide e = exponential(get<Wide>(row + i) - largest);
      std::memcpy(row + i, &e, sizeof e);
      lanes += e;
    }
    for (int64_t lane = 0; lane < WIDE; ++lane) total += lanes[lane];
  }
  if (i < count) {
    float rest[WIDE] = {};
    std::copy(row + i, row + count, rest);
    const Wide e = exponential(get<Wide>(rest) - largest);
    std::memcpy(rest, &e, sizeof e);
    std::copy(rest, rest + (count - i), row + i);
    for (; i < count; ++i) total += row[i];
  }
  return total;
}

}  // namespace

extern "C" {

// logits [n, width] become exp(logits - largest) and sums [n] their sums, where largest [n] is
// first raised to the largest logit of each row. What is not finite makes its row's sum NaN or
// infinite.
void exponentials(float* logits, float* largest, float* sums, int64_t n, int64_t width,
                  int64_t threads) {
  divided(n, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* row = logits + r * width;
      largest[r] = largest_of(row, width, largest[r]);
      sums[r] = exponentiate(row, width, largest[r]);
    }
  });
}
}
