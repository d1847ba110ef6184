// Attention in bf16 by mma.sync, tiles with online softmax (arXiv 2205.14135, 2307.08691). A warp has 16 rows
// of a block's tile and everything that belongs to them in registers, so that nothing is summed between
// warps, and no order depends on timing. The backward pass goes over the scores twice: by queries for dq, by
// keys for dk and dv.
#pragma once

#include <cmath>

#include "core/cuda/attention_rows.h"

namespace hybridmoe::cuda {

// Rows of one head in shared memory, D elements each, their 16-byte chunks where load_matrices reads them
// without bank conflicts.
template <int D>
struct HeadTile {
  static_assert(D == 32 || D == 64 || D == 128);
  static constexpr int kChunk = 8, kChunks = D / kChunk;
  BFloat16* data;

  HYBRIDMOE_DEVICE BFloat16* at(int row, int chunk) const {
    const int turn = kChunks == 4 ? row >> 1 & 3 : row & 7;
    return data + row * D + (chunk ^ turn) * kChunk;
  }
  // Starts copies of rows first .. first + rows; those from `end` on become zero.
  template <int kThreads>
  HYBRIDMOE_DEVICE void start(const Rows<const BFloat16>& from, std::int64_t base, std::int64_t first,
                              std::int64_t end, int column, int rows) const {
    for (int i = thread_index(); i < rows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool inside = first + row < end;
      start_copy(at(row, chunk), inside ? from[base + first + row] + column + chunk * kChunk : nullptr);
    }
  }
  // Fragments of multiply_add: rows row .. row + 16, columns k .. k + 16 as its a.
  HYBRIDMOE_DEVICE void left(int row, int k, std::uint32_t (&to)[4]) const {
    const int lane = thread_index() % kWarp;
    load_matrices(at(row + lane % 16, k / kChunk + lane / 16), to);
  }
  // Rows n .. n + 16 as two b's side by side, columns k .. k + 16 as their inner dimension.
  HYBRIDMOE_DEVICE void right(int n, int k, std::uint32_t (&to)[4]) const {
    const int lane = thread_index() % kWarp;
    load_matrices(at(n + lane % 8 + lane / 16 * 8, k / kChunk + lane / 8 % 2), to);
  }
  // The same with rows k .. k + 16 as the inner dimension and columns n .. n + 16.
  HYBRIDMOE_DEVICE void right_transposed(int k, int n, std::uint32_t (&to)[4]) const {
    const int lane = thread_index() % kWarp;
    load_matrices_transposed(at(k + lane % 16, n / kChunk + lane / 16), to);
  }
};

// sum [16, kN] += rows `row` .. of a · rows of b, transposed.
template <int D, int kN>
HYBRIDMOE_DEVICE void multiply_rows(const HeadTile<D>& a, int row, const HeadTile<D>& b,
                                    float (&sum)[kN / 8][4]) {
  HYBRIDMOE_UNROLL
  for (int k = 0; k < D; k += 16) {
    std::uint32_t left[4];
    a.left(row, k, left);
    HYBRIDMOE_UNROLL
    for (int n = 0; n < kN; n += 16) {
      std::uint32_t right[4];
      b.right(n, k, right);
      multiply_add(left, right[0], right[1], sum[n / 8]);
      multiply_add(left, right[2], right[3], sum[n / 8 + 1]);
    }
  }
}
// sum [16, D] += a [16, kK] · rows of b, a in the fragments of a sum.
template <int D, int kK>
HYBRIDMOE_DEVICE void multiply_sums(const float (&a)[kK / 8][4], const HeadTile<D>& b,
                                    float (&sum)[D / 8][4]) {
  HYBRIDMOE_UNROLL
  for (int k = 0; k < kK; k += 16) {
    const auto &first = a[k / 8], &second = a[k / 8 + 1];
    const std::uint32_t left[4] = {packed(first[0], first[1]), packed(first[2], first[3]),
                                   packed(second[0], second[1]), packed(second[2], second[3])};
    HYBRIDMOE_UNROLL
    for (int n = 0; n < D; n += 16) {
      std::uint32_t right[4];
      b.right_transposed(k, n, right);
      multiply_add(left, right[0], right[1], sum[n / 8]);
      multiply_add(left, right[2], right[3], sum[n / 8 + 1]);
    }
  }
}

// Rows of a sum [16, D] to memory, times a factor for each of the lane's two rows.
template <int D>
HYBRIDMOE_DEVICE void write_rows(const float (&sum)[D / 8][4], float factor, float factor_below,
                                 const Rows<BFloat16>& to, std::int64_t row, std::int64_t end, int column) {
  const int lane = thread_index() % kWarp;
  HYBRIDMOE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const std::int64_t at = row + lane / 4 + 8 * half;
    if (at >= end) continue;
    const float by = half == 0 ? factor : factor_below;
    HYBRIDMOE_UNROLL
    for (int n = 0; n < D / 8; ++n) {
      const std::uint32_t pair = packed(by * sum[n][2 * half], by * sum[n][2 * half + 1]);
      *reinterpret_cast<std::uint32_t*>(to[at] + column + 8 * n + 2 * (lane % 4)) = pair;
    }
  }
}

