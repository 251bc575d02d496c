// The best of one query's candidates, in the order that counts: the product in float64, rounded
// once, largest first; of equal ones the lower ids.
#pragma once

#include "candidates.h"

namespace {

constexpr int64_t FEW = 4;  // candidates for each row sought, of which none is dropped unseen

// The product in float64, rounded once.
float exact_product(const float* a, const float* b, int64_t dim) {
  __m256d even = _mm256_setzero_pd(), odd = even;
  int64_t c = 0;
  for (; c + 8 <= dim; c += 8) {
    const __m256d x = _mm256_cvtps_pd(_mm_loadu_ps(a + c));
    const __m256d y = _mm256_cvtps_pd(_mm_loadu_ps(b + c));
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

// How far a quick product may lie off another way of computing it.
inline float slack(int64_t dim, float norms) { return 2.0f * (float)(dim + 16) * 6e-8f * norms; }

// What orders candidates: the product, largest first, then the id.
int64_t ordered_key(float product, int32_t id) {
  const float size = -product + 0.0f;  // no negative zero
  int32_t bits;
  std::memcpy(&bits, &size, sizeof bits);
  return (int64_t)(bits ^ (bits >> 31 & 0x7fffffff)) << 32 | (uint32_t)id;
}

float product_of(int64_t key) {
  const int32_t ordered = (int32_t)(key >> 32), bits = ordered ^ (ordered >> 31 & 0x7fffffff);
  float size;
  std::memcpy(&size, &bits, sizeof size);
  return -size;
}

// Room for the candidates of one query, used again for the next.
struct Room {
  std::vector<float> quick;
  std::vector<int16_t> rounded;
  std::vector<int64_t> keys, ordered;
};

// Ascending. Few are counted, for what a comparison says cannot be foreseen.
void order(Room& room) {
  const auto& keys = room.keys;
  room.ordered = keys;
  if (keys.size() > 64) return std::sort(room.ordered.begin(), room.ordered.end());
  for (const int64_t one : keys) {
    int64_t smaller = 0;
    for (const int64_t other : keys) smaller += other < one;
    room.ordered[smaller] = one;
  }
}

// The best of one query's candidates, by fp32 products first: those whose error cannot matter.
// ``norms``: the product of the query's and of the largest row's.
void settle(const float* query, const float* rows, int64_t dim, float norms, Candidates& of,
            Room& room, float* scores, int64_t* ids) {
  if ((int64_t)of.ids.size() > FEW * of.sought) of.drop();
  for (const int32_t id : of.ids) __builtin_prefetch(rows + id * dim);
  const size_t count = of.ids.size();
  const float scale = 32000.0f / std::max(norms, 1e-30f);
  room.quick.resize(count);
  room.rounded.resize(count);
  for (size_t i = 0; i < count; ++i)
    room.quick[i] = quick_product(query, rows + of.ids[i] * dim, dim);
  for (size_t i = 0; i < count; ++i) room.rounded[i] = (int16_t)std::floor(room.quick[i] * scale);
  const float least =
      (float)kth_largest(room.rounded, of.sought) / scale - slack(dim, norms);
  room.keys.clear();
  for (size_t i = 0; i < count; ++i)
    if (room.quick[i] >= least)
      room.keys.push_back(
          ordered_key(exact_product(query, rows + of.ids[i] * dim, dim), of.ids[i]));
  order(room);
  for (int64_t k = 0; k < of.sought; ++k) {
    scores[k] = product_of(room.ordered[k]);
    ids[k] = (int32_t)(uint32_t)room.ordered[k];
  }
}

}  // namespace
