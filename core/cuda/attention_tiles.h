// Attention in bf16 by mma.sync, tiles with online softmax (arXiv 2205.14135, 2307.08691). A warp has its
// rows of a block's tile and everything that belongs to them in registers, so that nothing is summed between
// warps, and no order depends on timing. The backward pass (attention_tiles_backward.h) goes over the scores
// twice: by queries for dq, by keys for dk and dv.
#pragma once

#include <climits>
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

  static HYBRIDMOE_DEVICE int turn(int row) { return kChunks == 4 ? row >> 1 & 3 : row & 7; }
  HYBRIDMOE_DEVICE BFloat16* at(int row, int chunk) const {
    return data + row * D + (chunk ^ turn(row)) * kChunk;
  }
  // at(row + lane_row, chunk + lane_chunk) where 8 divides row and 2 divides chunk, and the whole warp has
  // them in common: written so that calls with other constants for them differ by constants or few values.
  HYBRIDMOE_DEVICE BFloat16* at(int row, int lane_row, int chunk, int lane_chunk) const {
    const int turned = (chunk & 7) ^ (lane_chunk ^ turn(lane_row));
    return data + (lane_row * D + turned * kChunk) + (row * D + (chunk & ~7) * kChunk);
  }
  // The tile from a row on that 8 divides.
  HYBRIDMOE_DEVICE HeadTile from(int row) const { return {data + row * D}; }
  // Starts copies of rows first .. first + kRows; those from `end` on become zero. A thread copies one
  // column, so that little changes from one copy to the next.
  template <int kRows, int kThreads>
  HYBRIDMOE_DEVICE void start_rows(const Rows<const BFloat16>& matrix, int first, int end, int column) const {
    constexpr int kStep = kThreads / kChunks;  // rows that the threads have at once
    static_assert(kStep % 8 == 0 && kRows % kStep == 0);
    const int thread = computed_again(thread_index());  // a loop's registers are for sums
    const int row = thread / kChunks, chunk = thread % kChunks, left = end - first - row;
    const BFloat16* from = matrix[first + row] + column + chunk * kChunk;
    HYBRIDMOE_UNROLL
    for (int i = 0; i < kRows; i += kStep, from += kStep * matrix.stride)
      start_copy_if(i < left, at(i, row, 0, chunk), from);
  }
  // Fragments of multiply_add: rows row .. row + 16, columns k .. k + 16 as its a.
  HYBRIDMOE_DEVICE void left(int row, int k, std::uint32_t (&to)[4]) const {
    const int lane = thread_index() % kWarp;
    load_matrices(at(row, lane % 16, k / kChunk, lane / 16), to);
  }
  // Rows n .. n + 16 as two b's side by side, columns k .. k + 16 as their inner dimension.
  HYBRIDMOE_DEVICE void right(int n, int k, std::uint32_t (&to)[4]) const {
    const int lane = thread_index() % kWarp;
    load_matrices(at(n, lane % 8 + lane / 16 * 8, k / kChunk, lane / 8 % 2), to);
  }
  // The same with rows k .. k + 16 as the inner dimension and columns n .. n + 16.
  HYBRIDMOE_DEVICE void right_transposed(int k, int n, std::uint32_t (&to)[4]) const {
    const int lane = thread_index() % kWarp;
    load_matrices_transposed(at(k, lane % 16, n / kChunk, lane / 16), to);
  }
};

// What a warp has of a matrix with 16 · kTiles rows and kN columns, in the fragments of multiply_add's sum.
template <int kTiles, int kN>
using WarpSum = float[kTiles][kN / 8][4];

