// Histories cut into blocks of n positions with a mean of the past for each, and put together again.
//
// B histories [L, D], of which the first ``lengths`` [B] positions are real and the rest is padding;
// G blocks that hold a real position, history by history.

#include "common.h"

namespace {

struct Shape {
  int64_t rows, length, dim, block, offset;  // offset: in a block, where its mean is taken
  int64_t blocks(int64_t real) const { return (real + block - 1) / block; }
};

// work(row, first block of it) for every history.
template <typename Work>
void each(const int64_t* lengths, const Shape& s, int64_t threads, const Work& work) {
  std::vector<int64_t> first(s.rows + 1, 0);
  for (int64_t b = 0; b < s.rows; ++b) first[b + 1] = first[b] + s.blocks(lengths[b]);
  divided(s.rows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) work(b, first[b]);
  });
}

// One position more or less: ``count`` numbers, or zeros.
inline void put(float* to, const float* from, int64_t count) {
  if (from) std::memcpy(to, from, count * sizeof(float));
  else std::memset(to, 0, count * sizeof(float));
}

}  // namespace

extern "C" {

// x [B, L, D] -> positions [G, n, D], zeros behind column L, and means [G, D] of the real positions
// up to ``offset`` of each block, summed in float64.
void cut_blocks(const float* x, const int64_t* lengths, float* positions, float* means,
                int64_t rows, int64_t length, int64_t dim, int64_t block, int64_t offset,
                int64_t threads) {
  const Shape s{rows, length, dim, block, offset};
  each(lengths, s, threads, [&](int64_t b, int64_t first) {
    std::vector<double> total(dim, 0.0);
    for (int64_t t = 0; t < s.blocks(lengths[b]) * block; ++t) {
      const float* from = t < length ? x + (b * length + t) * dim : nullptr;
      put(positions + (first * block + t) * dim, from, dim);
      if (t < lengths[b])
        for (int64_t c = 0; c < dim; ++c) total[c] += from[c];
      if (t % block != offset) continue;
      float* mean = means + (first + t / block) * dim;
      const float count = (float)std::min(t + 1, lengths[b]);
      for (int64_t c = 0; c < dim; ++c) mean[c] = (float)total[c] / count;
    }
  });
}

// The gradient by x of ``cut_blocks``.
void cut_blocks_backward(const float* of_positions, const float* of_means, const int64_t* lengths,
                         float* of_x, int64_t rows, int64_t length, int64_t dim, int64_t block,
                         int64_t offset, int64_t threads) {
  const Shape s{rows, length, dim, block, offset};
  each(lengths, s, threads, [&](int64_t b, int64_t first) {
    std::vector<double> later(dim, 0.0);
    const int64_t end = s.blocks(lengths[b]) * block;
    for (int64_t t = std::max(end, length) - 1; t >= 0; --t) {
      if (t < end && t % block == offset) {
        const float* mean = of_means + (first + t / block) * dim;
        const float count = (float)std::min(t + 1, lengths[b]);
        for (int64_t c = 0; c < dim; ++c) later[c] += mean[c] / count;
      }
      if (t >= length) continue;
      float* to = of_x + (b * length + t) * dim;
      put(to, t < end ? of_positions + (first * block + t) * dim : nullptr, dim);
      if (t < lengths[b])
        for (int64_t c = 0; c < dim; ++c) to[c] += (float)later[c];
    }
  });
}

// blocks [G, n, D] -> x [B, L, D], zero at padding.
void spread_blocks(const float* blocks, const int64_t* lengths, float* x, int64_t rows,
                   int64_t length, int64_t dim, int64_t block, int64_t threads) {
  const Shape s{rows, length, dim, block, 0};
  each(lengths, s, threads, [&](int64_t b, int64_t first) {
    put(x + b * length * dim, blocks + first * block * dim, lengths[b] * dim);
    put(x + (b * length + lengths[b]) * dim, nullptr, (length - lengths[b]) * dim);
  });
}

// The gradient by blocks of ``spread_blocks``.
void spread_blocks_backward(const float* of_x, const int64_t* lengths, float* of_blocks,
                            int64_t rows, int64_t length, int64_t dim, int64_t block,
                            int64_t threads) {
  const Shape s{rows, length, dim, block, 0};
  each(lengths, s, threads, [&](int64_t b, int64_t first) {
    float* to = of_blocks + first * block * dim;
    put(to, of_x + b * length * dim, lengths[b] * dim);
    put(to + lengths[b] * dim, nullptr, (s.blocks(lengths[b]) * block - lengths[b]) * dim);
  });
}
}
