// The rows of largest product with each query, found by products of 8-bit numbers whose error is
// bounded; what the bound leaves open is computed in float64.
//
// G queries and S rows of D numbers, K rows sought.

#include "rounded.h"

namespace {

constexpr int NONE = -32768;  // smaller than all other 16-bit numbers

// The k-th largest of 16-bit numbers, ``count`` of them, a multiple of 16: bit by bit, as what k of
// them reach.
int kth_largest(const int16_t* numbers, int64_t count, int64_t k) {
  int found = NONE;
  for (int bit = 1 << 15; bit; bit >>= 1) {
    const __m256i below = _mm256_set1_epi16((int16_t)(found + bit - 1));
    __m256i reaching = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += LANES) {
      const __m256i some = _mm256_loadu_si256((const __m256i*)(numbers + i));
      reaching = _mm256_sub_epi16(reaching, _mm256_cmpgt_epi16(some, below));
    }
    __m256i pairs = _mm256_madd_epi16(reaching, _mm256_set1_epi16(1));
    pairs = _mm256_hadd_epi32(pairs, pairs);
    pairs = _mm256_hadd_epi32(pairs, pairs);
    const int total = _mm256_extract_epi32(pairs, 0) + _mm256_extract_epi32(pairs, 4);
    found += total >= k ? bit : 0;
  }
  return found;
}

int kth_largest(std::vector<int16_t>& numbers, int64_t k) {
  const size_t count = numbers.size();
  numbers.resize((count + LANES - 1) / LANES * LANES, NONE);
  const int found = kth_largest(numbers.data(), (int64_t)numbers.size(), k);
  numbers.resize(count);
  return found;
}

// What may be among the best of one query.
struct Candidates {
  int64_t sought, groups, tiles = 0;
  int window, behind = NONE;  // candidates are larger than ``behind``
  std::vector<int16_t> values, largest;
  std::vector<int32_t> ids;

  Candidates(int64_t sought, int window)
      : sought(sought), groups(sought <= 32 ? 8 : 16), window(window),
        largest(groups * LANES, NONE) {
    values.reserve(RESERVED);
    ids.reserve(RESERVED);
  }

  // A bound from the largest of groups of rows: K groups hold K rows at least that large.
  void bound(const int16_t* sums, int64_t some) {
    __m256i* best = (__m256i*)largest.data();
    for (int64_t start = 0; start + groups * LANES <= some; start += groups * LANES)
      for (int64_t i = 0; i < groups; ++i) {
        const __m256i found = _mm256_loadu_si256((const __m256i*)(sums + start + i * LANES));
        _mm256_storeu_si256(best + i, _mm256_max_epi16(_mm256_loadu_si256(best + i), found));
      }
    ++tiles;
    if ((tiles & (tiles - 1)) || sought > groups * LANES) return;  // at 1, 2, 4, 8, ...
    behind = std::max(behind, kth_largest(largest, sought) - window - 1);
  }

  void take(const int16_t* sums, int64_t first, int64_t some) {
    const int64_t whole = some / LANES * LANES;
    __m256i limit = _mm256_set1_epi16((int16_t)std::max(behind, NONE));
    for (int64_t start = 0; start < some; start += LANES) {
      const __m256i found = _mm256_loadu_si256((const __m256i*)(sums + start));
      unsigned above = (unsigned)_mm256_movemask_epi8(_mm256_cmpgt_epi16(found, limit));
      if (start >= whole) above &= (1u << 2 * (some - start)) - 1;
      while (above) {
        const int lane = __builtin_ctz(above) / 2;
        values.push_back(sums[start + lane]);
        ids.push_back((int32_t)(first + start + lane));
        above &= ~(3u << 2 * lane);
      }
    }
    if ((int64_t)values.size() > std::max(POOL, 8 * sought)) drop();
  }

  void drop() {
    if ((int64_t)values.size() <= sought) return;
    behind = std::max(behind, kth_largest(values, sought) - window - 1);
    int64_t kept = 0;
    for (size_t i = 0; i < values.size(); ++i)
      if (values[i] > behind) {
        values[kept] = values[i];
        ids[kept++] = ids[i];
      }
    values.resize(kept);
    ids.resize(kept);
  }
};

