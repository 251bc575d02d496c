// Products of 8-bit numbers with a bound of their error.
//
// A query is rounded to whole numbers of at most 64, a row to such of at most 127, so that a sum of
// products stays below 2^15 (by Cauchy and Schwarz) and sixteen of them fit a register. For rounded
// q' and r' it holds |q r - q' r'| <= |q - q'| |r| + |q'| |r - r'|. With AVX512-VNNI four products
// are added up at once, with AVX2 two; the sums are the same.
#pragma once

#include <cmath>
#include <mutex>

#include "registers.h"

namespace {

constexpr int64_t LANES = 16;    // rows in a register
constexpr int64_t BLOCK = 2 * LANES;  // rows whose sums are looked at together
constexpr int64_t TILE = 2048;   // rows looked at together: 128 KiB where D = 64
#ifdef __AVX512VNNI__
constexpr int64_t QUERIES = 8, PART = 4;  // queries looked at, numbers of a row added up, together
#else
constexpr int64_t QUERIES = 4, PART = 2;
#endif
constexpr int64_t POOL = 512;    // candidates of a query, before those that fell behind are dropped
constexpr int64_t RESERVED = 128;  // candidates that a query has room for from the start
constexpr float LARGEST_QUERY = 64, LARGEST_ROW = 127, ROW_NORM = 200, LARGEST_SUM = 32767;

inline void add_squares(__m256d& total, Floats v) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
  const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
  total = _mm256_fmadd_pd(high, high, _mm256_fmadd_pd(low, low, total));
}

inline double total_of(__m256d v) { return (v[0] + v[2]) + (v[1] + v[3]); }

// Eight numbers of a vector from ``c`` on; zeros behind its end.
inline Floats eight(const float* v, int64_t c, int64_t dim) {
  return c + WIDTH <= dim ? load(v + c) : load_some(v + c, dim - c);
}

// Largest absolute number and norm of a vector.
void measure(const float* v, int64_t dim, float& largest, float& norm) {
  __m256d squares = _mm256_setzero_pd();
  Floats top{};
  for (int64_t c = 0; c < dim; c += WIDTH) {
    const Floats some = eight(v, c, dim), size = some < 0 ? -some : some;
    top = size > top ? size : top;
    add_squares(squares, some);
  }
  largest = top[0];
  for (int64_t i = 1; i < WIDTH; ++i) largest = std::max(largest, top[i]);
  norm = (float)std::sqrt(total_of(squares));
}

// Eight numbers times ``scale``, rounded to whole ones; what that changes adds to ``squares``.
inline __m256i whole_numbers(Floats v, float scale, __m256d& squares) {
  const Floats exact = v * scale;
  const __m256i whole = _mm256_cvtps_epi32((__m256)exact);
  add_squares(squares, exact - (Floats)_mm256_cvtepi32_ps(whole));
  return whole;
}

// Eight of them as bytes, which hold them; ``shift`` is added first.
inline uint64_t bytes_of(__m256i whole, int shift) {
  const __m256i moved = _mm256_add_epi32(whole, _mm256_set1_epi32(shift));
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(moved), _mm256_extracti128_si256(moved, 1));
  const __m128i bytes = shift ? _mm_packus_epi16(halves, halves) : _mm_packs_epi16(halves, halves);
  return (uint64_t)_mm_cvtsi128_si64(bytes);
}

// Sums of a query with the rows of a block, in the rows' order.
#ifdef __AVX512VNNI__
struct Sums {
  __m512i all;

  static Sums of(int16_t number) { return {_mm512_set1_epi16(number)}; }
  static Sums read(const int16_t* from) { return {_mm512_loadu_si512(from)}; }
  void put(int16_t* to) const { _mm512_storeu_si512(to, all); }
  Sums larger(const Sums& other) const { return {_mm512_max_epi16(all, other.all)}; }
  // A bit for each that is larger than that of ``other``.
  uint32_t above(const Sums& other) const { return _mm512_cmpgt_epi16_mask(all, other.all); }
};

// Where a row of a block stands: two registers of sums, packed, are in the rows' order.
inline int64_t standing(int64_t row) { return row / 4 % 2 * LANES + row / 8 * 4 + row % 4; }
#else
struct Sums {
  __m256i lower, upper;

