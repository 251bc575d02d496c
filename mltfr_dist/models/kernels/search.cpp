// The rows of largest product with each query, found by products of 8-bit numbers whose error is
// bounded; what the bound leaves open is computed in float64.
//
// G queries and S rows of D numbers, K rows sought.

#include "settled.h"

namespace {

constexpr int64_t BLOCKS = TILE / BLOCK;
constexpr int64_t ALIKE = 8;  // queries in a row of which the first gives the others a bound
constexpr int64_t MANY = 16;  // blocks of a tile that hold a candidate, where that bound is too low

// Bits for the first ``count`` blocks of a tile, and work(block) for each bit.
inline uint64_t all(int64_t count) { return ~uint64_t{0} >> (BLOCKS - count); }

template <typename Work>
inline void each(uint64_t blocks, const Work& work) {
  for (; blocks; blocks &= blocks - 1) work(__builtin_ctzll(blocks));
}

// The sums of a tile with one query, and which of them are above a limit.
struct Caught {
  int16_t sums[BLOCKS][BLOCK];
  uint32_t above[BLOCKS];  // a bit for each row of a block

  void put(int64_t block, const Sums& some, const Sums& limit) {
    some.put(sums[block]);
    above[block] = some.above(limit);
  }

  // A bit for each block that holds any.
  uint64_t held() const {
    uint64_t empty = 0;
    for (int64_t b = 0; b < BLOCKS; b += WIDTH) {
      const __m256i some = _mm256_loadu_si256((const __m256i*)(above + b));
      const __m256i zero = _mm256_cmpeq_epi32(some, _mm256_setzero_si256());
      empty |= (uint64_t)_mm256_movemask_ps(_mm256_castsi256_ps(zero)) << b;
    }
    return ~empty;
  }

  // Keeps of ``blocks``, of ``whole`` rows from ``first`` on, what is above the bound that they
  // themselves give.
  void under(Candidates& of, uint64_t blocks, int64_t first, int64_t whole) {
    each(blocks, [&](int64_t b) {
      of.group(Sums::read(sums[b]), first + b * BLOCK, whole - b * BLOCK);
    });
    of.bound();
    const Sums limit = Sums::of((int16_t)of.behind);
    each(blocks, [&](int64_t b) { above[b] = Sums::read(sums[b]).above(limit); });
  }
};

// A search for the best rows of some queries, neighbours of which are alike.
struct Search {
  const float *queries, *rows;
  int64_t count, dim, sought;
  const RoundedRows& rounded;
  float* scores;
  int64_t* ids;
  Room room{};
  Caught caught[QUERIES];

  // Where rows fill more than a tile, every ALIKE-th query first: what is best of it bounds what is
  // best of its neighbours, blocks of one history, and few rows reach such a bound.
  void run() {
    if (rounded.count <= TILE) return in_one_tile();
    scan([](int64_t g) { return g % ALIKE == 0; }, false);
    scan([](int64_t g) { return g % ALIKE != 0; }, true);
  }

  // The sums themselves give a bound.
  void in_one_tile() {
    Candidates of(sought);
    std::vector<RoundedQuery> some;
    for (int64_t g = 0; g < count; g += QUERIES) {
      const int64_t number = std::min(QUERIES, count - g);
      some.clear();
      for (int64_t j = 0; j < number; ++j)
        some.emplace_back(queries + (g + j) * dim, dim, rounded, 1e30f);
      const RoundedQuery* looked[QUERIES];
      for (int64_t j = 0; j < QUERIES; ++j) looked[j] = &some[std::min(j, number - 1)];
      keep_sums(looked, rounded.count);
      for (int64_t j = 0; j < number; ++j) {
        of.begin(window(some[j]));
        begin(of, caught[j], rounded.count);
        settle(g + j, some[j], of);
      }
    }
  }

  // Those with the first ``whole`` rows, a tile at most.
  void keep_sums(const RoundedQuery* const* looked, int64_t whole) {
    products(rounded, 0, whole, looked, [&](int64_t start, const Sums* sums) {
#pragma GCC unroll 8
      for (int64_t j = 0; j < QUERIES; ++j) sums[j].put(caught[j].sums[start / BLOCK]);
    });
  }

  // Takes of the first ``whole`` rows those above the bound that they themselves give.
  void begin(Candidates& of, Caught& c, int64_t whole) {
    const uint64_t blocks = all((whole + BLOCK - 1) / BLOCK);
    c.under(of, blocks, 0, whole);
    take(of, c, blocks, 0, whole);
  }

  // How much smaller the sum of a row may be than that of another whose product is smaller.
  int window(const RoundedQuery& query) const {
    const double of_sums = 2.0 * query.error * query.scale * rounded.scale;
    return (int)std::ceil(std::min(of_sums, 65536.0)) + 1;
  }

  void take(Candidates& of, const Caught& c, uint64_t blocks, int64_t first, int64_t whole) {
    each(blocks & c.held(), [&](int64_t b) {
      of.take(c.sums[b], c.above[b], first + b * BLOCK, whole - b * BLOCK);
    });
  }

  void settle(int64_t g, const RoundedQuery& query, Candidates& of) {
    ::settle(queries + g * dim, rows, dim, query.norm * rounded.norm, of, room,
             scores + g * sought, ids + g * sought);
  }

