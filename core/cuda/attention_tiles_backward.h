// The backward pass of attention_tiles.h: once by queries for dq, once by keys for dk and dv.
#pragma once

#include "core/cuda/attention_tiles.h"

namespace hybridmoe::cuda {

template <int D>
struct AttentionTilesBackwardQuery {
  static constexpr int kTiles = 2, kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kQueries = 16 * kTiles * kWarps, kKeys = 32;
  using Pairs = TilePairs<D, kKeys, kThreads>;
  AttentionShape shape;
  Rows<const BFloat16> q, k, v, d_o;
  const float *lse, *delta;
  Rows<BFloat16> dq;

  using Statistics = Vector<float, 2>;  // of a query: lse as a power of two, delta
  static constexpr std::size_t kSharedBytes =
      (2 * kQueries * D + Pairs::kElements) * sizeof(BFloat16) + kQueries * sizeof(Statistics);

  HYBRIDMOE_DEVICE void operator()() const {
    const QueryBlock<kQueries> block(shape);
    const int lane = thread_index() % kWarp, row = thread_index() / kWarp * 16 * kTiles;
    const int column = block.head * D, kv_column = block.kv_head * D, end = block.queries;
    auto* memory = shared_memory<BFloat16>();
    const HeadTile<D> queries{memory}, upstream{memory + kQueries * D};
    const Pairs pairs{memory + 2 * kQueries * D, k, v, block.key_rows, block.key_rows + block.keys};
    queries.template start_rows<kQueries, kThreads>(q, block.rows + block.first, block.rows + end, column);
    upstream.template start_rows<kQueries, kThreads>(d_o, block.rows + block.first, block.rows + end, column);
    int first = block.begin_key / kKeys * kKeys;
    pairs.start(true, 0, first, kv_column);
    const Sight<kTiles> sight(shape, block.rows, block.first + row);
    // Read again in every step: registers are full.
    auto* statistics = reinterpret_cast<Statistics*>(memory + 2 * kQueries * D + Pairs::kElements);
    static_assert(kThreads == kQueries);
    const int query = block.first + thread_index();
    const std::int64_t at = block_y() * shape.queries + query;
    statistics[thread_index()] = query < end ? Statistics{{lse[at] * kLog2E, delta[at]}} : Statistics{};
    statistics += row + lane / 4;
    const float unit = shape.scale * kLog2E;
    WarpSum<kTiles, D> sum = {};
    for (int step = 0; first < block.end_key; ++step, first += kKeys) {
      pairs.start(first + kKeys < block.end_key, step + 1, first + kKeys, kv_column);
      wait_for_copies<1>();
      sync_block();
      if (!sight.none(first, kKeys)) {
        WarpSum<kTiles, kKeys> score = {}, slope = {};
        multiply_rows<kKeys>(queries.from(row), pairs.tile(step, 0), score);
        multiply_rows<kKeys>(upstream.from(row), pairs.tile(step, 1), slope);
        if (!sight.all(first, kKeys)) sight.template hide<kKeys>(first, score);
        HYBRIDMOE_UNROLL
        for (int t = 0; t < kTiles; ++t) {
          HYBRIDMOE_UNROLL
          for (int half = 0; half < 2; ++half) {
            const auto [log_sum, product] = statistics[16 * t + 8 * half].value;
            HYBRIDMOE_UNROLL
            for (int i = 0; i < kKeys / 4; ++i) {
              const int n = i / 2, j = 2 * half + i % 2;
              const float p = power_of_two(score[t][n][j] * unit - log_sum);
              slope[t][n][j] = p * (slope[t][n][j] - product);
            }
          }
        }
        multiply_sums<kKeys>(slope, pairs.tile(step, 0), sum);
      }
      sync_block();
    }
    wait_for_copies<0>();
    const float scale = shape.scale;
    write_rows<D>(sum, {{scale, scale}, {scale, scale}}, dq, block.rows + block.first + row,
                  block.rows + shape.queries, column);
  }
};

// What belongs to each query of a tile, in shared memory a step ahead: by way of a register, since these are
// few bytes at addresses that asynchronous copies do not take. A warp has each kind.
struct QueryStatistics {
  static constexpr int kQueries = kWarp, kKinds = 3, kStages = 2,
                       kElements = kStages * (kKinds + 1) * kQueries;
  const AttentionShape& shape;
  const float *lse, *delta;
  float* memory;