  static Sums of(int16_t number) {
    return {_mm256_set1_epi16(number), _mm256_set1_epi16(number)};
  }
  static Sums read(const int16_t* from) {
    return {_mm256_loadu_si256((const __m256i*)from),
            _mm256_loadu_si256((const __m256i*)(from + LANES))};
  }
  void put(int16_t* to) const {
    _mm256_storeu_si256((__m256i*)to, lower);
    _mm256_storeu_si256((__m256i*)(to + LANES), upper);
  }
  Sums larger(const Sums& other) const {
    return {_mm256_max_epi16(lower, other.lower), _mm256_max_epi16(upper, other.upper)};
  }
  // A bit for each that is larger than that of ``other``.
  uint32_t above(const Sums& other) const {
    const __m256i bytes = _mm256_packs_epi16(_mm256_cmpgt_epi16(lower, other.lower),
                                             _mm256_cmpgt_epi16(upper, other.upper));
    return (uint32_t)_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xD8));
  }
};

inline int64_t standing(int64_t row) { return row; }
#endif

struct RoundedRows {
  int64_t count, parts, tiles;
  float scale = 1, norm = 0, error = 0;
  bool finite = true;          // whether all numbers are; nothing is rounded where not
  std::vector<uint8_t> bytes;  // [blocks, parts, LANES, PART], plus 128

  RoundedRows(const float* rows, int64_t count, int64_t dim, int64_t threads)
      : count(count), parts((dim + PART - 1) / PART), tiles((count + TILE - 1) / TILE) {
    std::mutex alone;
    float top = 0;
    divided(count, threads, [&](int64_t begin, int64_t end) {
      float most = 0, longest = 0, largest, size;
      bool all = true;
      for (int64_t r = begin; r < end; ++r) {
        measure(rows + r * dim, dim, largest, size);
        most = std::max(most, largest);
        longest = std::max(longest, size);
        all &= size < INFINITY;
      }
      const std::lock_guard<std::mutex> guard(alone);
      top = std::max(top, most);
      norm = std::max(norm, longest);
      finite &= all;
    });
    if (!finite) return;
    scale = std::min(LARGEST_ROW / std::max(top, 1e-30f), ROW_NORM / std::max(norm, 1e-30f));
    bytes.assign((count + BLOCK - 1) / BLOCK * BLOCK * parts * PART, 128);
    double worst = 0;
    divided(count, threads, [&](int64_t begin, int64_t end) {
      double largest = 0;
      for (int64_t r = begin; r < end; ++r) largest = std::max(largest, round(rows, r, dim));
      const std::lock_guard<std::mutex> guard(alone);
      worst = std::max(worst, largest);
    });
    error = (float)std::sqrt(worst) / scale;
  }

 private:
  // Row ``r`` in bytes; returns the sum of squares that this changes.
  double round(const float* rows, int64_t r, int64_t dim) {
    const int64_t row = r / BLOCK * BLOCK + standing(r % BLOCK);
    uint8_t* to = &bytes[(row / LANES * parts * LANES + row % LANES) * PART];
    __m256d squares = _mm256_setzero_pd();
    for (int64_t c = 0; c < dim; c += WIDTH) {
      const __m256i whole = whole_numbers(eight(rows + r * dim, c, dim), scale, squares);
      const uint64_t some = bytes_of(whole, 128);
      for (int64_t p = 0; p < std::min(WIDTH / PART, parts - c / PART); ++p) {
        const uint64_t part = some >> 8 * PART * p;
        std::memcpy(to + (c / PART + p) * LANES * PART, &part, PART);
      }
    }
    return total_of(squares);
  }
};

struct RoundedQuery {
  float scale, error, norm;      // error: of the product with any row
  int32_t shift;                 // what 128 added to each row's numbers adds to the sum
  std::vector<int32_t> parts;    // PART numbers, as often as they fit

