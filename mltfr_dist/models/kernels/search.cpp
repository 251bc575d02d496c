// The rows of largest product with each query, found by products of 8-bit numbers whose error is
// bounded; what the bound leaves open is computed in float64.
//
// G queries and S rows of D numbers, K rows sought.

#include "settled.h"

namespace {

constexpr int64_t ALIKE = 8;  // queries in a row of which the first gives the others a bound
constexpr int64_t MANY = 16;  // blocks of a tile that hold a candidate, where that bound is too low

// The blocks of a tile that hold rows above a limit. All are written and those without overwritten,
// for a branch that depends on sums cannot be foreseen.
struct Caught {
  int16_t sums[TILE / BLOCK + 1][BLOCK];
  uint32_t above[TILE / BLOCK + 1];
  int32_t starts[TILE / BLOCK + 1];
  // Whether the block from row ``start`` of the tile on has any.
  bool put(int64_t block, int64_t start, const Sums& some, const Sums& limit) {
    some.put(sums[block]);
    above[block] = some.above(limit);
    starts[block] = (int32_t)start;
    return above[block] != 0;
  }

  // Those of ``count`` blocks, of ``whole`` rows from ``first`` on, that still hold some above the
  // bound that the blocks themselves give.
  int64_t under(Candidates& of, int64_t count, int64_t first, int64_t whole) {
    for (int64_t b = 0; b < count; ++b)
      of.group(Sums::read(sums[b]), first + starts[b], whole - starts[b]);
    of.bound();
    const Sums limit = Sums::of((int16_t)of.behind);
    int64_t kept = 0;
    for (int64_t b = 0; b < count; ++b)
      kept += put(kept, starts[b], Sums::read(sums[b]), limit);
    return kept;
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

  // Every ALIKE-th query first: what is best of it bounds what is best of its neighbours, blocks of
  // one history, and few rows reach such a bound.
  void run() {
    scan([](int64_t g) { return g % ALIKE == 0; }, false);
    scan([](int64_t g) { return g % ALIKE != 0; }, true);
  }

  // As many queries at once as share what is read of the rows: all where these leave the cache.
  template <typename Wanted>
  void scan(const Wanted& wanted, bool hinted) {
    std::vector<int64_t> members;
    for (int64_t g = 0; g < count; ++g)
      if (wanted(g)) members.push_back(g);
    const size_t at_once = rounded.count <= TILE ? QUERIES : members.size();
    for (size_t m = 0; m < members.size(); m += at_once)
      scan(&members[m], (int64_t)std::min(at_once, members.size() - m), hinted);
  }

  void scan(const int64_t* members, int64_t number, bool hinted) {
    std::vector<RoundedQuery> some;
    std::vector<Candidates> candidates;
    some.reserve(number);
    candidates.reserve(number);
    for (int64_t m = 0; m < number; ++m) {
      some.emplace_back(queries + members[m] * dim, dim, rounded, 1e30f);
      const double scale = (double)some[m].scale * rounded.scale;
      const double window = std::min(2.0 * some[m].error * scale, 65536.0);
      candidates.emplace_back(sought, (int)std::ceil(window) + 1);
      if (hinted) candidates[m].bound((float)(least(members[m]) * scale));
    }
    for (int64_t first = 0, whole; first < rounded.count; first += whole) {
      const int64_t most = hinted ? TILE : std::min(TILE, std::max(FIRST, first));
      whole = std::min(rounded.count - first, most);
      for (int64_t m = 0; m < number; m += QUERIES)
        look(&some[m], &candidates[m], std::min(QUERIES, number - m), first, whole, hinted);
    }
    for (int64_t m = 0; m < number; ++m) {
      const int64_t g = members[m];
      settle(queries + g * dim, rows, dim, rounded.norm, candidates[m], room, scores + g * sought,
             ids + g * sought);
    }
  }

  // A bound of the last product sought of query ``g``, by the rows that are best of the queries
  // before and after it that have been looked at: as many have products that large.
  float least(int64_t g) const {
    const float* query = queries + g * dim;
    float bound = -INFINITY, largest, norm;
    measure(query, dim, largest, norm);
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
    if (!hinted && !first) return begin(looked, of, number, whole);
    if (!hinted && (first & (first - 1)) == 0)  // as many rows again: a better bound
      for (int64_t j = 0; j < number; ++j) of[j].bound();
    Sums limits[QUERIES];
    for (int64_t j = 0; j < QUERIES; ++j)
      limits[j] = Sums::of((int16_t)of[std::min(j, number - 1)].behind);
    int64_t blocks[QUERIES] = {};
    products(rounded, first, whole, looked, [&](int64_t start, const Sums* sums) {
      for (int64_t j = 0; j < number && !hinted; ++j)
        of[j].group(sums[j], first + start, whole - start);
#pragma GCC unroll 8
      for (int64_t j = 0; j < QUERIES; ++j)
        blocks[j] += caught[j].put(blocks[j], start, sums[j], limits[j]);
    });
    for (int64_t j = 0; j < number; ++j) {
      Caught& c = caught[j];
      if (hinted && blocks[j] > MANY) blocks[j] = c.under(of[j], blocks[j], first, whole);
      for (int64_t b = 0; b < blocks[j]; ++b)
        of[j].take(c.sums[b], c.above[b], first + c.starts[b], whole - c.starts[b]);
      if ((int64_t)of[j].values.size() > std::max(POOL, 8 * sought)) of[j].drop();
    }
  }

  // The first rows, kept until they have given a bound.
  void begin(const RoundedQuery* const* looked, Candidates* of, int64_t number, int64_t whole) {
    int16_t kept[QUERIES][FIRST];
    products(rounded, 0, whole, looked, [&](int64_t start, const Sums* sums) {
      for (int64_t j = 0; j < number; ++j) {
        of[j].group(sums[j], start, whole - start);
        sums[j].put(&kept[j][start]);
      }
    });
    for (int64_t j = 0; j < number; ++j) {
      of[j].bound();
      const Sums limit = Sums::of((int16_t)of[j].behind);
      for (int64_t start = 0; start < whole; start += BLOCK) {
        const int16_t* sums = &kept[j][start];
        of[j].take(sums, Sums::read(sums).above(limit), start, whole - start);
      }
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
