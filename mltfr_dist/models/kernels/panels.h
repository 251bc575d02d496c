// Scores of a few users and two registers of items at a time, which never leave the registers, and
// the score that counts, as `exact_scores` (models/tiles.py) defines it.
//
// Shapes: D numbers of a user or an item. The indices of items are those among all at hand.
#pragma once

#include <immintrin.h>

#include <cmath>

#include "common.h"

namespace {

#ifdef __AVX512F__
typedef __m512 Register;
#define ON_REGISTERS(operation) _mm512_##operation
constexpr int64_t USERS = 12;  // users of a block: their sums take three quarters of the registers
#else
typedef __m256 Register;
#define ON_REGISTERS(operation) _mm256_##operation
constexpr int64_t USERS = 6;
#endif

constexpr int64_t LANES = sizeof(Register) / sizeof(float);
constexpr int64_t PANEL = 2 * LANES;            // items of a panel: two registers
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

// Items in panels [D, PANEL]; behind the last item stand zeros.
class Panels {
 public:
  int64_t dim, count = 0;

  Panels(int64_t most, int64_t dim) : dim(dim), numbers(panels(most) * PANEL * dim + LINE) {
    const auto offset = (uintptr_t)numbers.data() / sizeof(float);
    start = numbers.data() + (LINE - offset % LINE) % LINE;
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
  Register of[USERS][2];

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
  for (int64_t u = 0; u < USERS; ++u) s.of[u][0] = s.of[u][1] = ON_REGISTERS(setzero_ps)();
  for (int64_t c = 0; c < dim; ++c, panel += PANEL) {
    const Register left = ON_REGISTERS(load_ps)(panel);
    const Register right = ON_REGISTERS(load_ps)(panel + LANES);
    for (int64_t u = 0; u < USERS; ++u) {
      const Register x = ON_REGISTERS(set1_ps)(users[u][c]);
      s.of[u][0] = ON_REGISTERS(fmadd_ps)(x, left, s.of[u][0]);
      s.of[u][1] = ON_REGISTERS(fmadd_ps)(x, right, s.of[u][1]);
    }
  }
  return s;
}

// A bit for each number that is ``OP`` ``limit``.
template <int OP>
inline unsigned lanes(Register numbers, Register limit) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask(numbers, limit, OP);
#else
  return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(numbers, limit, OP));
#endif
}

// The same for a user's scores of a panel.
template <int OP>
inline unsigned lanes(const Register* scores, Register limit) {
  return lanes<OP>(scores[0], limit) | lanes<OP>(scores[1], limit) << LANES;
}

inline void store_panel(float* to, const Register* scores) {
  ON_REGISTERS(storeu_ps)(to, scores[0]);
  ON_REGISTERS(storeu_ps)(to + LANES, scores[1]);
}

// work(lane) for each bit.
template <typename Work>
void each(unsigned bits, const Work& work) {
  for (; bits; bits &= bits - 1) work((int64_t)__builtin_ctz(bits));
}

// Which items do not count for whom: of user u ascending indices from bounds[u] to bounds[u + 1].
struct LeftOut {
  const int64_t *bounds, *indices;

  bool has(int64_t user, int64_t index) const {
    return std::binary_search(indices + bounds[user], indices + bounds[user + 1], index);
  }
};

}  // namespace