  RoundedQuery(const float* query, int64_t dim, const RoundedRows& rows, float at_most)
      : parts(rows.parts) {
    float largest;
    measure(query, dim, largest, norm);
    scale = std::min(at_most, RoundedQuery::limit(largest, norm, dim, rows));
    __m256d squares = _mm256_setzero_pd();
    __m256i total = _mm256_setzero_si256();
    for (int64_t c = 0; c < dim; c += WIDTH) {
      const __m256i whole = whole_numbers(eight(query, c, dim), scale, squares);
      total = _mm256_add_epi32(total, whole);
      const uint64_t bytes = bytes_of(whole, 0);
      for (int64_t p = 0; p < std::min(WIDTH / PART, rows.parts - c / PART); ++p) {
        const uint32_t part = (uint32_t)(bytes >> 8 * PART * p);
        parts[c / PART + p] = (int32_t)(PART == 4 ? part : (part & 0xffff) | part << 16);
      }
    }
    int added = 0, sums[WIDTH];
    std::memcpy(sums, &total, sizeof sums);
    for (const int sum : sums) added += sum;
    shift = 128 * added;
    const float own = (float)std::sqrt(total_of(squares)) / scale;
    // The last term covers the roundings of this arithmetic itself.
    error = own * rows.norm + (norm + own) * rows.error + 1e-5f * norm * rows.norm;
  }

  static float limit(float largest, float norm, int64_t dim, const RoundedRows& rows) {
    const float slack = 0.5f * std::sqrt((float)dim) + 1;
    const float room = LARGEST_SUM / (rows.norm * rows.scale + slack) - slack;
    return std::min(LARGEST_QUERY / std::max(largest, 1e-30f), room / std::max(norm, 1e-30f));
  }
};

// Sums of some queries with the block that begins at row ``first``.
#ifdef __AVX512VNNI__
// As ``_mm512_dpbusd_epi32``, around which compilers copy each sum.
inline __m512i plus_products(__m512i sum, __m512i bytes, __m512i part) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(part));
  return sum;
}

inline void add_up(const RoundedRows& rows, int64_t first, const RoundedQuery* const* queries,
                   Sums (&sums)[QUERIES]) {
  const uint8_t* block = &rows.bytes[first * rows.parts * PART];
  const uint8_t* next = block + rows.parts * LANES * PART;
  const int32_t* parts[QUERIES];
  __m512i lower[QUERIES], upper[QUERIES];
#pragma GCC unroll 8
  for (int64_t j = 0; j < QUERIES; ++j) {
    parts[j] = queries[j]->parts.data();
    lower[j] = upper[j] = _mm512_set1_epi32(-queries[j]->shift);
  }
  for (int64_t p = 0; p < rows.parts; ++p) {
    const __m512i left = _mm512_loadu_si512(block + p * 64);
    const __m512i right = _mm512_loadu_si512(next + p * 64);
#pragma GCC unroll 8
    for (int64_t j = 0; j < QUERIES; ++j) {
      const __m512i part = _mm512_set1_epi32(parts[j][p]);
      lower[j] = plus_products(lower[j], left, part);
      upper[j] = plus_products(upper[j], right, part);
    }
  }
#pragma GCC unroll 8
  for (int64_t j = 0; j < QUERIES; ++j) sums[j] = {_mm512_packs_epi32(lower[j], upper[j])};
}
#else
inline void add_up(const RoundedRows& rows, int64_t first, const RoundedQuery* const* queries,
                   Sums (&sums)[QUERIES]) {
  const uint8_t* block = &rows.bytes[first * rows.parts * PART];
  const uint8_t* next = block + rows.parts * LANES * PART;
#pragma GCC unroll 4
  for (int64_t j = 0; j < QUERIES; ++j) sums[j] = Sums::of((int16_t)-queries[j]->shift);
  for (int64_t p = 0; p < rows.parts; ++p) {
    const __m256i left = _mm256_loadu_si256((const __m256i*)(block + p * 32));
    const __m256i right = _mm256_loadu_si256((const __m256i*)(next + p * 32));
#pragma GCC unroll 4
    for (int64_t j = 0; j < QUERIES; ++j) {
      const __m256i part = _mm256_set1_epi32(queries[j]->parts[p]);
      sums[j].lower = _mm256_add_epi16(sums[j].lower, _mm256_maddubs_epi16(left, part));
      sums[j].upper = _mm256_add_epi16(sums[j].upper, _mm256_maddubs_epi16(right, part));
    }
  }
}
#endif

// The sums of some queries with ``some`` rows from ``first`` on, where a block begins; they go to
// see(start, sums), block by block, and those behind the last row are zero.
template <typename See>
inline void products(const RoundedRows& rows, int64_t first, int64_t some,
                     const RoundedQuery* const* queries, const See& see) {
  for (int64_t start = 0; start < some; start += BLOCK) {
    Sums sums[QUERIES];
    add_up(rows, first + start, queries, sums);
    see(start, sums);
  }
}

}  // namespace
