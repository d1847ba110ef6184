// Attention for any type and head size: a warp per query, or per key, 32 partners at a time, one to a lane.
// Simple rather than fast.
#pragma once

#include <cmath>

#include "core/cuda/reduce.h"
#include "core/cuda/rows.h"
#include "core/operators/attention.h"

namespace hybridmoe::cuda {

struct AttentionShape {
  std::int64_t batch, queries, keys, first_query;
  int heads, kv_heads, head_dim;
  const std::int32_t* doc_start;  // null: one document
  float scale;

  explicit AttentionShape(const AttentionForward& op)
      : batch(op.batch),
        queries(op.queries),
        keys(op.keys),
        first_query(op.first_query),
        heads(op.heads),
        kv_heads(op.kv_heads),
        head_dim(op.head_dim),
        doc_start(elements<const std::int32_t>(op.doc_start)),
        scale(static_cast<float>(op.scale)) {}

  HYBRIDMOE_DEVICE int kv_column(int head) const { return head * kv_heads / heads * head_dim; }
  HYBRIDMOE_DEVICE std::int64_t first_key(std::int64_t row) const {
    return doc_start == nullptr ? 0 : doc_start[row];
  }
};

constexpr int kAttentionWarps = 4;  // of a block

// a · b over a head.
template <class C>
HYBRIDMOE_DEVICE float head_dot(const float* a, const C* b, int width) {
  float sum = 0;
  for (int i = 0; i < width; ++i) sum += a[i] * to_float(b[i]);
  return sum;
}

// The query of this warp.
struct WarpQuery {
  std::int64_t batch, row, statistic, first_key, end_key;  // keys within the sequence
  int head;
  bool active;

  HYBRIDMOE_DEVICE explicit WarpQuery(const AttentionShape& s) {
    statistic = block_x() * kAttentionWarps + thread_index() / kWarp;
    active = statistic < s.batch * s.heads * s.queries;
    const std::int64_t i = statistic % s.queries;
    head = static_cast<int>(statistic / s.queries % s.heads);
    batch = statistic / s.queries / s.heads;
    row = batch * s.queries + i;
    first_key = active ? s.first_key(row) : 0;
    end_key = s.first_query + i + 1;
  }
};

// Shared memory of a warp: vectors of head_dim floats, then two values per lane.
struct WarpVectors {
  float* base;
  int head_dim;
  static std::size_t bytes(int vectors, int head_dim) {
    return kAttentionWarps * (vectors * head_dim + 2 * kWarp) * sizeof(float);
  }
  HYBRIDMOE_DEVICE WarpVectors(int vectors, int width) : head_dim(width) {
    base = shared_memory<float>() + thread_index() / kWarp * (vectors * width + 2 * kWarp) + 2 * kWarp;
  }
  HYBRIDMOE_DEVICE float* operator[](int vector) const { return base + vector * head_dim; }
  HYBRIDMOE_DEVICE float* lanes(int which) const { return base - (which + 1) * kWarp; }
};

template <class C>
struct AttentionRowsForward {
  static constexpr int kThreads = kAttentionWarps * kWarp;
  AttentionShape shape;
  Rows<const C> q, k, v;
  Rows<C> o;
  float* lse;
  float* maxima;  // [queries of all sequences and heads], null: not wanted

  HYBRIDMOE_DEVICE void operator()() const {
    const WarpQuery query(shape);
    if (!query.active) return;
    const int lane = thread_index() % kWarp, width = shape.head_dim, column = query.head * width;
    const int kv_column = shape.kv_column(query.head);
    const WarpVectors vectors(2, width);
    float *mine = vectors[0], *sum = vectors[1], *p = vectors.lanes(0);
    for (int i = lane; i < width; i += kWarp) {
      mine[i] = to_float(q[query.row][column + i]);
      sum[i] = 0;
    }
    sync_warp();
    float top = -INFINITY, total = 0;
    for (std::int64_t first = query.first_key; first < query.end_key; first += kWarp) {
      const std::int64_t key = first + lane, row = query.batch * shape.keys + key;
      const bool seen = key < query.end_key;
      const float score = seen ? shape.scale * head_dot(mine, k[row] + kv_column, width) : -INFINITY;
      const float new_top = Larger::of(top, over_lanes<Larger>(score, kWarp));
      p[lane] = seen ? expf(score - new_top) : 0;
      const float shrink = expf(top - new_top);
      total = total * shrink + warp_sum(p[lane]);
      top = new_top;
      sync_warp();
      const int count = static_cast<int>(query.end_key - first < kWarp ? query.end_key - first : kWarp);
      for (int i = lane; i < width; i += kWarp) {
        float value = sum[i] * shrink;
        for (int j = 0; j < count; ++j)
          value += p[j] * to_float(v[query.batch * shape.keys + first + j][kv_column + i]);
        sum[i] = value;
      }
      sync_warp();
    }
    for (int i = lane; i < width; i += kWarp) o[query.row][column + i] = rounded<C>(sum[i] / total);
    if (lane == 0 && lse != nullptr) lse[query.statistic] = top + logf(total);
    if (lane == 0 && maxima != nullptr) maxima[query.statistic] = top;
  }
};

// delta [batch, heads, queries] = do · o, each by neighbouring lanes of a warp.
template <class C, int W>
struct AttentionDelta {
  static constexpr int kThreads = 256;
  AttentionShape shape;
  Rows<const C> o, d_o;
  float* delta;
  int lanes;  // of a query and head: a power of two

