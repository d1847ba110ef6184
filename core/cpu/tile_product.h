// Products of small matrices that lie in the cache: C[m, n] (+)= A[m, k] · B[k, n], for tiles of attention
// and the router, where a library call per tile costs more than it saves.
//
// B and C are row-major with rows padded to a multiple of kLanes, and n is rounded up to such a multiple: the
// padding is computed too and must be readable and finite. A has any two strides, so that a transposed A is
// free. The order of summation over k is ascending for every element, whatever m and n are.
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

struct TileProduct {
  std::int64_t m, n, k;
  const float* a;
  std::int64_t a_row, a_column;  // strides of A: element (i, p) is a[i * a_row + p * a_column]
  const float* b;
  std::int64_t ldb;
  float* c;
  std::int64_t ldc;
  bool accumulate = false;
};

typedef float Lanes __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// Rows [0, kRows) and kColumns vectors of columns: accumulators stay in registers.
template <int kRows, int kColumns>
inline void tile_strip(const TileProduct& t, const float* a, const float* b, float* c) {
  Lanes sum[kRows][kColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) {
      sum[i][j] = t.accumulate ? *reinterpret_cast<const Lanes*>(c + i * t.ldc + j * kLanes) : Lanes{};
    }
  }
  for (std::int64_t p = 0; p < t.k; ++p) {
    const float* row = b + p * t.ldb;
    const float* column = a + p * t.a_column;
    Lanes right[kColumns];
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) right[j] = *reinterpret_cast<const Lanes*>(row + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float left = column[i * t.a_row];
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

template <int kColumns>
inline void tile_columns(const TileProduct& t, std::int64_t column) {
  const float* b = t.b + column;
  std::int64_t i = 0;
  for (; i + kStripRows <= t.m; i += kStripRows) {
    tile_strip<kStripRows, kColumns>(t, t.a + i * t.a_row, b, t.c + i * t.ldc + column);
  }
  for (; i + 4 <= t.m; i += 4) tile_strip<4, kColumns>(t, t.a + i * t.a_row, b, t.c + i * t.ldc + column);
  for (; i < t.m; ++i) tile_strip<1, kColumns>(t, t.a + i * t.a_row, b, t.c + i * t.ldc + column);
}

inline void tile_product(const TileProduct& t) {
  std::int64_t column = 0;
  for (; column + 2 * kLanes <= round_up(t.n, kLanes); column += 2 * kLanes) tile_columns<2>(t, column);
  if (column < t.n) tile_columns<1>(t, column);
}

}  // namespace hybridmoe::cpu
