// How many items score higher than each user's target, and how many the same.
//
// A score above ``high`` is certainly higher than the target's, one not above ``low`` lower; what
// lies between is computed again as it counts. Users are divided over threads, and counts are whole
// numbers, so no result depends on the number of threads.
//
// B users and T items of D numbers.

#include "panels.h"

namespace {

struct Ranking {
  const float *hidden, *vectors, *low, *high, *targets;
  LeftOut left_out;
  int64_t *better, *equal;
  int64_t users, start, dim;  // start: place of the first item
  const Panels& panels;

  // The panels from ``first`` up to ``end`` for six users, the last of whom may come again.
  void count(int64_t user, int64_t first, int64_t end, Exact& exact) const {
    const float* rows[USERS];
    __m256 least[USERS], most[USERS];
    __m256i counts[USERS];
    for (int64_t u = 0; u < USERS; ++u) {
      const int64_t one = std::min(user + u, users - 1);
      rows[u] = hidden + one * dim;
      least[u] = _mm256_set1_ps(low[one]);
      most[u] = _mm256_set1_ps(high[one]);
      counts[u] = _mm256_setzero_si256();
    }
    for (int64_t p = first; p < end; ++p) {
      const Scores scores = products(rows, panels[p], dim);
      __m256 open = _mm256_setzero_ps();
      for (int64_t u = 0; u < USERS; ++u)
        for (int64_t half = 0; half < 2; ++half) {
          const __m256 s = scores.of[u][half];
          const __m256 above = _mm256_cmp_ps(s, most[u], _CMP_GT_OQ);
          const __m256 may_be = _mm256_cmp_ps(s, least[u], _CMP_GT_OQ);
          counts[u] = _mm256_sub_epi32(counts[u], _mm256_castps_si256(above));
          open = _mm256_or_ps(open, _mm256_xor_ps(above, may_be));
        }
      if (__builtin_expect(_mm256_movemask_ps(open), 0)) {
        const Scores copy = scores.copy();
        for (int64_t u = 0; u < std::min(USERS, users - user); ++u)
          each(lanes<_CMP_GT_OQ>(copy.of[u], least[u]) ^ lanes<_CMP_GT_OQ>(copy.of[u], most[u]),
               [&](int64_t lane) { settle(user + u, p * PANEL + lane, exact); });
      }
    }
    for (int64_t u = 0; u < std::min(USERS, users - user); ++u) {
      int32_t parts[WIDTH];
      _mm256_storeu_si256((__m256i*)parts, counts[u]);
      for (const int32_t part : parts) better[user + u] += part;
    }
  }

  void settle(int64_t user, int64_t item, Exact& exact) const {
    if (item >= panels.count || left_out.has(user, start + item)) return;
    const float score = exact(hidden + user * dim, vectors + item * dim);
    better[user] += score > targets[user];
    equal[user] += score == targets[user];
  }

  // Take back what was counted and does not count: items left out, and zeros behind the last item.
  void take_back(int64_t user) const {
    const float* row = hidden + user * dim;
    better[user] -= (panels.size() * PANEL - panels.count) * (0.0f > high[user]);
    const int64_t *from = left_out.places + left_out.bounds[user],
                  *to = left_out.places + left_out.bounds[user + 1];
    from = std::lower_bound(from, to, start);
    to = std::lower_bound(from, to, start + panels.count);
    constexpr int64_t SOME = 8;  // at a time, for each number waits for the one before
    for (; from < to; from += SOME) {
      const int64_t some = std::min(SOME, (int64_t)(to - from));
      const float* items[SOME];
      for (int64_t i = 0; i < SOME; ++i)
        items[i] = vectors + (from[std::min(i, some - 1)] - start) * dim;
      float scores[SOME] = {};
      for (int64_t c = 0; c < dim; ++c)
        for (int64_t i = 0; i < SOME; ++i)
          scores[i] = __builtin_fmaf(row[c], items[i][c], scores[i]);
      for (int64_t i = 0; i < some; ++i) better[user] -= scores[i] > high[user];
    }
  }
};

}  // namespace

extern "C" {

// Adds to better and equal [B] what T items count, the first of which stands at place ``start``.
//
// hidden [B, D], vectors [T, D], low, high and targets [B]; bounds [B + 1] and places: see LeftOut.
void count_better(const float* hidden, const float* vectors, const float* low, const float* high,
                  const float* targets, const int64_t* bounds, const int64_t* places,
                  int64_t* better, int64_t* equal, int64_t users, int64_t items, int64_t dim,
                  int64_t start, int64_t threads) {
  Panels panels(items, dim);
  panels.fill(vectors, items, threads);
  const Ranking ranking{hidden, vectors, low,   high,  targets, {bounds, places},
                        better, equal,   users, start, dim,     panels};
  const int64_t cached = std::max<int64_t>(1, CACHED_NUMBERS / (PANEL * dim));
  divided((users + USERS - 1) / USERS, threads, [&](int64_t begin, int64_t end) {
    Exact exact(dim);
    for (int64_t first = 0; first < panels.size(); first += cached)
      for (int64_t block = begin; block < end; ++block)
        ranking.count(block * USERS, first, std::min(first + cached, panels.size()), exact);
    for (int64_t user = begin * USERS; user < std::min(end * USERS, users); ++user)
      ranking.take_back(user);
  });
}
}
