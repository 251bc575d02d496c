// Products of 8-bit numbers with a bound of their error.
//
// A query is rounded to whole numbers of at most 64, a row to such of at most 127, so that a sum of
// products stays below 2^15 (by Cauchy and Schwarz) and sixteen of them fit a register. For rounded
// q' and r' it holds |q r - q' r'| <= |q - q'| |r| + |q'| |r - r'|.
#pragma once

#include <immintrin.h>

#include <cmath>

#include "common.h"

namespace {

constexpr int64_t LANES = 16;    // rows in a register
constexpr int64_t TILE = 2048;   // rows looked at together: 128 KiB where D = 64
constexpr int64_t QUERIES = 4;   // queries looked at together
constexpr int64_t POOL = 512;    // candidates of a query, before those that fell behind are dropped
constexpr float LARGEST_QUERY = 64, LARGEST_ROW = 127, ROW_NORM = 200, LARGEST_SUM = 32767;

// Largest absolute number and norm of a vector.
void measure(const float* v, int64_t dim, float& largest, float& norm) {
  double squares = 0;
  float top = 0;
  for (int64_t c = 0; c < dim; ++c) {
    top = std::max(top, std::fabs(v[c]));
    squares += (double)v[c] * v[c];
  }
  largest = top;
  norm = (float)std::sqrt(squares);
}

struct RoundedRows {
  int64_t count, pairs, tiles;
  float scale = 1, norm = 0, error = 0;
  std::vector<uint8_t> bytes;  // [blocks, pairs, LANES, 2], plus 128

  RoundedRows(const float* rows, int64_t count, int64_t dim)
      : count(count), pairs((dim + 1) / 2), tiles((count + TILE - 1) / TILE) {
    float top = 0, largest, size;
    for (int64_t r = 0; r < count; ++r) {
      measure(rows + r * dim, dim, largest, size);
      top = std::max(top, largest);
      norm = std::max(norm, size);
    }
    scale = std::min(LARGEST_ROW / std::max(top, 1e-30f), ROW_NORM / std::max(norm, 1e-30f));
    bytes.assign((count + 31) / 32 * 32 * pairs * 2, 128);
    double worst = 0;
    for (int64_t r = 0; r < count; ++r) {
      uint8_t* to = &bytes[(r / LANES * pairs * LANES + r % LANES) * 2];
      double squares = 0;
      for (int64_t c = 0; c < dim; ++c) {
        const float exact = rows[r * dim + c] * scale, rounded = std::rint(exact);
        to[c / 2 * LANES * 2 + c % 2] = (uint8_t)(int)(rounded + 128.0f);
        squares += (double)(exact - rounded) * (exact - rounded);
      }
      worst = std::max(worst, squares);
    }
    error = (float)std::sqrt(worst) / scale;
  }
};

struct RoundedQuery {
  float scale, error;            // error: of the product with any row
  int16_t shift;                 // what 128 added to each row's numbers adds to the sum
  std::vector<int32_t> pairs;    // two numbers, twice

  RoundedQuery(const float* query, int64_t dim, const RoundedRows& rows, float at_most)
      : pairs(rows.pairs) {
    float largest, norm;
    measure(query, dim, largest, norm);
    scale = std::min(at_most, RoundedQuery::limit(largest, norm, dim, rows));
    double squares = 0;
    int total = 0;
    std::vector<int8_t> rounded(2 * rows.pairs, 0);
    for (int64_t c = 0; c < dim; ++c) {
      const float exact = query[c] * scale, whole = std::rint(exact);
      rounded[c] = (int8_t)whole;
      total += (int)whole;
      squares += (double)(exact - whole) * (exact - whole);
    }
    for (int64_t p = 0; p < rows.pairs; ++p) {
      const uint32_t pair = (uint8_t)rounded[2 * p] | (uint32_t)(uint8_t)rounded[2 * p + 1] << 8;
      pairs[p] = (int32_t)(pair | pair << 16);
    }
    shift = (int16_t)(uint16_t)(128 * total);
    const float own = (float)std::sqrt(squares) / scale;
    // The last term covers the roundings of this arithmetic itself.
    error = own * rows.norm + (norm + own) * rows.error + 1e-5f * norm * rows.norm;
  }

  static float limit(float largest, float norm, int64_t dim, const RoundedRows& rows) {
    const float slack = 0.5f * std::sqrt((float)dim) + 1;
    const float room = LARGEST_SUM / (rows.norm * rows.scale + slack) - slack;
    return std::min(LARGEST_QUERY / std::max(largest, 1e-30f), room / std::max(norm, 1e-30f));
  }
};

// [QUERIES, TILE] sums of whole numbers of some queries with the rows of a tile.
void products(const RoundedRows& rows, int64_t first, int64_t some,
              const RoundedQuery* const* queries, int16_t* out) {
  for (int64_t start = 0; start < some; start += 2 * LANES) {
    const uint8_t* block = &rows.bytes[(first + start) * rows.pairs * 2];
    const uint8_t* next = block + rows.pairs * LANES * 2;
    __m256i sums[QUERIES][2];
    for (int64_t j = 0; j < QUERIES; ++j)
      sums[j][0] = sums[j][1] = _mm256_set1_epi16((int16_t)-queries[j]->shift);
    for (int64_t p = 0; p < rows.pairs; ++p) {
      const __m256i left = _mm256_loadu_si256((const __m256i*)(block + p * 32));
      const __m256i right = _mm256_loadu_si256((const __m256i*)(next + p * 32));
      for (int64_t j = 0; j < QUERIES; ++j) {
        const __m256i pair = _mm256_set1_epi32(queries[j]->pairs[p]);
        sums[j][0] = _mm256_add_epi16(sums[j][0], _mm256_maddubs_epi16(left, pair));
        sums[j][1] = _mm256_add_epi16(sums[j][1], _mm256_maddubs_epi16(right, pair));
      }
    }
    for (int64_t j = 0; j < QUERIES; ++j) {
      _mm256_storeu_si256((__m256i*)(out + j * TILE + start), sums[j][0]);
      _mm256_storeu_si256((__m256i*)(out + j * TILE + start + LANES), sums[j][1]);
    }
  }
}

}  // namespace
