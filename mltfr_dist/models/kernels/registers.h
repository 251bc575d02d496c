// Blocks of numbers that are no whole registers, and transposed ones.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "common.h"

namespace {

// The first ``count`` of eight, as a mask.
inline __m256i first(int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), lanes);
}

inline Floats load_some(const float* from, int64_t count) {
  return (Floats)_mm256_maskload_ps(from, first(count));
}

// Sixteen numbers in two registers.
struct All {
  Floats left(const float* from) const { return load(from); }
  Floats right(const float* from) const { return load(from + WIDTH); }
  void put(float* to, Floats left, Floats right) const {
    store(to, left);
    store(to + WIDTH, right);
  }
};

// The first of them; zeros stand for the others, and are not stored.
struct Some {
  __m256i lower, upper;
  explicit Some(int64_t count) : lower(first(count)), upper(first(count - WIDTH)) {}
  Floats left(const float* from) const { return (Floats)_mm256_maskload_ps(from, lower); }
  Floats right(const float* from) const { return (Floats)_mm256_maskload_ps(from + WIDTH, upper); }
  void put(float* to, Floats left, Floats right) const {
    _mm256_maskstore_ps(to, lower, (__m256)left);
    _mm256_maskstore_ps(to + WIDTH, upper, (__m256)right);
  }
};

// Numbers are few: a call of memcpy would cost more than the copy.
inline void copy(float* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

inline void multiply(float* by, const float* factors, int64_t count) {
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) store(by + i, load(by + i) * load(factors + i));
  for (; i < count; ++i) by[i] *= factors[i];
}

inline void transpose_block(Floats (&rows)[WIDTH]) {
  __m256 pairs[WIDTH], fours[WIDTH];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = (Floats)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4] = (Floats)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

}  // namespace
