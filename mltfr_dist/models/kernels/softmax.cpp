// Exponentials of rows of logits, in place, and their sums: what torch does in four passes.

#include <cmath>

#include "exponential.h"

namespace {

#ifdef __AVX512F__
typedef float Wide __attribute__((vector_size(64)));
#else
typedef Floats Wide;
#endif
constexpr int64_t LANES = sizeof(Wide) / sizeof(float);
constexpr int64_t SOME = 32 * LANES;  // numbers whose exponentials are added up in fp32

Wide wide(const float* from) {
  Wide numbers;
  std::memcpy(&numbers, from, sizeof numbers);
  return numbers;
}

float largest_of(const float* row, int64_t count, float largest) {
  Wide lanes = Wide{} + largest;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Wide x = wide(row + i);
    lanes = x > lanes ? x : lanes;
  }
  for (int64_t lane = 0; lane < LANES; ++lane) largest = std::max(largest, lanes[lane]);
  for (; i < count; ++i) largest = std::max(largest, row[i]);
  return largest;
}

// row [count] becomes exp(row - largest); returns the sum.
double exponentiate(float* row, int64_t count, float largest) {
  double total = 0;
  int64_t i = 0;
  while (i + LANES <= count) {
    Wide lanes{};
    for (const int64_t end = std::min(i + SOME, count); i + LANES <= end; i += LANES) {
      const Wide e = exponential(wide(row + i) - largest);
      std::memcpy(row + i, &e, sizeof e);
      lanes += e;
    }
    for (int64_t lane = 0; lane < LANES; ++lane) total += lanes[lane];
  }
  if (i < count) {
    float rest[LANES] = {};
    std::copy(row + i, row + count, rest);
    const Wide e = exponential(wide(rest) - largest);
    std::memcpy(rest, &e, sizeof e);
    std::copy(rest, rest + (count - i), row + i);
    for (; i < count; ++i) total += row[i];
  }
  return total;
}

}  // namespace

extern "C" {

// logits [n, width] become exp(logits - largest) and sums [n] their sums, where largest [n] is first
// raised to the largest logit of each row. What is not finite makes its row's sum NaN or infinite.
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
