// Attention forward: per query tile, the running maximum and sum of the online softmax (arXiv 2205.14135)
// over the key tiles that some of its queries see.
#include <cmath>
#include <limits>

#include "core/cpu/attention_tiles.h"
#include "core/cpu/cpu_backend.h"
#include "core/cpu/parallel.h"

namespace hybridmoe::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Space {
  float* keys;    // [key_tiles, head_dim, kTile], transposed
  float* values;  // [keys, width]
  float* q;       // [kTile, width], scaled
  float* scores;  // [kTile, kTile]
  float* o;       // [kTile, width]
  float* max;     // [kTile]
  float* sum;     // [kTile]
};

Space space_of(std::byte* block, const AttentionShape& shape, std::int64_t* bytes = nullptr) {
  Carver carver(block);
  Space space;
  space.keys = carver.take<float>(shape.key_tiles * shape.head_dim * kTile);
  space.values = carver.take<float>(shape.keys * shape.width);
  space.q = carver.take<float>(kTile * shape.width);
  space.scores = carver.take<float>(kTile * kTile);
  space.o = carver.take<float>(kTile * shape.width);
  space.max = carver.take<float>(kTile);
  space.sum = carver.take<float>(kTile);
  if (bytes != nullptr) *bytes = carver.used();
  return space;
}

// Scores to probabilities relative to the new maximum, 0 where the query does not see the key; earlier
// results are scaled to it.
void soften_row(const Space& space, const AttentionShape& shape, std::int64_t i, const KeyRange& seen,
                std::int64_t count) {
  float* row = space.scores + i * kTile;
  float largest = space.max[i];
#pragma omp simd reduction(max : largest)
  for (std::int64_t j = seen.begin; j < seen.end; ++j) largest = row[j] > largest ? row[j] : largest;
  // A row that has seen no key yet: all its differences would be inf - inf.
  const float reference = largest == -kInfinity ? 0.f : largest;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t j = seen.begin; j < seen.end; ++j) {
    row[j] = exp_nonpositive(row[j] - reference);
    sum += row[j];
  }
  std::fill(row, row + seen.begin, 0.f);
  std::fill(row + seen.end, row + count, 0.f);
  const float correction = exp_nonpositive(space.max[i] - reference);
  space.sum[i] = space.sum[i] * correction + sum;
  space.max[i] = largest;
  float* o = space.o + i * shape.width;
  if (correction != 1.f) {
#pragma omp simd
    for (std::int64_t c = 0; c < shape.width; ++c) o[c] *= correction;
  }
}

template <class C>
void store_tile(const AttentionForward& op, const AttentionShape& shape, const Space& space,
                std::int64_t sequence, std::int64_t head, std::int64_t tile) {
  for (std::int64_t i = 0; i < shape.tile_queries(tile); ++i) {
    const std::int64_t query = tile * kTile + i;
    C* o = row_of<C>(op.o, sequence * shape.queries + query) + head * shape.head_dim;
    const float factor = 1.f / space.sum[i];
#pragma omp simd
    for (std::int64_t c = 0; c < shape.head_dim; ++c)
      o[c] = from_float<C>(space.o[i * shape.width + c] * factor);
    if (!op.lse.empty()) {
      op.lse.ptr<float>()[(sequence * op.heads + head) * shape.queries + query] =
          space.max[i] + std::log(space.sum[i]);
    }
  }
}

// Returns the largest score.
template <class C>
float query_tile(const AttentionForward& op, const AttentionShape& shape, const Space& space,
                 std::int64_t sequence, std::int64_t head, std::int64_t tile) {
  const std::int32_t* doc_start =
      op.doc_start.empty() ? nullptr : op.doc_start.ptr<std::int32_t>() + sequence * shape.queries;
  const std::int64_t rows = shape.tile_queries(tile);
  copy_head<C>(op.q, sequence * shape.queries + tile * kTile, rows, head, shape, static_cast<float>(op.scale),
               space.q);
  std::fill_n(space.o, rows * shape.width, 0.f);
  std::fill_n(space.max, rows, -kInfinity);
  std::fill_n(space.sum, rows, 0.f);
  const KeyRange keys = keys_of_tile(shape, doc_start, tile);
  for (std::int64_t j = keys.begin / kTile; j * kTile < keys.end; ++j) {
    const std::int64_t count = shape.tile_keys(j), diagonal = diagonal_of(shape, tile, j);
    tile_product({.m = rows,
                  .n = count,
                  .k = shape.head_dim,
                  .a = space.q,
                  .a_row = shape.width,
                  .a_column = 1,
                  .b = space.keys + j * shape.head_dim * kTile,
                  .ldb = kTile,
                  .c = space.scores,
                  .ldc = kTile,
                  .triangle = Triangle::LowerResult,
                  .diagonal = diagonal});
    for (std::int64_t i = 0; i < rows; ++i) {
      soften_row(space, shape, i, keys_of_query(shape, doc_start, tile * kTile + i, j), count);
    }
    tile_product({.m = rows,
                  .n = shape.head_dim,
                  .k = count,
                  .a = space.scores,
                  .a_row = kTile,
                  .a_column = 1,
                  .b = space.values + j * kTile * shape.width,
                  .ldb = shape.width,
                  .c = space.o,
                  .ldc = shape.width,
                  .accumulate = true,
                  .triangle = Triangle::LowerLeft,
                  .diagonal = diagonal});
  }
  store_tile<C>(op, shape, space, sequence, head, tile);
  return *std::max_element(space.max, space.max + rows);
}

template <class C, class Progress>
void forward(const AttentionForward& op, int threads, Scratch& scratch, const Progress& progress) {
  const AttentionShape shape(op);
  std::int64_t bytes = 0;
  space_of(nullptr, shape, &bytes);
  scratch.reserve(threads, bytes + 64);
  for (int thread = 0; thread < threads; ++thread) {
    *reinterpret_cast<float*>(scratch.block(thread) + bytes) = -kInfinity;
  }
  parallel_ranges(threads, std::int64_t{op.batch} * op.kv_heads, 1,
                  [&](std::int64_t begin, std::int64_t end, int thread) {
                    const Space space = space_of(scratch.block(thread), shape);
                    float& largest = *reinterpret_cast<float*>(scratch.block(thread) + bytes);
                    for (std::int64_t task = begin; task < end; ++task) {
                      const std::int64_t sequence = task / op.kv_heads, kv_head = task % op.kv_heads;
                      transpose_head<C>(op.k, sequence * shape.keys, kv_head, shape, space.keys);
                      copy_head<C>(op.v, sequence * shape.keys, shape.keys, kv_head, shape, 1.f,
                                   space.values);
                      for (std::int64_t h = kv_head * shape.group; h < (kv_head + 1) * shape.group; ++h) {
                        for (std::int64_t tile = 0; tile < shape.query_tiles; ++tile) {
                          largest = std::max(largest, query_tile<C>(op, shape, space, sequence, h, tile));
                        }
                      }
                      if (thread == 0) progress();
                    }
                  });
  if (op.logit_max.empty()) return;
  double& known = *op.logit_max.ptr<double>();
  for (int thread = 0; thread < threads; ++thread) {
    known = std::max(known, double{*reinterpret_cast<float*>(scratch.block(thread) + bytes)});
  }
}

}  // namespace

void CpuBackend::attention_forward(const AttentionForward& op, Stream*) {
  with_compute_type([&]<class C>(C) { forward<C>(op, options_.threads, scratch_, [this] { progress(); }); });
}

}  // namespace hybridmoe::cpu