  HYBRIDMOE_DEVICE float* of(int step, int kind) const {
    return memory + (step % kStages * (kKinds + 1) + kind) * kQueries;
  }
  HYBRIDMOE_DEVICE const float* log_sums(int step) const { return of(step, 0); }
  HYBRIDMOE_DEVICE const float* products(int step) const { return of(step, 1); }
  HYBRIDMOE_DEVICE const float* doc_starts(int step) const {
    return of(step, 2);
  }  // positions are below 2^24
  HYBRIDMOE_DEVICE float latest_start(int step) const { return *of(step, kKinds); }

  HYBRIDMOE_DEVICE float read(std::int64_t batch, int head, int first) const {
    const int kind = thread_index() / kWarp, i = first + thread_index() % kWarp;
    const bool inside = i < shape.queries;
    const std::int64_t at = (batch * shape.heads + head) * shape.queries + i;
    if (kind == 0) return inside ? lse[at] * kLog2E : INFINITY;  // all powers become 0
    if (kind == 1) return inside ? delta[at] : 0;
    if (kind == 2) return inside ? static_cast<float>(shape.first_key(batch * shape.queries + i)) : 0;
    return 0;
  }
  HYBRIDMOE_DEVICE void write(int step, float value) const {
    const int kind = thread_index() / kWarp;
    if (kind >= kKinds) return;
    of(step, kind)[thread_index() % kWarp] = value;
    if (kind == 2) {
      value = over_lanes<Larger>(value, kWarp);
      if (thread_index() % kWarp == 0) *of(step, kKinds) = value;
    }
  }
};

// A block has kKeys keys of one key/value head and goes over the queries of every head that reads it. As many
// queries as keys. Two warps share 32 keys: one has their scores and dv, the other the gradients of their
// probabilities and dk. Either multiplies the queries or their output gradients first with what it keeps and
// then with what came out; a warp that did both would have room for 16 keys only, and read as much for them.
template <int D>
struct AttentionTilesBackwardKey {
  static constexpr int kTiles = 2, kWarps = 4, kThreads = kWarps * kWarp, kKeys = 8 * kTiles * kWarps;
  static constexpr int kQueries = QueryStatistics::kQueries, kBlocksPerProcessor = 2;
  using Pairs = TilePairs<D, kQueries, kThreads>;
  AttentionShape shape;
  Rows<const BFloat16> q, k, v, d_o;
  const float *lse, *delta;
  Rows<BFloat16> dk, dv;

  // Keys and values, stages, probabilities, statistics.
  static constexpr int kHeld = 2 * kKeys * D, kProbabilities = kKeys * kQueries;
  static constexpr std::size_t kSharedBytes = (kHeld + Pairs::kElements) * sizeof(BFloat16) +
                                              (kProbabilities + QueryStatistics::kElements) * sizeof(float);

  HYBRIDMOE_DEVICE void operator()() const {
    const int warp = thread_index() / kWarp, role = warp % 2, row = warp / 2 * 16 * kTiles;
    const int kv_head = static_cast<int>(block_y() % shape.kv_heads), column = kv_head * D;
    const int group = shape.heads / shape.kv_heads, end_head = (kv_head + 1) * group;
    const int batch = static_cast<int>(block_y() / shape.kv_heads);
    const int rows = batch * static_cast<int>(shape.queries), key_rows = batch * static_cast<int>(shape.keys);
    const int first_key = static_cast<int>(block_x()) * kKeys,
              end_row = key_rows + static_cast<int>(shape.keys);
    auto* memory = shared_memory<BFloat16>();
    const HeadTile<D> keys{memory}, values{memory + kKeys * D}, mine{memory + (role * kKeys + row) * D};
    const Pairs pairs{memory + kHeld, q, d_o, rows, rows + static_cast<int>(shape.queries)};
    auto* floats = reinterpret_cast<float*>(memory + kHeld + Pairs::kElements);
    float* exchange = floats + warp / 2 * (kProbabilities / kWarps * 2) + thread_index() % kWarp * 4;
    const QueryStatistics statistics{shape, lse, delta, floats + kProbabilities};
    // Only queries from the first key on see any of these keys.
    const int begin = first_key / kQueries * kQueries, end = end_query(rows, first_key);
    keys.template start_rows<kKeys, kThreads>(k, key_rows + first_key, end_row, column);
    values.template start_rows<kKeys, kThreads>(v, key_rows + first_key, end_row, column);
    int head = kv_head * group, first = begin;
    pairs.start(true, 0, first, head * D);
    statistics.write(0, statistics.read(batch, head, first));
    WarpSum<kTiles, D> sum = {};
    for (int step = 0; head < end_head; ++step) {
      const bool last_of_head = first + kQueries >= end;
      const int next = last_of_head ? begin : first + kQueries, next_head = head + (last_of_head ? 1 : 0);
      const bool more = next_head < end_head;
      pairs.start(more, step + 1, next, next_head * D);
      const float ahead = more ? statistics.read(batch, next_head, next) : 0;
      wait_for_copies<1>();
      sync_block();
      const bool any = first + kQueries > first_key + row;
      WarpSum<kTiles, kQueries> product = {};
      if (any) multiply_rows<kQueries>(mine, pairs.tile(step, role), product);
      if (any && role == 0) {
        weigh(statistics, step, first, first_key + row, product);
        HYBRIDMOE_UNROLL
        for (int i = 0; i < kTiles * kQueries / 8; ++i)
          store<float, 4>(exchange + i * 4 * kWarp, *reinterpret_cast<const Vector<float, 4>*>(
                                                        product[i / (kQueries / 8)][i % (kQueries / 8)]));
      }
      sync_block();
      if (any && role == 1) slope(statistics, step, exchange, product);
      if (any) multiply_sums<kQueries>(product, pairs.tile(step, 1 - role), sum);
      statistics.write(step + 1, ahead);
      sync_block();
      first = next, head = next_head;
    }
    wait_for_copies<0>();
    const float factor = role == 0 ? 1 : shape.scale;
    write_rows<D>(sum, {{factor, factor}, {factor, factor}}, role == 0 ? dv : dk, key_rows + first_key + row,
                  end_row, column);
  }

