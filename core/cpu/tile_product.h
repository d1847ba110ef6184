// Products of small matrices that lie in the cache: C[m, n] (+)= A[m, k] · B[k, n], for tiles of attention
// and the router, where a library call per tile costs more than it saves.
//
// B and C are row-major with rows padded to a multiple of kLanes, and n is rounded up to such a multiple: the
// padding is computed too and must be readable. A has any two strides, so that a transposed A is free. The
// order of summation over k is ascending for every element, whatever m and n are.
#pragma once

#include <cstdint>

namespace hybridmoe::cpu {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
inline constexpr int kStripRows = 12;  // 2 · 12 accumulators of 32 registers
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
inline constexpr int kStripRows = 6;  // 2 · 6 accumulators of 16 registers
#else
inline constexpr int kLanes = 4;
inline constexpr int kStripRows = 6;
#endif

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// What of a product need not be computed, because of a triangle of zeros (or of results nobody reads) beside
// a diagonal. Work is left out by strips of rows: what is left out of C keeps its value.
enum class Triangle {
  None,
  LowerResult,  // only C[i, j] with j <= i + diagonal is wanted
  LowerLeft,    // A[i, p] = 0 where p > i + diagonal
  UpperLeft,    // A[i, p] = 0 where i > p + diagonal
};

struct TileProduct {
  std::int64_t m, n, k;
  const float* a;
  std::int64_t a_row, a_column;  // strides of A: element (i, p) is a[i * a_row + p * a_column]
  const float* b;
  std::int64_t ldb;
  float* c;
  std::int64_t ldc;
  bool accumulate = false;
  Triangle triangle = Triangle::None;
  std::int64_t diagonal = 0;
};

void tile_product(const TileProduct& product);

}  // namespace hybridmoe::cpu