// The product in float64, rounded once.
float exact_product(const float* a, const float* b, int64_t dim) {
  __m256d even = _mm256_setzero_pd(), odd = even;
  int64_t c = 0;
  for (; c + 8 <= dim; c += 8) {
    const __m256d x = _mm256_cvtps_pd(_mm_loadu_ps(a + c)), y = _mm256_cvtps_pd(_mm_loadu_ps(b + c));
    even = _mm256_fmadd_pd(x, y, even);
    odd = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_loadu_ps(a + c + 4)),
                          _mm256_cvtps_pd(_mm_loadu_ps(b + c + 4)), odd);
  }
  double parts[4];
  _mm256_storeu_pd(parts, _mm256_add_pd(even, odd));
  double total = (parts[0] + parts[2]) + (parts[1] + parts[3]);
  for (; c < dim; ++c) total += (double)a[c] * b[c];
  return (float)total;
}

float quick_product(const float* a, const float* b, int64_t dim) {
  Floats even{}, odd{};
  int64_t c = 0;
  for (; c + 16 <= dim; c += 16) {
    even += load(a + c) * load(b + c);
    odd += load(a + c + 8) * load(b + c + 8);
  }
  float total = sum(even + odd);
  for (; c < dim; ++c) total += a[c] * b[c];
  return total;
}

bool finite(const float* v, int64_t count) {
  Floats zeros{};
  for (int64_t i = 0; i < count; i += WIDTH) zeros += eight(v, i, count) * 0.0f;
  return sum(zeros) == 0;
}

// What orders candidates: the product, largest first, then the id.
int64_t place(float product, int32_t id) {
  const float size = -product + 0.0f;  // no negative zero
  int32_t bits;
  std::memcpy(&bits, &size, sizeof bits);
  return (int64_t)(bits ^ (bits >> 31 & 0x7fffffff)) << 32 | (uint32_t)id;
}

float product_of(int64_t place) {
  const int32_t ordered = (int32_t)(place >> 32), bits = ordered ^ (ordered >> 31 & 0x7fffffff);
  float size;
  std::memcpy(&size, &bits, sizeof size);
  return -size;
}

// Room for the candidates of one query, used again for the next.
struct Room {
  std::vector<float> quick;
  std::vector<int16_t> rounded;
  std::vector<int64_t> places, ordered;
};

// Ascending. Few are counted, for what a comparison says cannot be foreseen.
void order(Room& room) {
  const auto& places = room.places;
  room.ordered = places;
  if (places.size() > 64) return std::sort(room.ordered.begin(), room.ordered.end());
  for (const int64_t one : places) {
    int64_t smaller = 0;
    for (const int64_t other : places) smaller += other < one;
    room.ordered[smaller] = one;
  }
}

// The best of one query's candidates, by fp32 products first: those whose error cannot matter.
void settle(const float* query, const float* rows, int64_t dim, float largest_row, Candidates& of,
            Room& room, float* scores, int64_t* ids) {
  of.drop();
  for (const int32_t id : of.ids) __builtin_prefetch(rows + id * dim);
  const size_t count = of.ids.size();
  float largest, norm;
  measure(query, dim, largest, norm);
  const float scale = 32000.0f / std::max(norm * largest_row, 1e-30f);
  room.quick.resize(count);
  room.rounded.resize(count);
  for (size_t i = 0; i < count; ++i) {
    room.quick[i] = quick_product(query, rows + of.ids[i] * dim, dim);
    room.rounded[i] = (int16_t)std::floor(room.quick[i] * scale);
  }
  const float slack = 2.0f * (float)(dim + 16) * 6e-8f * norm * largest_row;
  const float least = (float)kth_largest(room.rounded, of.sought) / scale - slack;
  room.places.clear();
  for (size_t i = 0; i < count; ++i)
    if (room.quick[i] >= least)
      room.places.push_back(place(exact_product(query, rows + of.ids[i] * dim, dim), of.ids[i]));
  order(room);
  for (int64_t k = 0; k < of.sought; ++k) {
    scores[k] = product_of(room.ordered[k]);
    ids[k] = (int32_t)(uint32_t)room.ordered[k];
  }
}

}  // namespace

