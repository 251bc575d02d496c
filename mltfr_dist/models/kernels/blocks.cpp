// Packed histories cut into blocks of n positions with a mean of the past for each, and put together
// again.
//
// B histories, ``lengths`` [B] positions of D numbers each, one behind the other [N, D]; G blocks that
// hold a position, history by history.

#include "common.h"

namespace {

struct Shape {
  int64_t rows, dim, block, offset;  // offset: in a block, where its mean is taken
  int64_t blocks(int64_t real) const { return (real + block - 1) / block; }
};

// work(length, first position, first block) for every history.
template <typename Work>
void each(const int64_t* lengths, const Shape& s, int64_t threads, const Work& work) {
  std::vector<int64_t> position(s.rows + 1, 0), block(s.rows + 1, 0);
  for (int64_t b = 0; b < s.rows; ++b) {
    position[b + 1] = position[b] + lengths[b];
    block[b + 1] = block[b] + s.blocks(lengths[b]);
  }
  divided(s.rows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) work(lengths[b], position[b], block[b]);
  });
}

// ``count`` positions [D] and zeros behind them, up to whole blocks.
inline void put_blocks(float* to, const float* from, int64_t count, const Shape& s) {
  std::memcpy(to, from, count * s.dim * sizeof(float));
  const int64_t behind = s.blocks(count) * s.block - count;
  std::memset(to + count * s.dim, 0, behind * s.dim * sizeof(float));
}

}  // namespace

extern "C" {

// x [N, D] -> positions [G, n, D], zeros behind a history, and means [G, D] of the positions of the
// history up to ``offset`` of each block, summed in float64.
void cut_blocks(const float* x, const int64_t* lengths, float* positions, float* means,
                int64_t rows, int64_t dim, int64_t block, int64_t offset, int64_t threads) {
  const Shape s{rows, dim, block, offset};
  each(lengths, s, threads, [&](int64_t length, int64_t position, int64_t first) {
    const float* from = x + position * dim;
    put_blocks(positions + first * block * dim, from, length, s);
    std::vector<double> total(dim, 0.0);
    for (int64_t t = 0; t < s.blocks(length) * block; ++t) {
      if (t < length)
        for (int64_t c = 0; c < dim; ++c) total[c] += from[t * dim + c];
      if (t % block != offset) continue;
      float* mean = means + (first + t / block) * dim;
      const float count = (float)std::min(t + 1, length);
      for (int64_t c = 0; c < dim; ++c) mean[c] = (float)total[c] / count;
    }
  });
}

// The gradient by x of ``cut_blocks``.
void cut_blocks_backward(const float* of_positions, const float* of_means, const int64_t* lengths,
                         float* of_x, int64_t rows, int64_t dim, int64_t block, int64_t offset,
                         int64_t threads) {
  const Shape s{rows, dim, block, offset};
  each(lengths, s, threads, [&](int64_t length, int64_t position, int64_t first) {
    const float* from = of_positions + first * block * dim;
    float* to = of_x + position * dim;
    std::vector<double> later(dim, 0.0);
    for (int64_t t = s.blocks(length) * block - 1; t >= 0; --t) {
      if (t % block == offset) {
        const float* mean = of_means + (first + t / block) * dim;
        const float count = (float)std::min(t + 1, length);
        for (int64_t c = 0; c < dim; ++c) later[c] += mean[c] / count;
      }
      if (t < length)
        for (int64_t c = 0; c < dim; ++c) to[t * dim + c] = from[t * dim + c] + (float)later[c];
    }
  });
}

// blocks [G, n, D] -> x [N, D].
void join_blocks(const float* blocks, const int64_t* lengths, float* x, int64_t rows, int64_t dim,
                 int64_t block, int64_t threads) {
  const Shape s{rows, dim, block, 0};
  each(lengths, s, threads, [&](int64_t length, int64_t position, int64_t first) {
    std::memcpy(x + position * dim, blocks + first * block * dim, length * dim * sizeof(float));
  });
}

// The gradient by blocks of ``join_blocks``.
void join_blocks_backward(const float* of_x, const int64_t* lengths, float* of_blocks, int64_t rows,
                          int64_t dim, int64_t block, int64_t threads) {
  const Shape s{rows, dim, block, 0};
  each(lengths, s, threads, [&](int64_t length, int64_t position, int64_t first) {
    put_blocks(of_blocks + first * block * dim, of_x + position * dim, length, s);
  });
}
}