  static int lanes_for(int head_dim) {
    int lanes = 1;
    while (lanes < kWarp && lanes * W < head_dim) lanes *= 2;
    return lanes;
  }
  HYBRIDMOE_DEVICE void operator()() const {
    const int lane = thread_index() & (lanes - 1), queries = static_cast<int>(shape.queries);
    const std::int64_t statistic = block_x() * (kThreads / lanes) + thread_index() / lanes;
    const bool active = statistic < shape.batch * shape.heads * shape.queries;
    float sum = 0;
    if (active) {
      const int i = static_cast<int>(statistic) % queries, sequence = static_cast<int>(statistic) / queries;
      const std::int64_t row = std::int64_t{sequence / shape.heads} * queries + i;
      const int column = sequence % shape.heads * shape.head_dim;
      for (int at = lane * W; at < shape.head_dim; at += lanes * W) {
        const Vector<C, W> a = load<C, W>(o[row] + column + at), b = load<C, W>(d_o[row] + column + at);
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) sum += to_float(a.value[j]) * to_float(b.value[j]);
      }
    }
    sum = over_lanes<Plus>(sum, lanes);
    if (active && lane == 0) delta[statistic] = sum;
  }
};

template <class C>
struct AttentionRowsBackwardQuery {
  static constexpr int kThreads = kAttentionWarps * kWarp;
  AttentionShape shape;
  Rows<const C> q, k, v, d_o;
  const float *lse, *delta;
  Rows<C> dq;

  HYBRIDMOE_DEVICE void operator()() const {
    const WarpQuery query(shape);
    if (!query.active) return;
    const int lane = thread_index() % kWarp, width = shape.head_dim, column = query.head * width;
    const int kv_column = shape.kv_column(query.head);
    const WarpVectors vectors(3, width);
    float *mine = vectors[0], *upstream = vectors[1], *sum = vectors[2], *ds = vectors.lanes(0);
    for (int i = lane; i < width; i += kWarp) {
      mine[i] = to_float(q[query.row][column + i]);
      upstream[i] = to_float(d_o[query.row][column + i]);
      sum[i] = 0;
    }
    sync_warp();
    for (std::int64_t first = query.first_key; first < query.end_key; first += kWarp) {
      const std::int64_t key = first + lane, row = query.batch * shape.keys + key;
      float slope = 0;
      if (key < query.end_key) {
        const float p = expf(shape.scale * head_dot(mine, k[row] + kv_column, width) - lse[query.statistic]);
        const float dp = head_dot(upstream, v[row] + kv_column, width);
        slope = shape.scale * p * (dp - delta[query.statistic]);
      }
      ds[lane] = slope;
      sync_warp();
      const int count = static_cast<int>(query.end_key - first < kWarp ? query.end_key - first : kWarp);
      for (int i = lane; i < width; i += kWarp) {
        float value = sum[i];
        for (int j = 0; j < count; ++j)
          value += ds[j] * to_float(k[query.batch * shape.keys + first + j][kv_column + i]);
        sum[i] = value;
      }
      sync_warp();
    }
    for (int i = lane; i < width; i += kWarp) dq[query.row][column + i] = rounded<C>(sum[i]);
  }
};

// A warp per key and key/value head. The backward pass has as many queries as keys.
template <class C>
struct AttentionRowsBackwardKey {
  static constexpr int kThreads = kAttentionWarps * kWarp;
  AttentionShape shape;
  Rows<const C> q, k, v, d_o;
  const float *lse, *delta;
  Rows<C> dk, dv;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t unit = block_x() * kAttentionWarps + thread_index() / kWarp;
    if (unit >= shape.batch * shape.kv_heads * shape.keys) return;
    const std::int64_t key = unit % shape.keys, batch = unit / shape.keys / shape.kv_heads;
    const int kv_head = static_cast<int>(unit / shape.keys % shape.kv_heads);
    const int lane = thread_index() % kWarp, width = shape.head_dim, kv_column = kv_head * width;
    const int group = shape.heads / shape.kv_heads;
    const std::int64_t row = batch * shape.keys + key, rows = batch * shape.queries;
    const WarpVectors vectors(4, width);
    float *mine = vectors[0], *value = vectors[1], *k_sum = vectors[2], *v_sum = vectors[3];
    float *ds = vectors.lanes(0), *p = vectors.lanes(1);
    for (int i = lane; i < width; i += kWarp) {
      mine[i] = to_float(k[row][kv_column + i]);
      value[i] = to_float(v[row][kv_column + i]);
      k_sum[i] = v_sum[i] = 0;
    }
    sync_warp();
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const int column = head * width;
      for (std::int64_t first = key; first < shape.queries; first += kWarp) {
        const std::int64_t i = first + lane;
        p[lane] = ds[lane] = 0;
        if (i < shape.queries && shape.first_key(rows + i) <= key) {
          const std::int64_t statistic = (batch * shape.heads + head) * shape.queries + i;
          const float share =
              expf(shape.scale * head_dot(mine, q[rows + i] + column, width) - lse[statistic]);
          const float dp = head_dot(value, d_o[rows + i] + column, width);
          p[lane] = share;
          ds[lane] = shape.scale * share * (dp - delta[statistic]);
        }
        sync_warp();
        const int count = static_cast<int>(shape.queries - first < kWarp ? shape.queries - first : kWarp);
        for (int e = lane; e < width; e += kWarp) {
          float dk_value = k_sum[e], dv_value = v_sum[e];
          for (int j = 0; j < count; ++j) {
            dk_value += ds[j] * to_float(q[rows + first + j][column + e]);
            dv_value += p[j] * to_float(d_o[rows + first + j][column + e]);
          }
          k_sum[e] = dk_value;
          v_sum[e] = dv_value;
        }
        sync_warp();
      }
    }
    for (int e = lane; e < width; e += kWarp) {
      dk[row][kv_column + e] = rounded<C>(k_sum[e]);
      dv[row][kv_column + e] = rounded<C>(v_sum[e]);
    }
  }
};

}  // namespace hybridmoe::cuda