// sum += rows of a · rows of b, transposed. Every fragment of b serves all kTiles of a.
template <int kN, int D, int kTiles>
HYBRIDMOE_DEVICE void multiply_rows(const HeadTile<D>& a, const HeadTile<D>& b, WarpSum<kTiles, kN>& sum) {
  // In rounds: with all of them unrolled, reads that the compiler moves ahead fill the registers.
  constexpr int kRound = D < 64 ? D : 64;
  HYBRIDMOE_ROLLED
  for (int round = 0; round < D; round += kRound) {
    HYBRIDMOE_UNROLL
    for (int k = round; k < round + kRound; k += 16) {
      std::uint32_t left[kTiles][4];
      HYBRIDMOE_UNROLL
      for (int t = 0; t < kTiles; ++t) a.left(16 * t, k, left[t]);
      HYBRIDMOE_UNROLL
      for (int n = 0; n < kN; n += 16) {
        std::uint32_t right[4];
        b.right(n, k, right);
        HYBRIDMOE_UNROLL
        for (int t = 0; t < kTiles; ++t) {
          multiply_add(left[t], right[0], right[1], sum[t][n / 8]);
          multiply_add(left[t], right[2], right[3], sum[t][n / 8 + 1]);
        }
      }
    }
  }
}
// sum [.., D] += a [.., kK] · rows of b.
template <int kK, int D, int kTiles>
HYBRIDMOE_DEVICE void multiply_sums(const WarpSum<kTiles, kK>& a, const HeadTile<D>& b,
                                    WarpSum<kTiles, D>& sum) {
  HYBRIDMOE_UNROLL
  for (int k = 0; k < kK; k += 16) {
    std::uint32_t left[kTiles][4];
    HYBRIDMOE_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      HYBRIDMOE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const auto& eight = a[t][k / 8 + i / 2];
        left[t][i] = packed(eight[i % 2 * 2], eight[i % 2 * 2 + 1]);
      }
    }
    HYBRIDMOE_UNROLL
    for (int n = 0; n < D; n += 16) {
      std::uint32_t right[4];
      b.right_transposed(k, n, right);
      HYBRIDMOE_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        multiply_add(left[t], right[0], right[1], sum[t][n / 8]);
        multiply_add(left[t], right[2], right[3], sum[t][n / 8 + 1]);
      }
    }
  }
}

// The rows row .. of a sum that are below end to memory, each times its factor.
template <int D, int kTiles>
HYBRIDMOE_DEVICE void write_rows(const WarpSum<kTiles, D>& sum, const float (&factor)[kTiles][2],
                                 const Rows<BFloat16>& to, std::int64_t row, std::int64_t end, int column) {
  const int lane = thread_index() % kWarp;
  HYBRIDMOE_UNROLL
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int tile = i / 2, half = i % 2;
    const std::int64_t at = row + 16 * tile + 8 * half + lane / 4;
    if (at >= end) continue;
    HYBRIDMOE_UNROLL
    for (int n = 0; n < D / 8; ++n) {
      const float* pair = sum[tile][n] + 2 * half;
      *reinterpret_cast<std::uint32_t*>(to[at] + column + 8 * n + 2 * (lane % 4)) =
          packed(factor[tile][half] * pair[0], factor[tile][half] * pair[1]);
    }
  }
}

// Rows of one sequence of two matrices, keys and values or queries and output gradients, in a ring of stages
// that asynchronous copies fill.
template <int D, int kRows, int kThreads>
struct TilePairs {
  static constexpr int kStages = 2, kElements = 2 * kStages * kRows * D;
  BFloat16* memory;
  const Rows<const BFloat16>&first, &second;
  int base, end;  // of the sequence, among the matrices' rows

  HYBRIDMOE_DEVICE HeadTile<D> tile(int step, int which) const {
    return {memory + (2 * (step % kStages) + which) * kRows * D};
  }
  // A group of copies: rows `row` .. of the sequence of both, or none.
  HYBRIDMOE_DEVICE void start(bool any, int step, int row, int column) const {
    if (any) {
      tile(step, 0).template start_rows<kRows, kThreads>(first, base + row, end, column);
      tile(step, 1).template start_rows<kRows, kThreads>(second, base + row, end, column);
    }
    commit_copies();
  }
};

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The queries of a block: kQueries of one head, the last ones first, since they see the most keys. Positions
// are below 2^24.
template <int kQueries>
struct QueryBlock {
  int queries, keys, rows, key_rows;  // of the sequence, and its first rows
  int head, kv_head;
  int first;               // query
  int begin_key, end_key;  // that any of its queries sees

  HYBRIDMOE_DEVICE explicit QueryBlock(const AttentionShape& s) {
    head = static_cast<int>(block_y() % s.heads);
    const int batch = static_cast<int>(block_y() / s.heads);
    queries = static_cast<int>(s.queries), keys = static_cast<int>(s.keys);
    kv_head = head * s.kv_heads / s.heads;
    first = static_cast<int>(grid_x() - 1 - block_x()) * kQueries;
    rows = batch * queries, key_rows = batch * keys;
    const int last = first + kQueries < queries ? first + kQueries : queries;
    end_key = static_cast<int>(s.first_query) + last;
    begin_key = 0;
    if (s.doc_start == nullptr) return;
    int negative = INT_MIN;  // the largest of negatives
    for (int i = first + thread_index() % kWarp; i < last; i += kWarp)
      negative = Larger::of(negative, -s.doc_start[rows + i]);
    begin_key = -over_lanes<Larger>(negative, kWarp);
  }
};