// Tiles of two matrices side by side, keys and values or queries and output gradients, in a ring of stages
// that asynchronous copies fill.
template <int D, int kRows, int kThreads>
struct TilePairs {
  static constexpr int kStages = 2, kElements = 2 * kStages * kRows * D;
  BFloat16* memory;
  Rows<const BFloat16> first, second;
  std::int64_t base, end;  // of the sequence: its row 0, and how many it has

  HYBRIDMOE_DEVICE HeadTile<D> tile(int step, int which) const {
    return {memory + (2 * (step % kStages) + which) * kRows * D};
  }
  // A group of copies: rows `row` .. of both, or nothing beyond the last step.
  HYBRIDMOE_DEVICE void start(int step, int steps, std::int64_t row, int column) const {
    if (step < steps) {
      tile(step, 0).template start<kThreads>(first, base, row, end, column, kRows);
      tile(step, 1).template start<kThreads>(second, base, row, end, column, kRows);
    }
    commit_copies();
  }
};

constexpr float kLog2E = 1.4426950408889634f;

// The queries of a block: kQueries of one head, the last ones first, since they see the most keys.
template <int kQueries>
struct QueryBlock {
  std::int64_t batch, first, rows;  // first query of the block, first row of the sequence
  int head, kv_head;
  std::int64_t begin_key, end_key;  // that any of its queries sees

  HYBRIDMOE_DEVICE explicit QueryBlock(const AttentionShape& s) {
    head = static_cast<int>(block_y() % s.heads);
    batch = block_y() / s.heads;
    kv_head = head * s.kv_heads / s.heads;
    first = (grid_x() - 1 - block_x()) * kQueries;
    rows = batch * s.queries;
    const std::int64_t last = first + kQueries < s.queries ? first + kQueries : s.queries;
    end_key = s.first_query + last;
    begin_key = 0;
    if (s.doc_start == nullptr) return;
    float earliest = -INFINITY;  // the largest of negatives; positions are below 2^24
    for (std::int64_t i = first + thread_index() % kWarp; i < last; i += kWarp)
      earliest = Larger::of(earliest, -static_cast<float>(s.doc_start[rows + i]));
    begin_key = static_cast<std::int64_t>(-over_lanes<Larger>(earliest, kWarp));
  }
};

// Whether a query sees a key, for the lane's two rows of a warp's sum.
struct Sight {
  std::int64_t position[2], doc_start[2];

  HYBRIDMOE_DEVICE Sight(const AttentionShape& s, std::int64_t rows, std::int64_t first) {
    for (int half = 0; half < 2; ++half) {
      const std::int64_t i = first + thread_index() % kWarp / 4 + 8 * half;
      position[half] = s.first_query + i;
      doc_start[half] = i < s.queries ? s.first_key(rows + i) : 0;
    }
  }
  HYBRIDMOE_DEVICE bool sees(int half, std::int64_t key) const {
    return key <= position[half] && key >= doc_start[half];
  }
};