  // All queries share what is read of the rows, which leave the cache.
  template <typename Wanted>
  void scan(const Wanted& wanted, bool hinted) {
    std::vector<int64_t> members;
    for (int64_t g = 0; g < count; ++g)
      if (wanted(g)) members.push_back(g);
    const int64_t number = (int64_t)members.size();
    std::vector<RoundedQuery> some;
    std::vector<Candidates> candidates;
    some.reserve(number);
    candidates.reserve(number);
    for (int64_t m = 0; m < number; ++m) {
      some.emplace_back(queries + members[m] * dim, dim, rounded, 1e30f);
      candidates.emplace_back(sought, window(some[m]));
      const double scale = (double)some[m].scale * rounded.scale;
      if (hinted) candidates[m].bound((float)(least(members[m], some[m].norm) * scale));
    }
    for (int64_t first = 0, whole; first < rounded.count; first += whole) {
      const int64_t most = hinted ? TILE : std::min(TILE, std::max(FIRST, first));
      whole = std::min(rounded.count - first, most);
      for (int64_t m = 0; m < number; m += QUERIES)
        look(&some[m], &candidates[m], std::min(QUERIES, number - m), first, whole, hinted);
    }
    for (int64_t m = 0; m < number; ++m) settle(members[m], some[m], candidates[m]);
  }

  // A bound of the last product sought of query ``g``, by the rows that are best of the queries
  // before and after it that have been looked at: as many have products that large.
  float least(int64_t g, float norm) const {
    const float* query = queries + g * dim;
    float bound = -INFINITY;
    const int64_t last = std::min(g + ALIKE, count - 1);
    for (int64_t other = g / ALIKE * ALIKE; other <= last; other += ALIKE) {
      float smallest = INFINITY;
      for (int64_t k = 0; k < sought; ++k)
        smallest = std::min(
            smallest, quick_product(query, rows + ids[other * sought + k] * dim, dim));
      bound = std::max(bound, smallest);
    }
    return bound - slack(dim, norm * rounded.norm);
  }

  // Of up to QUERIES queries and ``whole`` rows from ``first`` on.
  void look(const RoundedQuery* some, Candidates* of, int64_t number, int64_t first, int64_t whole,
            bool hinted) {
    const RoundedQuery* looked[QUERIES];
    for (int64_t j = 0; j < QUERIES; ++j) looked[j] = some + std::min(j, number - 1);
    if (!hinted && !first) {
      keep_sums(looked, whole);
      for (int64_t j = 0; j < number; ++j) begin(of[j], caught[j], whole);
      return;
    }
    if (!hinted && (first & (first - 1)) == 0)  // as many rows again: a better bound
      for (int64_t j = 0; j < number; ++j) of[j].bound();
    Sums limits[QUERIES];
    for (int64_t j = 0; j < QUERIES; ++j)
      limits[j] = Sums::of((int16_t)of[std::min(j, number - 1)].behind);
    products(rounded, first, whole, looked, [&](int64_t start, const Sums* sums) {
      for (int64_t j = 0; j < number && !hinted; ++j)
        of[j].group(sums[j], first + start, whole - start);
#pragma GCC unroll 8
      for (int64_t j = 0; j < QUERIES; ++j) caught[j].put(start / BLOCK, sums[j], limits[j]);
    });
    for (int64_t j = 0; j < number; ++j) {
      Caught& c = caught[j];
      const uint64_t blocks = c.held() & all((whole + BLOCK - 1) / BLOCK);
      if (hinted && __builtin_popcountll(blocks) > MANY) c.under(of[j], blocks, first, whole);
      take(of[j], c, blocks, first, whole);
      if ((int64_t)of[j].values.size() > std::max(POOL, 8 * sought)) of[j].drop();
    }
  }
};

}  // namespace

extern "C" {

// The K <= S best of each query: scores and ids [G, K], best first, of equal scores the lower ids.
// Returns 0, or 1 where a number is not finite or too many to a sum, and nothing was found.
int nearest(const float* queries, const float* rows, float* scores, int64_t* ids, int64_t groups,
            int64_t count, int64_t dim, int64_t sought, int64_t threads) {
  const RoundedRows rounded(rows, count, dim, threads);
  if (!finite(queries, groups * dim) || !rounded.finite) return 1;
  if (RoundedQuery::limit(0, 1, dim, rounded) < 16) return 1;
  divided(groups, threads, [&](int64_t begin, int64_t end) {
    Search{queries + begin * dim, rows,    end - begin,          dim,
           sought,                rounded, scores + begin * sought, ids + begin * sought}
        .run();
  });
  return 0;
}

// For each row [S] a bound from below of its largest product with any query, and in ``error`` [1]
// how far the product may lie above it. Returns as ``nearest`` does.
int largest_products(const float* queries, const float* rows, float* bounds, float* error,
                     int64_t groups, int64_t count, int64_t dim, int64_t threads) {
  const RoundedRows rounded(rows, count, dim, threads);
  if (!finite(queries, groups * dim) || !rounded.finite) return 1;
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
    std::vector<int16_t> best(TILE);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * TILE, whole = std::min(TILE, count - first);
      std::fill(best.begin(), best.end(), -32768);
      for (int64_t g = 0; g < groups; g += QUERIES) {
        const RoundedQuery* some[QUERIES];
        for (int64_t j = 0; j < QUERIES; ++j) some[j] = &all[std::min(g + j, groups - 1)];
        products(rounded, first, whole, some, [&](int64_t start, const Sums* sums) {
          Sums top = Sums::read(&best[start]);
#pragma GCC unroll 8
          for (int64_t j = 0; j < QUERIES; ++j) top = top.larger(sums[j]);
          top.put(&best[start]);
        });
      }
      for (int64_t r = 0; r < whole; ++r)
        bounds[first + r] = (float)best[r] / (scale * rounded.scale) - worst;
    }
  });
  return 0;
}
}
