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

inline constexpr std::int64_t kTile = 64;  // queries and keys of a tile

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

// Which keys the queries of a tile see, from causality and document starts.
struct TileBounds {
  std::int64_t first_key;   // smallest doc_start of the tile's queries
  std::int64_t last_first;  // largest
  std::int64_t end_key;     // one past the last key that the last query sees
};

inline TileBounds bounds_of(const AttentionShape& shape, const std::int32_t* doc_start, std::int64_t tile) {
  const std::int64_t begin = tile * kTile, end = begin + shape.tile_queries(tile);
  TileBounds bounds = {0, 0, shape.first_query + end};
  if (doc_start == nullptr) return bounds;
  bounds.first_key = *std::min_element(doc_start + begin, doc_start + end);
  bounds.last_first = *std::max_element(doc_start + begin, doc_start + end);
  return bounds;
}

// Whether some query of the tile does not see some key of the key tile.
inline bool partly_hidden(const AttentionShape& shape, const TileBounds& bounds, std::int64_t query_tile,
                          std::int64_t key_tile) {
  const std::int64_t first_key = key_tile * kTile, last_key = first_key + shape.tile_keys(key_tile) - 1;
  return last_key > shape.first_query + query_tile * kTile || first_key < bounds.last_first;
}

// Rows [begin, begin + count) of one head, times factor, to panel rows padded by zeros to shape.width.
template <class C>
void copy_head(const Tensor& matrix, std::int64_t begin, std::int64_t count, std::int64_t head,
               const AttentionShape& shape, float factor, float* panel) {
  for (std::int64_t t = 0; t < count; ++t) {
    const C* row = row_of<C>(matrix, begin + t) + head * shape.head_dim;
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
      for (std::int64_t i = 0; i < shape.head_dim; ++i) target[i * kTile + t] = to_float(row[i]);
    }
  }
}

}  // namespace hybridmoe::cpu