template <int D>
struct AttentionTilesForward {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kQueries = 16 * kWarps, kKeys = 64;
  using Pairs = TilePairs<D, kKeys, kThreads>;
  AttentionShape shape;
  Rows<const BFloat16> q, k, v;
  Rows<BFloat16> o;
  float* lse;     // null: not wanted
  float* maxima;  // of every block, null: not wanted

  static constexpr std::size_t kSharedBytes = (kQueries * D + Pairs::kElements) * sizeof(BFloat16);

  HYBRIDMOE_DEVICE void operator()() const {
    const QueryBlock<kQueries> block(shape);
    const int lane = thread_index() % kWarp, row = thread_index() / kWarp * 16;
    const int column = block.head * D, kv_column = block.kv_head * D;
    auto* memory = shared_memory<BFloat16>();
    const HeadTile<D> queries{memory};
    const std::int64_t begin = block.begin_key / kKeys * kKeys;
    const auto steps = static_cast<int>((block.end_key - begin + kKeys - 1) / kKeys);
    const auto first_of = [&](int step) { return begin + static_cast<std::int64_t>(step) * kKeys; };
    const Pairs pairs{memory + kQueries * D, k, v, block.batch * shape.keys, shape.keys};
    const auto start = [&](int step) { pairs.start(step, steps, first_of(step), kv_column); };
    queries.template start<kThreads>(q, block.rows, block.first, shape.queries, column, kQueries);
    start(0);
    const Sight sight(shape, block.rows, block.first + row);
    const float unit = shape.scale * kLog2E;
    float sum[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    for (int step = 0; step < steps; ++step) {
      start(step + 1);
      wait_for_copies<1>();
      sync_block();
      const std::int64_t first = first_of(step);
      float score[kKeys / 8][4] = {};
      multiply_rows<D, kKeys>(queries, row, pairs.tile(step, 0), score);
      HYBRIDMOE_UNROLL
      for (int n = 0; n < kKeys / 8; ++n) {
        HYBRIDMOE_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (!sight.sees(i / 2, first + 8 * n + 2 * (lane % 4) + i % 2)) score[n][i] = -INFINITY;
        }
      }
      HYBRIDMOE_UNROLL
      for (int half = 0; half < 2; ++half) {
        float most = top[half];
        HYBRIDMOE_UNROLL
        for (int n = 0; n < kKeys / 8; ++n)
          most = Larger::of(Larger::of(most, score[n][2 * half]), score[n][2 * half + 1]);
        most = over_lanes<Larger>(most, 4);
        // A row that has seen no key yet: all its powers are to become 0.
        const float base = most == -INFINITY ? 0 : most;
        const float shrink = power_of_two((top[half] - base) * unit);
        top[half] = most;
        float added = 0;
        HYBRIDMOE_UNROLL
        for (int n = 0; n < kKeys / 8; ++n) {
          HYBRIDMOE_UNROLL
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            score[n][i] = power_of_two((score[n][i] - base) * unit);
            added += score[n][i];
          }
        }
        total[half] = total[half] * shrink + added;
        HYBRIDMOE_UNROLL
        for (int n = 0; n < D / 8; ++n) sum[n][2 * half] *= shrink, sum[n][2 * half + 1] *= shrink;
      }
      multiply_sums<D, kKeys>(score, pairs.tile(step, 1), sum);
      sync_block();  // the next copies overwrite this stage
    }
    wait_for_copies<0>();
    HYBRIDMOE_UNROLL
    for (int half = 0; half < 2; ++half) {
      total[half] = over_lanes<Plus>(total[half], 4);
      const std::int64_t i = block.first + row + lane / 4 + 8 * half;
      if (i >= shape.queries) {
        top[half] = -INFINITY;
      } else if (lane % 4 == 0 && lse != nullptr) {
        lse[block_y() * shape.queries + i] = top[half] * shape.scale + logf(total[half]);
      }
    }
    if (maxima != nullptr) {
      // Every warp is done with the queries' tile.
      const float most = over_block<Larger>(Larger::of(top[0], top[1]), shared_memory<float>());
      if (thread_index() == 0) maxima[block_y() * grid_x() + block_x()] = most * shape.scale;
    }
    write_rows<D>(sum, 1 / total[0], 1 / total[1], o, block.rows + block.first + row,
                  block.rows + shape.queries, column);
  }
};

