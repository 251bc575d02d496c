// Scores of a few users and sixteen items at a time, which never leave the registers, and the score
// that counts, as `exact_scores` (models/tiles.py) defines it.
//
// Shapes: D numbers of a user or an item. The places of items are those among all at hand.
#pragma once

#include <immintrin.h>

#include <cmath>

#include "common.h"

namespace {

constexpr int64_t PANEL = 16;                   // items of a panel: two registers
constexpr int64_t USERS = 6;                    // users of a block: twelve registers of sums
constexpr int64_t CACHED_NUMBERS = 1 << 15;     // of items that stay in the cache for all users
constexpr int64_t LINE = 16;                    // numbers of a line of the cache

// The score as it counts. Products are exact in float64, so sums alone round, in a fixed order.
struct Exact {
  int64_t dim;
  std::vector<double> parts;

  explicit Exact(int64_t dim) : dim(dim), parts(dim + 1) {}

  float operator()(const float* a, const float* b) {
    double* p = parts.data();
    int64_t n = dim;
    for (int64_t c = 0; c < n; ++c) p[c] = (double)a[c] * b[c];
    while (n > 1) {
      if (n % 2) p[n++] = 0;
      n /= 2;
      for (int64_t c = 0; c < n; ++c) p[c] += p[n + c];
    }
    return (float)p[0];
  }
};

// Eight columns of eight rows.
inline void transpose(const float* const* rows, int64_t column, float* to) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(rows[i] + column);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
      a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xEE);
    }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * PANEL, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * PANEL, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}

// Items in panels [D, 16]; behind the last item stand zeros.
class Panels {
 public:
  int64_t dim, count = 0;

  Panels(int64_t most, int64_t dim) : dim(dim), numbers(panels(most) * PANEL * dim + LINE) {
    const auto place = (uintptr_t)numbers.data() / sizeof(float);
    start = numbers.data() + (LINE - place % LINE) % LINE;
  }

  static int64_t panels(int64_t count) { return (count + PANEL - 1) / PANEL; }
  int64_t size() const { return panels(count); }
  const float* operator[](int64_t panel) const { return start + panel * PANEL * dim; }

  void fill(const float* vectors, int64_t items, int64_t threads) {
    count = items;
    divided(size(), threads, [&](int64_t begin, int64_t end) {
      const std::vector<float> zeros(dim);
      for (int64_t p = begin; p < end; ++p) {
        const float* rows[PANEL];
        for (int64_t i = 0; i < PANEL; ++i) {
          const int64_t item = p * PANEL + i;
          rows[i] = item < count ? vectors + item * dim : zeros.data();
        }
        float* to = start + p * PANEL * dim;
        int64_t c = 0;
        for (; c + WIDTH <= dim; c += WIDTH)
          for (int64_t i = 0; i < PANEL; i += WIDTH) transpose(rows + i, c, to + c * PANEL + i);
        for (; c < dim; ++c)
          for (int64_t i = 0; i < PANEL; ++i) to[c * PANEL + i] = rows[i][c];
      }
    });
  }

 private:
  std::vector<float> numbers;
  float* start;
};

struct Scores {
  __m256 of[USERS][2];

  // In memory, so that the scores themselves stay in registers.
  Scores copy() const {
    Scores made;
    for (int64_t u = 0; u < USERS; ++u)
      for (int64_t half = 0; half < 2; ++half) made.of[u][half] = of[u][half];
    return made;
  }
};

inline __attribute__((always_inline)) Scores products(const float* const* users,
                                                      const float* panel, int64_t dim) {
  Scores s;
  for (int64_t u = 0; u < USERS; ++u) s.of[u][0] = s.of[u][1] = _mm256_setzero_ps();
  for (int64_t c = 0; c < dim; ++c, panel += PANEL) {
    const __m256 left = _mm256_load_ps(panel), right = _mm256_load_ps(panel + WIDTH);
    for (int64_t u = 0; u < USERS; ++u) {
      const __m256 x = _mm256_broadcast_ss(users[u] + c);
      s.of[u][0] = _mm256_fmadd_ps(x, left, s.of[u][0]);
      s.of[u][1] = _mm256_fmadd_ps(x, right, s.of[u][1]);
    }
  }
  return s;
}

// A bit for each of a user's sixteen scores that is ``OP`` ``limit``.
template <int OP>
inline unsigned lanes(const __m256* scores, __m256 limit) {
  const int left = _mm256_movemask_ps(_mm256_cmp_ps(scores[0], limit, OP));
  return (unsigned)left | (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(scores[1], limit, OP)) << WIDTH;
}

// work(lane) for each bit.
template <typename Work>
void each(unsigned bits, const Work& work) {
  for (; bits; bits &= bits - 1) work((int64_t)__builtin_ctz(bits));
}

// Which items do not count for whom: of user u ascending places from bounds[u] to bounds[u + 1].
struct LeftOut {
  const int64_t *bounds, *places;

  bool has(int64_t user, int64_t place) const {
    return std::binary_search(places + bounds[user], places + bounds[user + 1], place);
  }
};

}  // namespace