// Which keys the queries of a warp's sum see: 16 · kTiles queries from `query` on. Most tiles of keys are
// seen by all of them or by none.
template <int kTiles>
struct Sight {
  const AttentionShape& shape;
  int rows, query, latest = 0, earliest = 0;  // of their documents' starts

  HYBRIDMOE_DEVICE Sight(const AttentionShape& s, int first_row, int first_query)
      : shape(s), rows(first_row), query(first_query) {
    int negative = INT_MIN;
    for (int i = thread_index() % kWarp; i < 16 * kTiles; i += kWarp) {
      latest = Larger::of(latest, doc_start(i));
      negative = Larger::of(negative, -doc_start(i));
    }
    latest = over_lanes<Larger>(latest, kWarp);
    earliest = -over_lanes<Larger>(negative, kWarp);
  }
  HYBRIDMOE_DEVICE bool none(int first, int keys) const {
    return first > position() + 16 * kTiles - 1 || first + keys <= earliest;
  }
  HYBRIDMOE_DEVICE bool all(int first, int keys) const {
    return first + keys - 1 <= position() && first >= latest;
  }
  // The scores of keys that a query does not see become those of no weight.
  template <int kKeys>
  HYBRIDMOE_DEVICE void hide(int first, WarpSum<kTiles, kKeys>& score) const {
    const int key = first + 2 * (thread_index() % 4);
    HYBRIDMOE_UNROLL
    for (int t = 0; t < 2 * kTiles; ++t) {
      const int mine = thread_index() % kWarp / 4 + 8 * t;
      const int last = position() + mine - key, start = doc_start(mine) - key;
      HYBRIDMOE_UNROLL
      for (int i = 0; i < kKeys / 4; ++i) {
        const int offset = i / 2 * 8 + i % 2;
        if (offset > last || offset < start) score[t / 2][i / 2][t % 2 * 2 + i % 2] = -INFINITY;
      }
    }
  }

 private:
  HYBRIDMOE_DEVICE int position() const { return static_cast<int>(shape.first_query) + query; }
  // Of the i-th query; those after the last one see nothing.
  HYBRIDMOE_DEVICE int doc_start(int i) const {
    const int at = query + i;
    return at < static_cast<int>(shape.queries) ? static_cast<int>(shape.first_key(rows + at)) : INT_MAX;
  }
};

template <int D>
struct AttentionTilesForward {
  // Two tiles of queries a warp: every fragment of keys and values that it reads serves both. With one,
  // shared memory is busier than the tensor cores.
  static constexpr int kTiles = 2, kWarps = 4, kThreads = kWarps * kWarp, kBlocksPerProcessor = 2;
  static constexpr int kQueries = 16 * kTiles * kWarps, kKeys = 64;
  using Pairs = TilePairs<D, kKeys, kThreads>;
  AttentionShape shape;
  Rows<const BFloat16> q, k, v;
  Rows<BFloat16> o;
  float* lse;     // null: not wanted
  float* maxima;  // of every block, null: not wanted

  static constexpr std::size_t kSharedBytes = (kQueries * D + Pairs::kElements) * sizeof(BFloat16);

  HYBRIDMOE_DEVICE void operator()() const {
    const QueryBlock<kQueries> block(shape);
    const int row = thread_index() / kWarp * 16 * kTiles, kv_column = block.kv_head * D;
    auto* memory = shared_memory<BFloat16>();
    const HeadTile<D> queries{memory};
    const Pairs pairs{memory + kQueries * D, k, v, block.key_rows, block.key_rows + block.keys};
    queries.template start_rows<kQueries, kThreads>(q, block.rows + block.first, block.rows + block.queries,
                                                    block.head * D);
    int first = block.begin_key / kKeys * kKeys;
    pairs.start(true, 0, first, kv_column);
    const Sight<kTiles> sight(shape, block.rows, block.first + row);
    WarpSum<kTiles, D> sum = {};
    PerRow top, total = {};  // the largest exponent of two, the sum of the powers
    for (int i = 0; i < 2 * kTiles; ++i) top[i / 2][i % 2] = -INFINITY;
    for (int step = 0; first < block.end_key; ++step, first += kKeys) {
      pairs.start(first + kKeys < block.end_key, step + 1, first + kKeys, kv_column);
      wait_for_copies<1>();
      sync_block();
      if (!sight.none(first, kKeys)) {
        WarpSum<kTiles, kKeys> score = {};
        multiply_rows<kKeys>(queries.from(row), pairs.tile(step, 0), score);
        if (!sight.all(first, kKeys)) sight.template hide<kKeys>(first, score);
        raise(score, top, total, sum);
        add(score, top, total);
        multiply_sums<kKeys>(score, pairs.tile(step, 1), sum);
      }
      sync_block();  // the next copies overwrite this stage
    }
    wait_for_copies<0>();
    finish(block, row, top, total, sum);
  }