 private:
  // Behind the last query that sees any of the keys.
  HYBRIDMOE_DEVICE int end_query(std::int64_t rows, int first_key) const {
    const int queries = static_cast<int>(shape.queries);
    if (shape.doc_start == nullptr) return queries;
    int last = first_key;
    for (int i = first_key + thread_index(); i < queries; i += kThreads)
      if (shape.doc_start[rows + i] < first_key + kKeys) last = i;
    last = over_block<Larger>(last, shared_memory<int>());
    sync_block();
    return last + 1;
  }
  // Scores of the keys from `key` on with the queries from `first` on become probabilities.
  HYBRIDMOE_DEVICE void weigh(const QueryStatistics& statistics, int step, int first, int key,
                              WarpSum<kTiles, kQueries>& score) const {
    const int lane = thread_index() % kWarp, query = 2 * (lane % 4);
    if (first < key + 16 * kTiles - 1 || statistics.latest_start(step) > static_cast<float>(key)) {
      const float* starts = statistics.doc_starts(step) + query;
      HYBRIDMOE_UNROLL
      for (int i = 0; i < kTiles * kQueries / 2; ++i) {
        const int tile = i / (kQueries / 2), n = i / 4 % (kQueries / 8), at = 8 * n + i % 2;
        const int mine = key + 16 * tile + i % 4 / 2 * 8 + lane / 4;
        const bool later = mine > first + query + at, other = static_cast<float>(mine) < starts[at];
        if (later | other) score[tile][n][i % 4] = -INFINITY;
      }
    }
    const float unit = shape.scale * kLog2E, *log_sums = statistics.log_sums(step) + query;
    HYBRIDMOE_UNROLL
    for (int i = 0; i < kTiles * kQueries / 2; ++i) {
      float& value = score[i / (kQueries / 2)][i / 4 % (kQueries / 8)][i % 4];
      value = power_of_two(value * unit - log_sums[i / 4 % (kQueries / 8) * 8 + i % 2]);
    }
  }
  // The gradients of probabilities become those of the scores.
  HYBRIDMOE_DEVICE void slope(const QueryStatistics& statistics, int step, const float* probabilities,
                              WarpSum<kTiles, kQueries>& gradient) const {
    const float* products = statistics.products(step) + 2 * (thread_index() % 4);
    HYBRIDMOE_UNROLL
    for (int i = 0; i < kTiles * kQueries / 8; ++i) {
      const int n = i % (kQueries / 8);
      const Vector<float, 4> p = load<float, 4>(probabilities + i * 4 * kWarp);
      HYBRIDMOE_UNROLL
      for (int j = 0; j < 4; ++j) {
        float& value = gradient[i / (kQueries / 8)][n][j];
        value = p.value[j] * (value - products[8 * n + j % 2]);
      }
    }
  }
};

}  // namespace hybridmoe::cuda
