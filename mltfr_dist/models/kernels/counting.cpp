// How many items score higher than each user's target, and how many the same; on the way, the sum
// of the exponentials of all scores.
//
// A score above ``high`` is certainly higher than the target's, one not above ``low`` lower; what
// lies between is computed again as it counts. Users are divided over threads, and counts are whole
// numbers, so no result depends on the number of threads.
//
// B users and T items of D numbers.

#include "panels.h"

namespace {

constexpr float ABOVE = 40;  // by how much a score may be above what exponentials are shifted by

// Sums of exp(score - shift) of a block of users over some panels. The shift is near the largest
// score, or was when none was above it; sums are in fp32 for a few panels and then in float64.
class Exponentials {
 public:
  // Per user, so far: shifts (-inf before the first score), and sums.
  Exponentials(double* shifts, double* sums, int64_t some)
      : shifts(shifts), sums(sums), some(some) {
    for (int64_t u = 0; u < USERS; ++u) {
      shift[u] = ON_REGISTERS(set1_ps)((float)shifts[std::min(u, some - 1)]);
      limit[u] = ON_REGISTERS(set1_ps)((float)shifts[std::min(u, some - 1)] + ABOVE);
      of_lanes[u] = ON_REGISTERS(setzero_ps)();
    }
  }

  // Add the scores of a panel, all of whose items there are.
  inline __attribute__((always_inline)) void add(const Scores& scores) {
    unsigned far = 0;
    for (int64_t u = 0; u < USERS; ++u) far |= lanes<_CMP_GT_OQ>(scores.of[u], limit[u]);
    if (__builtin_expect(far, 0)) move(scores.copy());
    for (int64_t u = 0; u < USERS; ++u)
      for (int64_t half = 0; half < 2; ++half)
        of_lanes[u] = ON_REGISTERS(add_ps)(
            of_lanes[u], power(ON_REGISTERS(sub_ps)(scores.of[u][half], shift[u])));
  }

  // Add the first ``count`` scores of a panel.
  void add(const Scores& scores, int64_t count) {
    for (int64_t u = 0; u < some; ++u) {
      float numbers[PANEL];
      store_panel(numbers, scores.of[u]);
      const float largest = *std::max_element(numbers, numbers + count);
      if (largest > shifts[u] + ABOVE) move(u, largest);
      for (int64_t i = 0; i < count; ++i) sums[u] += std::exp(numbers[i] - shifts[u]);
    }
  }

  // Bring what the registers hold into the sums.
  void flush() {
    for (int64_t u = 0; u < some; ++u) flush(u);
  }

 private:
  double *shifts, *sums;
  int64_t some;
  Register shift[USERS], limit[USERS], of_lanes[USERS];

  void flush(int64_t u) {
    float numbers[LANES];
    ON_REGISTERS(storeu_ps)(numbers, of_lanes[u]);
    for (const float number : numbers) sums[u] += number;
    of_lanes[u] = ON_REGISTERS(setzero_ps)();
  }

  __attribute__((noinline)) void move(const Scores& scores) {
    for (int64_t u = 0; u < USERS; ++u) {
      if (!lanes<_CMP_GT_OQ>(scores.of[u], limit[u])) continue;
      float numbers[PANEL];
      store_panel(numbers, scores.of[u]);
      const float largest = *std::max_element(numbers, numbers + PANEL);
      if (u < some) move(u, largest);
      shift[u] = ON_REGISTERS(set1_ps)(largest);
      limit[u] = ON_REGISTERS(set1_ps)(largest + ABOVE);
    }
  }

  void move(int64_t u, float largest) {
    flush(u);
    sums[u] *= std::exp(shifts[u] - largest);  // of none so far: exp(-inf)
    shifts[u] = largest;
  }