 private:
  using PerRow = float[kTiles][2];  // of the rows that a lane has parts of

  // Raises top to the largest score so far, and brings what has been summed to its scale. Later on most tiles
  // raise few rows.
  HYBRIDMOE_DEVICE void raise(const WarpSum<kTiles, kKeys>& score, PerRow& top, PerRow& total,
                              WarpSum<kTiles, D>& sum) const {
    PerRow shrink;
    bool raised = false;
    HYBRIDMOE_UNROLL
    for (int t = 0; t < 2 * kTiles; ++t) {
      const int tile = t / 2, half = t % 2;
      float most = -INFINITY;
      HYBRIDMOE_UNROLL
      for (int i = 0; i < kKeys / 4; ++i) most = fmaxf(most, score[tile][i / 2][2 * half + i % 2]);
      most = fmaxf(most, shuffle_xor(most, 2));
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(top[tile][half], most * unit());
      shrink[tile][half] = power_of_two(top[tile][half] - base_of(most));
      raised |= most != top[tile][half];
      top[tile][half] = most;
    }
    if (ballot(raised) == 0) return;
    HYBRIDMOE_UNROLL
    for (int t = 0; t < 2 * kTiles; ++t) {
      const int tile = t / 2, half = t % 2;
      total[tile][half] *= shrink[tile][half];
      HYBRIDMOE_UNROLL
      for (int i = 0; i < D / 4; ++i) sum[tile][i / 2][2 * half + i % 2] *= shrink[tile][half];
    }
  }
  // Scores become powers. Maxima pass over NaN, but its power is NaN, and so are then the row's sums.
  HYBRIDMOE_DEVICE void add(WarpSum<kTiles, kKeys>& score, const PerRow& top, PerRow& total) const {
    HYBRIDMOE_UNROLL
    for (int t = 0; t < 2 * kTiles; ++t) {
      const float base = base_of(top[t / 2][t % 2]);
      float added = 0;
      HYBRIDMOE_UNROLL
      for (int i = 0; i < kKeys / 4; ++i) {
        float& value = score[t / 2][i / 2][t % 2 * 2 + i % 2];
        value = power_of_two(value * unit() - base);
        added += value;
      }
      total[t / 2][t % 2] += added;
    }
  }
  HYBRIDMOE_DEVICE float unit() const { return shape.scale * kLog2E; }
  // Of a row that has seen no key yet: all its powers are to become 0.
  static HYBRIDMOE_DEVICE float base_of(float top) { return top == -INFINITY ? 0 : top; }

  HYBRIDMOE_DEVICE void finish(const QueryBlock<kQueries>& block, int row, const PerRow& top,
                               const PerRow& total, const WarpSum<kTiles, D>& sum) const {
    const int lane = thread_index() % kWarp;
    float largest = -INFINITY, share[kTiles][2];
    HYBRIDMOE_UNROLL
    for (int t = 0; t < 2 * kTiles; ++t) {
      const float all = over_lanes<Plus>(total[t / 2][t % 2], 4);
      share[t / 2][t % 2] = 1 / all;
      const int i = block.first + row + lane / 4 + 8 * t;
      const bool inside = i < block.queries;
      const float most = top[t / 2][t % 2] * kLn2;
      largest = Larger::of(largest, inside ? most : -INFINITY);
      if (inside && lane % 4 == 0 && lse != nullptr) lse[block_y() * shape.queries + i] = most + logf(all);
    }
    if (maxima != nullptr) {
      // Every warp is done with the queries' tile.
      largest = over_block<Larger>(largest, shared_memory<float>());
      if (thread_index() == 0) maxima[block_y() * grid_x() + block_x()] = largest;
    }
    write_rows<D>(sum, share, o, block.rows + block.first + row, block.rows + shape.queries, block.head * D);
  }
};

}  // namespace hybridmoe::cuda