template <int D>
struct AttentionTilesBackwardQuery {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kQueries = 16 * kWarps, kKeys = 64;
  using Pairs = TilePairs<D, kKeys, kThreads>;
  AttentionShape shape;
  Rows<const BFloat16> q, k, v, d_o;
  const float *lse, *delta;
  Rows<BFloat16> dq;

  static constexpr std::size_t kSharedBytes = (2 * kQueries * D + Pairs::kElements) * sizeof(BFloat16);

  HYBRIDMOE_DEVICE void operator()() const {
    const QueryBlock<kQueries> block(shape);
    const int lane = thread_index() % kWarp, row = thread_index() / kWarp * 16;
    const int column = block.head * D, kv_column = block.kv_head * D;
    auto* memory = shared_memory<BFloat16>();
    const HeadTile<D> queries{memory}, upstream{memory + kQueries * D};
    const std::int64_t begin = block.begin_key / kKeys * kKeys;
    const auto steps = static_cast<int>((block.end_key - begin + kKeys - 1) / kKeys);
    const auto first_of = [&](int step) { return begin + static_cast<std::int64_t>(step) * kKeys; };
    const Pairs pairs{memory + 2 * kQueries * D, k, v, block.batch * shape.keys, shape.keys};
    const auto start = [&](int step) { pairs.start(step, steps, first_of(step), kv_column); };
    queries.template start<kThreads>(q, block.rows, block.first, shape.queries, column, kQueries);
    upstream.template start<kThreads>(d_o, block.rows, block.first, shape.queries, column, kQueries);
    start(0);
    const Sight sight(shape, block.rows, block.first + row);
    float log_sum[2], product[2];
    for (int half = 0; half < 2; ++half) {
      const std::int64_t i = block.first + row + lane / 4 + 8 * half;
      const bool inside = i < shape.queries;
      log_sum[half] = inside ? lse[block_y() * shape.queries + i] * kLog2E : 0;
      product[half] = inside ? delta[block_y() * shape.queries + i] : 0;
    }
    const float unit = shape.scale * kLog2E;
    float sum[D / 8][4] = {};
    for (int step = 0; step < steps; ++step) {
      start(step + 1);
      wait_for_copies<1>();
      sync_block();
      const std::int64_t first = first_of(step);
      float score[kKeys / 8][4] = {}, slope[kKeys / 8][4] = {};
      multiply_rows<D, kKeys>(queries, row, pairs.tile(step, 0), score);
      multiply_rows<D, kKeys>(upstream, row, pairs.tile(step, 1), slope);
      HYBRIDMOE_UNROLL
      for (int n = 0; n < kKeys / 8; ++n) {
        HYBRIDMOE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const bool seen = sight.sees(i / 2, first + 8 * n + 2 * (lane % 4) + i % 2);
          const float p = seen ? power_of_two(score[n][i] * unit - log_sum[i / 2]) : 0;
          slope[n][i] = p * (slope[n][i] - product[i / 2]);
        }
      }
      multiply_sums<D, kKeys>(slope, pairs.tile(step, 0), sum);
      sync_block();
    }
    wait_for_copies<0>();
    write_rows<D>(sum, shape.scale, shape.scale, dq, block.rows + block.first + row,
                  block.rows + shape.queries, column);
  }
};

// A block has kKeys keys of one key/value head and goes over the queries of every head that reads it. As many
// queries as keys.
template <int D>
struct AttentionTilesBackwardKey {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kKeys = 16 * kWarps, kQueries = 32;
  using Pairs = TilePairs<D, kQueries, kThreads>;
  AttentionShape shape;
  Rows<const BFloat16> q, k, v, d_o;
  const float *lse, *delta;
  Rows<BFloat16> dk, dv;