  // e^x for x of at most ABOVE, to a few units in the last place; below -87 as for -87.
  static inline __attribute__((always_inline)) Register power(Register x) {
    const auto all = [](float value) { return ON_REGISTERS(set1_ps)(value); };
    x = ON_REGISTERS(max_ps)(x, all(-87.0f));
    const auto twos = ON_REGISTERS(cvtps_epi32)(ON_REGISTERS(mul_ps)(x, all(1.44269504f)));
    const Register whole = ON_REGISTERS(cvtepi32_ps)(twos);
    x = ON_REGISTERS(fnmadd_ps)(whole, all(0.693359375f), x);  // ln 2 in two parts
    x = ON_REGISTERS(fnmadd_ps)(whole, all(-2.12194440e-4f), x);
    Register y = all(1.9875691500e-4f);  // Cephes' expf
    const auto then = [&](float next) { y = ON_REGISTERS(fmadd_ps)(y, x, all(next)); };
    then(1.3981999507e-3f);
    then(8.3334519073e-3f);
    then(4.1665795894e-2f);
    then(1.6666665459e-1f);
    then(5.0000001201e-1f);
    y = ON_REGISTERS(fmadd_ps)(ON_REGISTERS(mul_ps)(x, x), y, ON_REGISTERS(add_ps)(x, all(1)));
    return scaled(y, twos);
  }

  // y 2^n, by the bits of the exponent.
  template <typename Integers>
  static inline __attribute__((always_inline)) Register scaled(Register y, Integers n) {
    const Integers exponent = ON_REGISTERS(slli_epi32)(n, 23);
    return (Register)ON_REGISTERS(add_epi32)((Integers)y, exponent);
  }
};

struct Ranking {
  const float *hidden, *vectors, *low, *high, *targets;
  LeftOut left_out;
  int64_t *better, *equal;
  double *shifts, *sums;      // of exponentials, or null
  int64_t users, start, dim;  // start: index of the first item
  const Panels& panels;

  // The panels from ``first`` up to ``end`` for a block of users, the last of whom may come again.
  void count(int64_t user, int64_t first, int64_t end, Exact& exact) const {
    if (!shifts) return count(user, first, end, exact, nullptr);
    Exponentials exponentials(shifts + user, sums + user, std::min(USERS, users - user));
    count(user, first, end, exact, &exponentials);
    exponentials.flush();
  }

  void count(int64_t user, int64_t first, int64_t end, Exact& exact, Exponentials* all) const {
    const float* rows[USERS];
    Register least[USERS], most[USERS];
    int64_t counts[USERS] = {};
    for (int64_t u = 0; u < USERS; ++u) {
      const int64_t one = std::min(user + u, users - 1);
      rows[u] = hidden + one * dim;
      least[u] = ON_REGISTERS(set1_ps)(low[one]);
      most[u] = ON_REGISTERS(set1_ps)(high[one]);
    }
    for (int64_t p = first; p < end; ++p) {
      const Scores scores = products(rows, panels[p], dim);
      if (all) {
        if (__builtin_expect((p + 1) * PANEL <= panels.count, 1)) all->add(scores);
        else all->add(scores.copy(), panels.count - p * PANEL);
      }
      unsigned open = 0;
      for (int64_t u = 0; u < USERS; ++u) {
        const unsigned above = lanes<_CMP_GT_OQ>(scores.of[u], most[u]);
        counts[u] += __builtin_popcount(above);
        open |= above ^ lanes<_CMP_GT_OQ>(scores.of[u], least[u]);
      }
      if (__builtin_expect(open, 0)) {
        const Scores copy = scores.copy();
        for (int64_t u = 0; u < std::min(USERS, users - user); ++u)
          each(lanes<_CMP_GT_OQ>(copy.of[u], least[u]) ^ lanes<_CMP_GT_OQ>(copy.of[u], most[u]),
               [&](int64_t lane) { settle(user + u, p * PANEL + lane, exact); });
      }
    }
    for (int64_t u = 0; u < std::min(USERS, users - user); ++u) better[user + u] += counts[u];
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
    const int64_t *from = left_out.indices + left_out.bounds[user],
                  *to = left_out.indices + left_out.bounds[user + 1];
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

// Adds to better and equal [B] what T items count, the first of which stands at index ``start``;
// and, unless these are null, exponentials of all their scores less the shifts [B] to sums [B].
//
// hidden [B, D], vectors [T, D], low, high, targets [B]; bounds [B + 1] and indices: see LeftOut.
void count_better(const float* hidden, const float* vectors, const float* low, const float* high,
                  const float* targets, const int64_t* bounds, const int64_t* indices,
                  int64_t* better, int64_t* equal, double* shifts, double* sums, int64_t users,
                  int64_t items, int64_t dim, int64_t start, int64_t threads) {
  Panels panels(items, dim);
  panels.fill(vectors, items, threads);
  const Ranking ranking{hidden, vectors, low,  high,  targets, {bounds, indices}, better,
                        equal,  shifts,  sums, users, start,   dim,              panels};
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
