// Attention backward: probabilities are computed again from the log-sum-exp. Per query tile, in ascending
// order, the key tiles it sees: dS = P ⊙ (dO Vᵀ - delta), dV += Pᵀ dO, dK += dSᵀ Q, dQ += dS K. dK and dV are
// summed over the query heads of their group in order.
#include "core/cpu/attention_tiles.h"
#include "core/cpu/cpu_backend.h"
#include "core/cpu/parallel.h"

namespace hybridmoe::cpu {
namespace {

struct Space {
  float* keys_transposed;    // [key_tiles, head_dim, kTile]
  float* values_transposed;  // [key_tiles, head_dim, kTile]
  float* keys;               // [keys, width]
  float* dk;                 // [keys, width]
  float* dv;                 // [keys, width]
  float* q;                  // [kTile, width], scaled
  float* dq;                 // [kTile, width]
  float* grad_o;             // [kTile, width]
  float* probs;              // [kTile, kTile]
  float* dscores;            // [kTile, kTile]
};

Space space_of(std::byte* block, const AttentionShape& shape, std::int64_t* bytes = nullptr) {
  Carver carver(block);
  Space space;
  space.keys_transposed = carver.take<float>(shape.key_tiles * shape.head_dim * kTile);
  space.values_transposed = carver.take<float>(shape.key_tiles * shape.head_dim * kTile);
  space.keys = carver.take<float>(shape.keys * shape.width);
  space.dk = carver.take<float>(shape.keys * shape.width);
  space.dv = carver.take<float>(shape.keys * shape.width);
  space.q = carver.take<float>(kTile * shape.width);
  space.dq = carver.take<float>(kTile * shape.width);
  space.grad_o = carver.take<float>(kTile * shape.width);
  space.probs = carver.take<float>(kTile * kTile);
  space.dscores = carver.take<float>(kTile * kTile);
  if (bytes != nullptr) *bytes = carver.used();
  return space;
}

struct Task {
  std::int64_t sequence, head;
  const std::int32_t* doc_start;  // of the sequence, or null
  const float* lse;               // of the head
  float* delta;
};

// probs = exp(scores - lse), 0 where hidden; dscores = probs ⊙ (dscores - delta).
void differentiate_row(const AttentionShape& shape, const Task& task, std::int64_t query,
                       std::int64_t key_tile, float* probs, float* dscores) {
  const KeyRange seen = keys_of_query(shape, task.doc_start, query, key_tile);
  const float lse = task.lse[query], delta = task.delta[query];
  std::fill(probs, probs + seen.begin, 0.f);
  std::fill(dscores, dscores + seen.begin, 0.f);
#pragma omp simd
  for (std::int64_t j = seen.begin; j < seen.end; ++j) {
    probs[j] = exp_nonpositive(probs[j] - lse);
    dscores[j] = probs[j] * (dscores[j] - delta);
  }
  std::fill(probs + seen.end, probs + shape.tile_keys(key_tile), 0.f);
  std::fill(dscores + seen.end, dscores + shape.tile_keys(key_tile), 0.f);
}

// delta[query] = Σ do · o for the rows of a tile; do is already in fp32.
template <class C>
void dot_outputs(const AttentionBackward& op, const AttentionShape& shape, const Task& task,
                 const Space& space, std::int64_t tile) {
  for (std::int64_t i = 0; i < shape.tile_queries(tile); ++i) {
    const std::int64_t query = tile * kTile + i;
    const C* o = row_of<C>(op.forward.o, task.sequence * shape.queries + query) + task.head * shape.head_dim;
    const float* grad = space.grad_o + i * shape.width;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t c = 0; c < shape.head_dim; ++c) sum += grad[c] * to_float(o[c]);
    task.delta[query] = sum;
  }
}

template <class C>
void store_head(const Tensor& target, std::int64_t first_row, std::int64_t count, std::int64_t head,
                const AttentionShape& shape, float factor, const float* panel) {
  for (std::int64_t t = 0; t < count; ++t) {
    C* row = row_of<C>(target, first_row + t) + head * shape.head_dim;
#pragma omp simd
    for (std::int64_t i = 0; i < shape.head_dim; ++i)
      row[i] = from_float<C>(panel[t * shape.width + i] * factor);
  }
}

template <class C>
void query_tile(const AttentionBackward& op, const AttentionShape& shape, const Task& task,
                const Space& space, std::int64_t tile) {
  const std::int64_t rows = shape.tile_queries(tile), width = shape.width, d = shape.head_dim;
  const std::int64_t first_row = task.sequence * shape.queries + tile * kTile;
  const auto scale = static_cast<float>(op.forward.scale);
  copy_head<C>(op.forward.q, first_row, rows, task.head, shape, scale, space.q);
  copy_head<C>(op.do_, first_row, rows, task.head, shape, 1.f, space.grad_o);
  dot_outputs<C>(op, shape, task, space, tile);
  std::fill_n(space.dq, rows * width, 0.f);
  const KeyRange keys = keys_of_tile(shape, task.doc_start, tile);
  for (std::int64_t j = keys.begin / kTile; j * kTile < keys.end; ++j) {
    const std::int64_t count = shape.tile_keys(j), first = j * kTile * width;
    const std::int64_t diagonal = diagonal_of(shape, tile, j);
    tile_product({.m = rows,
                  .n = count,
                  .k = d,
                  .a = space.q,
                  .a_row = width,
                  .a_column = 1,
                  .b = space.keys_transposed + j * d * kTile,
                  .ldb = kTile,
                  .c = space.probs,
                  .ldc = kTile,
                  .triangle = Triangle::LowerResult,
                  .diagonal = diagonal});
    tile_product({.m = rows,
                  .n = count,
                  .k = d,
                  .a = space.grad_o,
                  .a_row = width,
                  .a_column = 1,
                  .b = space.values_transposed + j * d * kTile,
                  .ldb = kTile,
                  .c = space.dscores,
                  .ldc = kTile,
                  .triangle = Triangle::LowerResult,
                  .diagonal = diagonal});
    for (std::int64_t i = 0; i < rows; ++i) {
      differentiate_row(shape, task, tile * kTile + i, j, space.probs + i * kTile, space.dscores + i * kTile);
    }
    tile_product({.m = count,
                  .n = d,
                  .k = rows,
                  .a = space.probs,
                  .a_row = 1,
                  .a_column = kTile,
                  .b = space.grad_o,
                  .ldb = width,
                  .c = space.dv + first,
                  .ldc = width,
                  .accumulate = true,
                  .triangle = Triangle::UpperLeft,
                  .diagonal = diagonal});
    tile_product({.m = count,
                  .n = d,
                  .k = rows,
                  .a = space.dscores,
                  .a_row = 1,
                  .a_column = kTile,
                  .b = space.q,
                  .ldb = width,
                  .c = space.dk + first,
                  .ldc = width,
                  .accumulate = true,
                  .triangle = Triangle::UpperLeft,
                  .diagonal = diagonal});
    tile_product({.m = rows,
                  .n = d,
                  .k = count,
                  .a = space.dscores,
                  .a_row = kTile,
                  .a_column = 1,
                  .b = space.keys + first,
                  .ldb = width,
                  .c = space.dq,
                  .ldc = width,
                  .accumulate = true,
                  .triangle = Triangle::LowerLeft,
                  .diagonal = diagonal});
  }
  store_head<C>(op.dq, first_row, rows, task.head, shape, scale, space.dq);
}

template <class C>
void kv_head(const AttentionBackward& op, const AttentionShape& shape, const Space& space,
             std::int64_t sequence, std::int64_t kv) {
  const AttentionForward& f = op.forward;
  const std::int64_t first_key = sequence * shape.keys;
  transpose_head<C>(f.k, first_key, kv, shape, space.keys_transposed);
  transpose_head<C>(f.v, first_key, kv, shape, space.values_transposed);
  copy_head<C>(f.k, first_key, shape.keys, kv, shape, 1.f, space.keys);
  std::fill_n(space.dk, shape.keys * shape.width, 0.f);
  std::fill_n(space.dv, shape.keys * shape.width, 0.f);
  for (std::int64_t head = kv * shape.group; head < (kv + 1) * shape.group; ++head) {
    const std::int64_t statistics = (sequence * f.heads + head) * shape.queries;
    const Task task = {
        sequence, head,
        f.doc_start.empty() ? nullptr : f.doc_start.ptr<std::int32_t>() + sequence * shape.queries,
        f.lse.ptr<float>() + statistics, op.delta.ptr<float>() + statistics};
    for (std::int64_t tile = 0; tile < shape.query_tiles; ++tile) query_tile<C>(op, shape, task, space, tile);
  }
  store_head<C>(op.dk, first_key, shape.keys, kv, shape, 1.f, space.dk);
  store_head<C>(op.dv, first_key, shape.keys, kv, shape, 1.f, space.dv);
}

template <class C, class Progress>
void backward(const AttentionBackward& op, int threads, Scratch& scratch, const Progress& progress) {
  const AttentionForward& f = op.forward;
  const AttentionShape shape(f);
  std::int64_t bytes = 0;
  space_of(nullptr, shape, &bytes);
  scratch.reserve(threads, bytes);
  parallel_ranges(threads, std::int64_t{f.batch} * f.kv_heads, 1,
                  [&](std::int64_t begin, std::int64_t end, int thread) {
                    const Space space = space_of(scratch.block(thread), shape);
                    for (std::int64_t task = begin; task < end; ++task) {
                      kv_head<C>(op, shape, space, task / f.kv_heads, task % f.kv_heads);
                      if (thread == 0) progress();
                    }
                  });
}

}  // namespace

void CpuBackend::attention_backward(const AttentionBackward& op, Stream*) {
  with_compute_type([&]<class C>(C) { backward<C>(op, options_.threads, scratch_, [this] { progress(); }); });
}

}  // namespace hybridmoe::cpu