  static constexpr std::size_t kSharedBytes = (2 * kKeys * D + Pairs::kElements) * sizeof(BFloat16);

  HYBRIDMOE_DEVICE void operator()() const {
    const int lane = thread_index() % kWarp, row = thread_index() / kWarp * 16;
    const int kv_head = static_cast<int>(block_y() % shape.kv_heads), group = shape.heads / shape.kv_heads;
    const std::int64_t batch = block_y() / shape.kv_heads, rows = batch * shape.queries;
    const std::int64_t first_key = block_x() * kKeys, key_rows = batch * shape.keys;
    auto* memory = shared_memory<BFloat16>();
    const HeadTile<D> keys{memory}, values{memory + kKeys * D};
    // Only queries from the first key on see any of these keys.
    const std::int64_t begin = first_key / kQueries * kQueries;
    const auto per_head = static_cast<int>((shape.queries - begin + kQueries - 1) / kQueries);
    const int steps = per_head * group;
    const auto head_of = [&](int step) { return kv_head * group + step / per_head; };
    const auto first_of = [&](int step) {
      return begin + static_cast<std::int64_t>(step % per_head) * kQueries;
    };
    const Pairs pairs{memory + 2 * kKeys * D, q, d_o, rows, shape.queries};
    const auto start = [&](int step) { pairs.start(step, steps, first_of(step), head_of(step) * D); };
    keys.template start<kThreads>(k, key_rows, first_key, shape.keys, kv_head * D, kKeys);
    values.template start<kThreads>(v, key_rows, first_key, shape.keys, kv_head * D, kKeys);
    start(0);
    const float unit = shape.scale * kLog2E;
    float dk_sum[D / 8][4] = {}, dv_sum[D / 8][4] = {};
    for (int step = 0; step < steps; ++step) {
      start(step + 1);
      wait_for_copies<1>();
      sync_block();
      const std::int64_t first = first_of(step),
                         statistics = (batch * shape.heads + head_of(step)) * shape.queries;
      float score[kQueries / 8][4] = {}, slope[kQueries / 8][4] = {};
      multiply_rows<D, kQueries>(keys, row, pairs.tile(step, 0), score);
      multiply_rows<D, kQueries>(values, row, pairs.tile(step, 1), slope);
      HYBRIDMOE_UNROLL
      for (int n = 0; n < kQueries / 8; ++n) {
        HYBRIDMOE_UNROLL
        for (int j = 0; j < 2; ++j) {
          const std::int64_t i = first + 8 * n + 2 * (lane % 4) + j;
          const bool inside = i < shape.queries;
          const float log_sum = inside ? lse[statistics + i] * kLog2E : 0;
          const float product = inside ? delta[statistics + i] : 0;
          const std::int64_t doc_start = inside ? shape.first_key(rows + i) : 0;
          HYBRIDMOE_UNROLL
          for (int half = 0; half < 2; ++half) {
            const std::int64_t key = first_key + row + lane / 4 + 8 * half;
            const bool seen = inside && key <= i && key >= doc_start;
            const int at = 2 * half + j;
            const float p = seen ? power_of_two(score[n][at] * unit - log_sum) : 0;
            slope[n][at] = p * (slope[n][at] - product);
            score[n][at] = p;
          }
        }
      }
      multiply_sums<D, kQueries>(score, pairs.tile(step, 1), dv_sum);
      multiply_sums<D, kQueries>(slope, pairs.tile(step, 0), dk_sum);
      sync_block();
    }
    wait_for_copies<0>();
    const std::int64_t at = key_rows + first_key + row, end = key_rows + shape.keys;
    write_rows<D>(dk_sum, shape.scale, shape.scale, dk, at, end, kv_head * D);
    write_rows<D>(dv_sum, 1, 1, dv, at, end, kv_head * D);
  }
};

}  // namespace hybridmoe::cuda