extern "C" {

// The K <= S best of each query: scores and ids [G, K], best first, of equal scores the lower ids.
// Returns 0, or 1 where a number is not finite or too many to a sum, and nothing was found.
int nearest(const float* queries, const float* rows, float* scores, int64_t* ids, int64_t groups,
            int64_t count, int64_t dim, int64_t sought, int64_t threads) {
  if (!finite(queries, groups * dim) || !finite(rows, count * dim)) return 1;
  const RoundedRows rounded(rows, count, dim);
  if (RoundedQuery::limit(0, 1, dim, rounded) < 16) return 1;
  divided(groups, threads, [&](int64_t begin, int64_t end) {
    std::vector<RoundedQuery> some;
    std::vector<Candidates> found;
    some.reserve(end - begin);
    found.reserve(end - begin);
    for (int64_t g = begin; g < end; ++g) {
      some.emplace_back(queries + g * dim, dim, rounded, 1e30f);
      const double window = 2.0 * some.back().error * some.back().scale * rounded.scale;
      found.emplace_back(sought, (int)std::ceil(std::min(window, 65536.0)) + 1);
    }
    std::vector<int16_t> sums(QUERIES * TILE);
    for (int64_t first = 0; first < count; first += TILE) {
      const int64_t whole = std::min(TILE, count - first);
      for (int64_t g = 0; g < end - begin; g += QUERIES) {
        const int64_t together = std::min(QUERIES, end - begin - g);
        const RoundedQuery* four[QUERIES];
        for (int64_t j = 0; j < QUERIES; ++j) four[j] = &some[g + std::min(j, together - 1)];
        products(rounded, first, (whole + 31) / 32 * 32, four, sums.data());
        for (int64_t j = 0; j < together; ++j) {
          found[g + j].bound(&sums[j * TILE], whole);
          found[g + j].take(&sums[j * TILE], first, whole);
        }
      }
    }
    Room room;
    for (int64_t g = 0; g < end - begin; ++g)
      settle(queries + (begin + g) * dim, rows, dim, rounded.norm, found[g], room,
             scores + (begin + g) * sought, ids + (begin + g) * sought);
  });
  return 0;
}

// For each row [S] a bound from below of its largest product with any query, and in ``error`` [1]
// how far the product may lie above it. Returns as ``nearest`` does.
int largest_products(const float* queries, const float* rows, float* bounds, float* error,
                     int64_t groups, int64_t count, int64_t dim, int64_t threads) {
  if (!finite(queries, groups * dim) || !finite(rows, count * dim)) return 1;
  const RoundedRows rounded(rows, count, dim);
  if (RoundedQuery::limit(0, 1, dim, rounded) < 16) return 1;
  float scale = 1e30f, largest, norm, worst = 0;
  for (int64_t g = 0; g < groups; ++g) {
    measure(queries + g * dim, dim, largest, norm);
    scale = std::min(scale, RoundedQuery::limit(largest, norm, dim, rounded));
  }
  std::vector<RoundedQuery> all;
  for (int64_t g = 0; g < groups; ++g) {
    all.emplace_back(queries + g * dim, dim, rounded, scale);
    worst = std::max(worst, all.back().error);
  }
  *error = 2 * worst;
  divided(rounded.tiles, threads, [&](int64_t begin, int64_t end) {
    std::vector<int16_t> sums(QUERIES * TILE), best(TILE);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * TILE, whole = std::min(TILE, count - first);
      std::fill(best.begin(), best.end(), -32768);
      for (int64_t g = 0; g < groups; g += QUERIES) {
        const RoundedQuery* four[QUERIES];
        for (int64_t j = 0; j < QUERIES; ++j) four[j] = &all[std::min(g + j, groups - 1)];
        products(rounded, first, (whole + 31) / 32 * 32, four, sums.data());
        for (int64_t j = 0; j < QUERIES; ++j)
          for (int64_t r = 0; r < TILE; ++r) best[r] = std::max(best[r], sums[j * TILE + r]);
      }
      for (int64_t r = 0; r < whole; ++r)
        bounds[first + r] = (float)best[r] / (scale * rounded.scale) - worst;
    }
  });
  return 0;
}
}
