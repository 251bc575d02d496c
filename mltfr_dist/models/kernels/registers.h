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

template <typename V>
inline V get_some(const float* from, int64_t count);

template <>
inline Floats get_some<Floats>(const float* from, int64_t count) { return load_some(from, count); }

inline void put_some(float* to, Floats value, int64_t count) {
  _mm256_maskstore_ps(to, first(count), (__m256)value);
}

#ifdef __AVX512F__
template <>
inline Wide get_some<Wide>(const float* from, int64_t count) {
  return (Wide)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
}

inline void put_some(float* to, Wide value, int64_t count) {
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)value);
}
#endif

// Numbers that stand side by side, in R registers of which the last may be there in part: zeros
// stand for the others, and are not stored.
template <typename V, int R, bool WHOLE>
struct Columns {
  static constexpr int64_t REGISTERS = R;
  int64_t last;  // numbers of the last register

  V get(const float* from, int64_t r) const {
    from += r * size_of<V>();
    return WHOLE || r + 1 < R ? ::get<V>(from) : get_some<V>(from, last);
  }
  void put(float* to, int64_t r, V value) const {
    to += r * size_of<V>();
    WHOLE || r + 1 < R ? ::put(to, value) : put_some(to, value, last);
  }
};

// The columns of vectors of ``dim`` numbers, two registers at a time: work(first, Columns).
template <typename V, typename Work>
inline void in_columns(int64_t dim, const Work& work) {
  constexpr int64_t ONE = size_of<V>(), TWO = 2 * ONE;
  int64_t c = 0;
  for (; c + TWO <= dim; c += TWO) work(c, Columns<V, 2, true>{ONE});
  const int64_t left = dim - c;
  if (left > ONE) work(c, Columns<V, 2, false>{left - ONE});
  else if (left == ONE) work(c, Columns<V, 1, true>{ONE});
  else if (left) work(c, Columns<V, 1, false>{left});
}

inline float largest(Floats v) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

#ifdef __AVX512F__
inline float largest(Wide v) {
  const __m512d all = (__m512d)v;
  const Floats lower = (Floats)_mm512_castpd512_pd256(all);
  const Floats upper = (Floats)_mm512_extractf64x4_pd(all, 1);
  return largest(upper > lower ? upper : lower);
}
#endif

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

#ifdef __AVX512F__
inline void transpose_block(Wide (&rows)[WIDE]) {
  __m512 pairs[WIDE], fours[WIDE];
  for (int i = 0; i < WIDE; i += 2) {
    pairs[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
  }
  for (int i = 0; i < WIDE; i += 4) {  // a quarter of a register holds a column of four rows
    fours[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    fours[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 *a = &fours[i], *b = a + 4, *c = a + 8, *d = a + 12;
    const __m512 even = _mm512_shuffle_f32x4(*a, *b, 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(*a, *b, 0xDD);
    const __m512 more_even = _mm512_shuffle_f32x4(*c, *d, 0x88);
    const __m512 more_odd = _mm512_shuffle_f32x4(*c, *d, 0xDD);
    rows[i] = (Wide)_mm512_shuffle_f32x4(even, more_even, 0x88);
    rows[i + 4] = (Wide)_mm512_shuffle_f32x4(odd, more_odd, 0x88);
    rows[i + 8] = (Wide)_mm512_shuffle_f32x4(even, more_even, 0xDD);
    rows[i + 12] = (Wide)_mm512_shuffle_f32x4(odd, more_odd, 0xDD);
  }
}
#endif

}  // namespace
