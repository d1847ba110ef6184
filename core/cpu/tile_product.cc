#include "core/cpu/tile_product.h"

#include <algorithm>

namespace hybridmoe::cpu {
namespace {

typedef float Lanes __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// Depth at a time: what is read of B then stays in the cache from one strip to the next.
constexpr std::int64_t kDepth = 256;

// kRows rows and kColumns vectors of C: the accumulators stay in registers.
template <int kRows, int kColumns>
inline void block(const TileProduct& t, const float* a, const float* b, float* c) {
  Lanes sum[kRows][kColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) {
      sum[i][j] = t.accumulate ? *reinterpret_cast<const Lanes*>(c + i * t.ldc + j * kLanes) : Lanes{};
    }
  }
  // Two pointers into A: one with kRows offsets would need more registers than there are.
  constexpr int kHalf = kRows / 2;
  const float* lower = a + kHalf * t.a_row;
  const std::int64_t a_row = t.a_row, a_column = t.a_column, ldb = t.ldb;
  for (const float* end = b + t.k * ldb; b != end; b += ldb, a += a_column, lower += a_column) {
    Lanes right[kColumns];
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) right[j] = *reinterpret_cast<const Lanes*>(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float left = i < kHalf ? a[i * a_row] : lower[(i - kHalf) * a_row];
#pragma GCC unroll 2
      for (int j = 0; j < kColumns; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) *reinterpret_cast<Lanes*>(c + i * t.ldc + j * kLanes) = sum[i][j];
  }
}

template <int kRows>
void strip(const TileProduct& t, const float* a, const float* b, float* c) {
  std::int64_t column = 0;
  for (; column + kLanes < t.n; column += 2 * kLanes) block<kRows, 2>(t, a, b + column, c + column);
  if (column < t.n) block<kRows, 1>(t, a, b + column, c + column);
}

// The strip of `rows` <= kRows.
template <int kRows>
void strip_of(std::int64_t rows, const TileProduct& t, const float* a, const float* b, float* c) {
  if (rows == kRows) {
    strip<kRows>(t, a, b, c);
  } else if constexpr (kRows > 1) {
    strip_of<kRows - 1>(rows, t, a, b, c);
  }
}

// The part of a product that rows [i, i + rows) have.
struct Extent {
  std::int64_t columns, begin, end;  // of C, of the depth
};

Extent extent_of(const TileProduct& t, std::int64_t i, std::int64_t rows) {
  Extent extent = {t.n, 0, t.k};
  if (t.triangle == Triangle::LowerResult) {
    extent.columns = std::clamp<std::int64_t>(i + rows + t.diagonal, 0, t.n);
  } else if (t.triangle == Triangle::LowerLeft) {
    extent.end = std::clamp<std::int64_t>(i + rows + t.diagonal, 0, t.k);
  } else if (t.triangle == Triangle::UpperLeft) {
    extent.begin = std::clamp<std::int64_t>(i - t.diagonal, 0, t.k);
  }
  return extent;
}

}  // namespace

void tile_product(const TileProduct& product) {
  for (std::int64_t depth = 0; depth == 0 || depth < product.k; depth += kDepth) {
    for (std::int64_t i = 0; i < product.m; i += kStripRows) {
      const std::int64_t rows = std::min<std::int64_t>(kStripRows, product.m - i);
      const Extent extent = extent_of(product, i, rows);
      const std::int64_t begin = std::max(depth, extent.begin), end = std::min(depth + kDepth, extent.end);
      TileProduct part = product;
      part.n = extent.columns;
      part.k = std::max<std::int64_t>(end - begin, 0);
      part.accumulate = product.accumulate || depth > 0;
      if (part.accumulate && part.k == 0) continue;
      strip_of<kStripRows>(rows, part, product.a + i * product.a_row + begin * product.a_column,
                           product.b + begin * product.ldb, product.c + i * product.ldc);
    }
  }
}

}  // namespace hybridmoe::cpu
