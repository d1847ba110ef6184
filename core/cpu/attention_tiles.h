// What the attention passes share: the shape of a call, and heads copied to fp32 panels that the tile
// products can read. A task is one key/value head of one sequence with its query heads; its panels live in
// the thread's scratch and grow linearly with the sequence.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cpu/row_norm.h"
#include "core/cpu/tile_product.h"
#include "core/operators/attention.h"

namespace hybridmoe::cpu {

// Queries and keys of a tile: whole strips of the tile products, and five such tiles fit into the
// second-level cache.
inline constexpr std::int64_t kTile = 96;
static_assert(kTile % kStripRows == 0 && kTile % (2 * kLanes) == 0);

struct AttentionShape {
  std::int64_t queries, keys, first_query, head_dim, width;  // width: head_dim padded for the tile products
  std::int64_t key_tiles, query_tiles;
  std::int64_t group;  // query heads of a key/value head

  explicit AttentionShape(const AttentionForward& op)
      : queries(op.queries),
        keys(op.keys),
        first_query(op.first_query),
        head_dim(op.head_dim),
        width(round_up(op.head_dim, kLanes)),
        key_tiles((op.keys + kTile - 1) / kTile),
        query_tiles((op.queries + kTile - 1) / kTile),
        group(op.heads / op.kv_heads) {}

  std::int64_t tile_keys(std::int64_t tile) const { return std::min(kTile, keys - tile * kTile); }
  std::int64_t tile_queries(std::int64_t tile) const { return std::min(kTile, queries - tile * kTile); }
};

// Keys [begin, end) that the queries of a tile see, together.
struct KeyRange {
  std::int64_t begin, end;
};

inline KeyRange keys_of_tile(const AttentionShape& shape, const std::int32_t* doc_start, std::int64_t tile) {
  const std::int64_t begin = tile * kTile, end = begin + shape.tile_queries(tile);
  const std::int64_t first = doc_start == nullptr ? 0 : *std::min_element(doc_start + begin, doc_start + end);
  return {first, shape.first_query + end};
}

// The keys of a key tile that one query sees, counted from the tile's first.
inline KeyRange keys_of_query(const AttentionShape& shape, const std::int32_t* doc_start, std::int64_t query,
                              std::int64_t key_tile) {
  const std::int64_t first = key_tile * kTile, count = shape.tile_keys(key_tile);
  const std::int64_t end = std::clamp<std::int64_t>(shape.first_query + query + 1 - first, 0, count);
  const std::int64_t begin =
      doc_start == nullptr ? 0 : std::clamp<std::int64_t>(doc_start[query] - first, 0, end);
  return {begin, end};
}

// Query i of a tile sees key j of a key tile only if j <= i + diagonal.
inline std::int64_t diagonal_of(const AttentionShape& shape, std::int64_t query_tile, std::int64_t key_tile) {
  return shape.first_query + (query_tile - key_tile) * kTile;
}

// A head's part of a row, asked for some rows ahead: rows lie too far apart for the hardware to foresee them.
template <class C>
void prefetch_head(const C* part, std::int64_t row_stride, std::int64_t head_dim) {
  constexpr std::int64_t kRowsAhead = 8;
  const char* ahead = reinterpret_cast<const char*>(part + kRowsAhead * row_stride);
  for (std::int64_t byte = 0; byte < head_dim * static_cast<std::int64_t>(sizeof(C)); byte += 64) {
    __builtin_prefetch(ahead + byte);
  }
}

// Rows [begin, begin + count) of one head, times factor, to panel rows padded by zeros to shape.width.
template <class C>
void copy_head(const Tensor& matrix, std::int64_t begin, std::int64_t count, std::int64_t head,
               const AttentionShape& shape, float factor, float* panel) {
  for (std::int64_t t = 0; t < count; ++t) {
    const C* row = row_of<C>(matrix, begin + t) + head * shape.head_dim;
    prefetch_head(row, matrix.row_stride(), shape.head_dim);
    float* target = panel + t * shape.width;
#pragma omp simd
    for (std::int64_t i = 0; i < shape.head_dim; ++i) target[i] = to_float(row[i]) * factor;
    std::fill(target + shape.head_dim, target + shape.width, 0.f);
  }
}

// One head's keys or values transposed tile by tile: tile j is [head_dim, kTile], short tiles padded by
// zeros.
template <class C>
void transpose_head(const Tensor& matrix, std::int64_t begin, std::int64_t head, const AttentionShape& shape,
                    float* panel) {
  for (std::int64_t tile = 0; tile < shape.key_tiles; ++tile) {
    float* target = panel + tile * shape.head_dim * kTile;
    const std::int64_t count = shape.tile_keys(tile);
    if (count < kTile) std::fill_n(target, shape.head_dim * kTile, 0.f);
    for (std::int64_t t = 0; t < count; ++t) {
      const C* row = row_of<C>(matrix, begin + tile * kTile + t) + head * shape.head_dim;
      prefetch_head(row, matrix.row_stride(), shape.head_dim);
      for (std::int64_t i = 0; i < shape.head_dim; ++i) target[i * kTile + t] = to_float(row[i]);
    }
  }
}

}  // namespace hybridmoe::cpu
