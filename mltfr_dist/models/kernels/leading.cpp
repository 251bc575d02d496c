// The items of highest score of each user.
//
// A user's candidates are all items whose score, as computed, may belong to one of the best; when
// they grow too many, those that fell behind go, and if that is not enough, exact scores decide.
// Users are divided over threads, so no result depends on their number.
//
// B users and I items of D numbers, K items sought.

#include "panels.h"

namespace {

constexpr int64_t SPARE = 64;  // candidates beyond the K best, at least, before any are dropped

struct Candidate {
  float score;  // as computed, or exact: near the true one either way
  int32_t index;
};

inline bool by_score(const Candidate& a, const Candidate& b) { return a.score > b.score; }
inline bool by_score_and_index(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.index < b.index);
}

// The largest number of fp32 below what is certainly no more than ``limit``.
inline float below(double limit) { return std::nextafter((float)limit, -INFINITY); }

// What may be among the best of one user; ``error`` bounds that of a computed score.
struct Leaders {
  const float *row, *vectors;
  int64_t sought, most;
  double error;
  float least = -INFINITY;  // what scores less is none of the best
  std::vector<Candidate> kept;

  Leaders(const float* row, const float* vectors, int64_t sought, double error)
      : row(row), vectors(vectors), sought(sought), most(sought + std::max(SPARE, sought)),
        error(error) {
    kept.reserve(most);
  }

  void take(float score, int64_t index, Exact& exact) {
    kept.push_back({score, (int32_t)index});
    if ((int64_t)kept.size() < most) return;
    drop();
    if ((int64_t)kept.size() > sought + (most - sought) / 2) settle(exact);
  }

  // The K of highest computed score truly score above the K-th less its error.
  void drop() {
    if ((int64_t)kept.size() <= sought) return;
    std::nth_element(kept.begin(), kept.begin() + sought - 1, kept.end(), by_score);
    least = std::max(least, below(kept[sought - 1].score - 2 * error));
    const auto behind = [this](const Candidate& c) { return c.score < least; };
    kept.erase(std::remove_if(kept.begin(), kept.end(), behind), kept.end());
  }

  // The best by their exact scores, in order; of equal ones the lower indices.
  void settle(Exact& exact) {
    for (Candidate& c : kept) c.score = exact(row, vectors + c.index * exact.dim);
    std::sort(kept.begin(), kept.end(), by_score_and_index);
    if ((int64_t)kept.size() < sought) return;
    kept.resize(sought);
    least = std::max(least, below(kept.back().score - error));
  }
};

// The items of ``panels``, the first of which stands at ``start``, for a block of users.
void look(const Panels& panels, int64_t start, int64_t user, int64_t first, int64_t end,
          std::vector<Leaders>& all, const LeftOut& left_out, Exact& exact) {
  const int64_t users = all.size(), some = std::min(USERS, users - user);
  const float* rows[USERS];
  Register least[USERS];
  for (int64_t u = 0; u < USERS; ++u) {
    const Leaders& one = all[std::min(user + u, users - 1)];
    rows[u] = one.row;
    least[u] = ON_REGISTERS(set1_ps)(one.least);
  }
  for (int64_t p = first; p < end; ++p) {
    const Scores scores = products(rows, panels[p], panels.dim);
    unsigned any = 0;
    for (int64_t u = 0; u < USERS; ++u) any |= lanes<_CMP_GE_OQ>(scores.of[u], least[u]);
    if (__builtin_expect(!any, 1)) continue;
    const Scores copy = scores.copy();
    for (int64_t u = 0; u < some; ++u) {
      float numbers[PANEL];
      store_panel(numbers, copy.of[u]);
      Leaders& one = all[user + u];
      each(lanes<_CMP_GE_OQ>(copy.of[u], least[u]), [&](int64_t lane) {
        const int64_t item = p * PANEL + lane;
        if (item < panels.count && numbers[lane] >= one.least &&
            !left_out.has(user + u, start + item))
          one.take(numbers[lane], start + item, exact);
      });
      least[u] = ON_REGISTERS(set1_ps)(one.least);
    }
  }
}

}  // namespace

extern "C" {

// The K best of each user: scores and indices [B, K], best first, of equal scores the lower
// indices; -inf and 0 where fewer are left.
//
// hidden [B, D], vectors [I, D], errors [B] bound those of computed scores; bounds [B + 1] and
// left_out: see LeftOut. ``together`` items are looked at by all users at a time.
void top_items(const float* hidden, const float* vectors, const double* errors,
               const int64_t* bounds, const int64_t* left_out, float* scores, int64_t* indices,
               int64_t users, int64_t items, int64_t dim, int64_t sought, int64_t together,
               int64_t threads) {
  std::vector<Leaders> all;
  for (int64_t u = 0; u < users; ++u)
    all.emplace_back(hidden + u * dim, vectors, sought, errors[u]);
  const LeftOut out{bounds, left_out};
  const int64_t cached = std::max<int64_t>(1, CACHED_NUMBERS / (PANEL * dim));
  const int64_t blocks = (users + USERS - 1) / USERS;
  Panels panels(std::min(together, items), dim);
  for (int64_t start = 0; start < items; start += together) {
    panels.fill(vectors + start * dim, std::min(together, items - start), threads);
    divided(blocks, threads, [&](int64_t begin, int64_t end) {
      Exact exact(dim);
      for (int64_t first = 0; first < panels.size(); first += cached)
        for (int64_t block = begin; block < end; ++block)
          look(panels, start, block * USERS, first, std::min(first + cached, panels.size()), all,
               out, exact);
    });
  }
  divided(users, threads, [&](int64_t begin, int64_t end) {
    Exact exact(dim);
    for (int64_t u = begin; u < end; ++u) {
      all[u].drop();
      all[u].settle(exact);
      const int64_t kept = all[u].kept.size();
      for (int64_t k = 0; k < sought; ++k) {
        scores[u * sought + k] = k < kept ? all[u].kept[k].score : -INFINITY;
        indices[u * sought + k] = k < kept ? all[u].kept[k].index : 0;
      }
    }
  });
}
}
