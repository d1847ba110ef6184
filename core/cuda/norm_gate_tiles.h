// The norm-gate in bf16 by mma.sync: a block has 64 tokens and goes over the width in chunks of 64, so that
// the router's weights are read once for 64 tokens. The logits are rstd · ((sum ⊙ gain) Wᵀ): their product
// runs while the sum of squares is still being added up. The way back forms dlogits · W chunk by chunk, once
// for the norm's dot product and once for the result, and keeps neither in memory.
#pragma once

#include "core/cuda/attention_tiles.h"
#include "core/cuda/router_row.h"

namespace hybridmoe::cuda {

constexpr int kGateTokens = 64, kGateChunk = 64, kGateWarps = 8;

// Thread t has 16 bytes, elements 8 (t % 8) .. of the chunk, of tokens t / 8 and t / 8 + 32.
struct GatePlace {
  static constexpr int kVectors = 2, kWidth = 8;
  int chunk, row[kVectors];
  HYBRIDMOE_DEVICE GatePlace() {
    chunk = thread_index() % 8;
    for (int u = 0; u < kVectors; ++u) row[u] = thread_index() / 8 + 32 * u;
  }
};

// The router's rows in shared memory, columns of a chunk; those of experts beyond the last become zero.
template <int kExperts>
struct GateWeights {
  static constexpr int kStages = 2, kElements = kExperts * kGateChunk;
  BFloat16* memory;
  Rows<const BFloat16> router;
  int experts;

  HYBRIDMOE_DEVICE HeadTile<kGateChunk> tile(int chunk) const {
    return {memory + chunk % kStages * kElements};
  }
  HYBRIDMOE_DEVICE void start(int chunk, int chunks) const {
    if (chunk < chunks)
      tile(chunk).template start<kGateWarps * kWarp>(router, 0, 0, experts, chunk * kGateChunk, kExperts);
    commit_copies();
  }
};

template <int kExperts>
struct GateTilesForward {
  static constexpr int kThreads = kGateWarps * kWarp;
  static constexpr int kBlocksPerProcessor = 2;
  Rows<const BFloat16> x, branch;
  const BFloat16* gain;
  Rows<const BFloat16> router;
  GateRule rule;
  Rows<BFloat16> sum, y;
  float* rstd;
  Rows<float> probs;
  float* lse;
  Rows<std::int32_t> topk;
  Rows<float> weights;
  double* partial;  // as NormGateForwardKernel's
  std::int64_t n, d;
  float eps;

  static std::size_t shared_bytes(int experts) {
    return kGateWarps * GateSums::kExtra * sizeof(double) + kGateTokens * kGateChunk * sizeof(BFloat16) +
           GateWeights<kExperts>::kStages * GateWeights<kExperts>::kElements * sizeof(BFloat16) +
           (kGateTokens * kExperts + kGateTokens + kGateWarps * 4 * experts) * sizeof(float) + 5 * 16;
  }

  HYBRIDMOE_DEVICE void operator()() const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, experts = rule.experts;
    auto* all_sums = shared_memory<double>();
    auto* rows = after<BFloat16>(all_sums, kGateWarps * GateSums::kExtra);
    auto* staged = after<BFloat16>(rows, kGateTokens * kGateChunk);
    auto* logits = after<float>(staged, GateWeights<kExperts>::kStages * GateWeights<kExperts>::kElements);
    auto* scales = logits + kGateTokens * kExperts;
    auto* scratch =
        scales + kGateTokens;  // of each warp: counts, sums of probabilities, probabilities, scores
    float* own = scratch + warp * 4 * experts;
    GateSums sums{own, own + experts, all_sums + warp * GateSums::kExtra};
    for (int e = lane; e < 2 * experts; e += kWarp) own[e] = 0;
    if (lane < kRouterSums) sums.sums[lane] = 0;
    if (lane == 0) sums.sums[kRouterSums] = -INFINITY;
    if (partial == nullptr) sums.counts = nullptr;

    const HeadTile<kGateChunk> tile{rows};
    const GateWeights<kExperts> weights_of{staged, router, experts};
    const GatePlace place;
    const std::int64_t first = block_x() * kGateTokens;
    const auto chunks = static_cast<int>(d / kGateChunk);
    constexpr int W = GatePlace::kWidth, U = GatePlace::kVectors, kN = kExperts / 2;
    const int row = warp % 4 * 16, column = warp / 4 * kN;
    Vector<BFloat16, W> value[U], added[U];
    const auto fetch = [&](int chunk) {
      HYBRIDMOE_UNROLL
      for (int u = 0; u < U; ++u) {
        const std::int64_t t = first + place.row[u], at = chunk * kGateChunk + place.chunk * W;
        value[u] = added[u] = {};
        if (t >= n || chunk >= chunks) continue;
        value[u] = load_once<BFloat16, W>(x[t] + at);
        if (branch.given()) added[u] = load_once<BFloat16, W>(branch[t] + at);
      }
    };
    float squares[U] = {}, product[kN / 8][4] = {};
    fetch(0);
    weights_of.start(0, chunks);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      weights_of.start(chunk + 1, chunks);
      const std::int64_t at = chunk * kGateChunk + place.chunk * W;
      Vector<BFloat16, W> g = {};
      if (gain != nullptr) g = load<BFloat16, W>(gain + at);
      HYBRIDMOE_UNROLL
      for (int u = 0; u < U; ++u) {
        Vector<BFloat16, W> v = value[u];
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) {
          if (branch.given()) v.value[j] = to_bfloat16(to_float(v.value[j]) + to_float(added[u].value[j]));
          squares[u] += to_float(v.value[j]) * to_float(v.value[j]);
        }
        const std::int64_t t = first + place.row[u];
        if (sum.given() && t < n) store<BFloat16, W>(sum[t] + at, v);
        if (gain != nullptr) {
          HYBRIDMOE_UNROLL
          for (int j = 0; j < W; ++j) v.value[j] = to_bfloat16(to_float(v.value[j]) * to_float(g.value[j]));
        }
        store<BFloat16, W>(tile.at(place.row[u], place.chunk), v);
      }
      fetch(chunk + 1);  // under way while the tensor cores work
      wait_for_copies<1>();
      sync_block();
      const HeadTile<kGateChunk> w = weights_of.tile(chunk);
      HYBRIDMOE_UNROLL
      for (int k = 0; k < kGateChunk; k += 16) {
        std::uint32_t left[4];
        tile.left(row, k, left);
        HYBRIDMOE_UNROLL
        for (int e = 0; e < kN; e += 16) {
          std::uint32_t right[4];
          w.right(column + e, k, right);
          multiply_add(left, right[0], right[1], product[e / 8]);
          multiply_add(left, right[2], right[3], product[e / 8 + 1]);
        }
      }
      sync_block();
    }
    wait_for_copies<0>();

    HYBRIDMOE_UNROLL
    for (int u = 0; u < U; ++u) {
      const float total = over_lanes<Plus>(squares[u], 8);
      const float r = gain != nullptr ? reciprocal_root(total / static_cast<float>(d) + eps) : 1;
      const std::int64_t t = first + place.row[u];
      if (place.chunk == 0) {
        scales[place.row[u]] = r;
        if (gain != nullptr && t < n) rstd[t] = r;
      }
    }
    sync_block();
    HYBRIDMOE_UNROLL
    for (int e = 0; e < kN / 8; ++e) {
      HYBRIDMOE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int of = row + lane / 4 + i / 2 * 8;
        logits[of * kExperts + column + 8 * e + 2 * (lane % 4) + i % 2] = product[e][i] * scales[of];
      }
    }
    if (y.given()) write_normed(scales);
    sync_block();
    for (int token = warp; token < kGateTokens && first + token < n; token += kGateWarps) {
      const std::int64_t t = first + token;
      rule.route(logits + token * kExperts, own + 2 * experts, own + 3 * experts, probs[t], lse + t, topk[t],
                 weights[t], sums);
    }
    if (partial == nullptr) return;
    sync_block();
    double* joined = partial + block_x() * (2 * experts + GateSums::kExtra);
    for (int e = thread_index(); e < 2 * experts; e += block_threads()) {
      float total = 0;
      for (int w = 0; w < kGateWarps; ++w) total += scratch[w * 4 * experts + e];
      joined[e] = static_cast<double>(total);
    }
    if (thread_index() < GateSums::kExtra) {
      double total = all_sums[thread_index()];
      for (int w = 1; w < kGateWarps; ++w)
        total = GateSums::join(thread_index() == kRouterSums, total,
                               all_sums[w * GateSums::kExtra + thread_index()]);
      joined[2 * experts + thread_index()] = total;
    }
  }

 private:
  // y = sum, which this thread has just written, or x, times the rows' scales and the gain; the last chunks
  // first: they are the likeliest to be in a cache.
  HYBRIDMOE_DEVICE void write_normed(const float* scales) const {
    constexpr int W = GatePlace::kWidth, U = GatePlace::kVectors, kAtOnce = 2;
    const GatePlace place;
    const std::int64_t first = block_x() * kGateTokens;
    for (auto last = static_cast<int>(d / kGateChunk) - 1; last >= 0; last -= kAtOnce) {
      Vector<BFloat16, W> value[kAtOnce][U];
      HYBRIDMOE_UNROLL
      for (int c = 0; c < kAtOnce; ++c) {
        HYBRIDMOE_UNROLL
        for (int u = 0; u < U; ++u) {
          const std::int64_t t = first + place.row[u], at = (last - c) * kGateChunk + place.chunk * W;
          if (t < n && at >= 0) value[c][u] = load<BFloat16, W>((sum.given() ? sum[t] : x[t]) + at);
        }
      }
      HYBRIDMOE_UNROLL
      for (int c = 0; c < kAtOnce; ++c) {
        const std::int64_t at = (last - c) * kGateChunk + place.chunk * W;
        if (at < 0) continue;
        Vector<BFloat16, W> g = {};
        if (gain != nullptr) g = load<BFloat16, W>(gain + at);
        HYBRIDMOE_UNROLL
        for (int u = 0; u < U; ++u) {
          const std::int64_t t = first + place.row[u];
          if (t >= n) continue;
          Vector<BFloat16, W> v = value[c][u];
          HYBRIDMOE_UNROLL
          for (int j = 0; gain != nullptr && j < W; ++j)
            v.value[j] = to_bfloat16(to_float(v.value[j]) * scales[place.row[u]] * to_float(g.value[j]));
          store<BFloat16, W>(y[t] + at, v);
        }
      }
    }
  }
};

template <int kExperts>
struct GateTilesBackward {
  static constexpr int kThreads = kGateWarps * kWarp;
  static constexpr int kBlocksPerProcessor = 2;
  Rows<const BFloat16> sum;
  const BFloat16* gain;
  Rows<const BFloat16> router;
  GateRule rule;
  const float* rstd;
  Rows<const float> logits;  // of sigmoid scores
  Rows<const float> probs;
  const float* lse;
  Rows<const std::int32_t> topk;
  Rows<const float> weights, dweights;
  const double* counts;
  float balance_scale, z_scale;
  Rows<const BFloat16> dy, skip;
  Rows<float> dlogits;
  BFloat16* dlogits_rounded;  // [n, E]
  Rows<BFloat16> dsum;
  float* partial;  // [blocks, d], with a gain
  std::int64_t n, d;

  static constexpr int kProductStride = kGateChunk + 4;  // of the product's rows: no two in the same banks

  static std::size_t shared_bytes(std::int64_t width, int experts) {
    return kGateTokens * kExperts * sizeof(BFloat16) +
           GateWeights<kExperts>::kStages * GateWeights<kExperts>::kElements * sizeof(BFloat16) +
           (kGateTokens * kProductStride + kGateWarps * kGateChunk + width + experts +
            kGateWarps * 3 * experts) *
               sizeof(float) +
           3 * 16;
  }

  HYBRIDMOE_DEVICE void operator()() const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, experts = rule.experts;
    auto* gradients = shared_memory<BFloat16>();
    auto* staged = after<BFloat16>(gradients, kGateTokens * kExperts);
    auto* product = after<float>(staged, GateWeights<kExperts>::kStages * GateWeights<kExperts>::kElements);
    float* columns = product + kGateTokens * kProductStride;  // [warps, chunk]
    float *dgain = columns + kGateWarps * kGateChunk, *loads = dgain + d;
    float *p = loads + experts + warp * 3 * experts, *dl = p + experts, *logit = dl + experts;
    for (std::int64_t i = thread_index(); i < d; i += block_threads()) dgain[i] = 0;
    for (int e = thread_index(); e < experts; e += block_threads()) loads[e] = static_cast<float>(counts[e]);
    sync_block();

    const HeadTile<kExperts> tile{gradients};
    const GateWeights<kExperts> weights_of{staged, router, experts};
    const GatePlace place;
    const auto chunks = static_cast<int>(d / kGateChunk);
    constexpr int W = GatePlace::kWidth, U = GatePlace::kVectors;
    const std::int64_t blocks = (n + kGateTokens - 1) / kGateTokens;
    for (std::int64_t block = block_x(); block < blocks; block += grid_x()) {
      const std::int64_t first = block * kGateTokens;
      for (int token = warp; token < kGateTokens; token += kGateWarps) {
        const std::int64_t t = first + token;
        if (t < n) {
          for (int e = lane; e < experts; e += kWarp) {
            p[e] = probs[t][e];
            if (rule.sigmoid) logit[e] = logits[t][e];
          }
          sync_warp();
          rule.backward(p, logit, weights[t], dweights[t], topk[t], lse[t], loads, balance_scale, z_scale,
                        dl);
        }
        for (int e = lane; e < kExperts; e += kWarp) {
          const bool real = t < n && e < experts;
          const BFloat16 value = to_bfloat16(real ? dl[e] : 0.0f);
          *(tile.at(token, e / 8) + e % 8) = value;
          if (!real) continue;
          dlogits[t][e] = dl[e];
          dlogits_rounded[t * experts + e] = value;
        }
        sync_warp();
      }
      sync_block();

      float r[U], pull[U] = {};
      HYBRIDMOE_UNROLL
      for (int u = 0; u < U; ++u) {
        const std::int64_t t = first + place.row[u];
        r[u] = gain != nullptr && t < n ? rstd[t] : 1;
      }
      // First the norm's dot product, then the result; without a norm the result alone.
      for (int pass = gain != nullptr ? 0 : 1; pass < 2; ++pass) {
        float dot[U] = {};
        weights_of.start(0, chunks);
        for (int chunk = 0; chunk < chunks; ++chunk) {
          weights_of.start(chunk + 1, chunks);
          wait_for_copies<1>();
          sync_block();
          multiply_chunk(tile, weights_of.tile(chunk), product);
          sync_block();
          const std::int64_t at = chunk * kGateChunk + place.chunk * W;
          Vector<BFloat16, W> g = {};
          if (gain != nullptr) g = load<BFloat16, W>(gain + at);
          float of_columns[W] = {};
          HYBRIDMOE_UNROLL
          for (int u = 0; u < U; ++u) {
            const std::int64_t t = first + place.row[u];
            if (t >= n) continue;
            const Vector<BFloat16, W> v = load<BFloat16, W>(dy[t] + at);
            Vector<BFloat16, W> normed = {}, passed = {}, result;
            if (gain != nullptr) normed = load<BFloat16, W>(sum[t] + at);
            if (pass == 1 && skip.given()) passed = load_once<BFloat16, W>(skip[t] + at);
            HYBRIDMOE_UNROLL
            for (int j = 0; j < W; ++j) {
              const float upstream =
                  to_float(v.value[j]) + product[place.row[u] * kProductStride + place.chunk * W + j];
              const float value = to_float(normed.value[j]), by_gain = upstream * to_float(g.value[j]);
              dot[u] += by_gain * value;
              of_columns[j] += upstream * value * r[u];
              const float own = gain != nullptr ? r[u] * by_gain - pull[u] * value : upstream;
              result.value[j] = to_bfloat16(skip.given() ? own + to_float(passed.value[j]) : own);
            }
            if (pass == 1) store<BFloat16, W>(dsum[t] + at, result);
          }
          if (pass == 1 && gain != nullptr) add_columns(of_columns, columns, dgain + chunk * kGateChunk);
        }
        wait_for_copies<0>();
        if (pass == 1) break;
        HYBRIDMOE_UNROLL
        for (int u = 0; u < U; ++u)
          pull[u] = r[u] * r[u] * r[u] * (over_lanes<Plus>(dot[u], 8) / static_cast<float>(d));
        sync_block();
      }
      sync_block();
    }
    if (gain == nullptr) return;
    for (std::int64_t i = thread_index(); i < d; i += block_threads()) partial[block_x() * d + i] = dgain[i];
  }

 private:
  // product [tokens, chunk] = the gradients of the logits times the weights' columns.
  HYBRIDMOE_DEVICE void multiply_chunk(const HeadTile<kExperts>& tile, const HeadTile<kGateChunk>& w,
                                       float* product) const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    const int row = warp % 4 * 16, column = warp / 4 * 32;
    float result[4][4] = {};
    HYBRIDMOE_UNROLL
    for (int k = 0; k < kExperts; k += 16) {
      std::uint32_t left[4];
      tile.left(row, k, left);
      HYBRIDMOE_UNROLL
      for (int c = 0; c < 32; c += 16) {
        std::uint32_t right[4];
        w.right_transposed(k, column + c, right);
        multiply_add(left, right[0], right[1], result[c / 8]);
        multiply_add(left, right[2], right[3], result[c / 8 + 1]);
      }
    }
    HYBRIDMOE_UNROLL
    for (int c = 0; c < 4; ++c) {
      HYBRIDMOE_UNROLL
      for (int i = 0; i < 4; ++i)
        product[(row + lane / 4 + i / 2 * 8) * kProductStride + column + 8 * c + 2 * (lane % 4) + i % 2] =
            result[c][i];
    }
  }
  // dgain [chunk] += the sums of all threads' columns, row by row in a fixed order.
  HYBRIDMOE_DEVICE void add_columns(float (&of_thread)[GatePlace::kWidth], float* columns,
                                    float* dgain) const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    HYBRIDMOE_UNROLL
    for (int j = 0; j < GatePlace::kWidth; ++j) {
      float sum_of_rows = of_thread[j];
      sum_of_rows += shuffle_xor(sum_of_rows, 8);
      sum_of_rows += shuffle_xor(sum_of_rows, 16);
      if (lane < 8) columns[warp * kGateChunk + lane * GatePlace::kWidth + j] = sum_of_rows;
    }
    sync_block();
    if (thread_index() < kGateChunk) {
      float total = 0;
      for (int w = 0; w < kGateWarps; ++w) total += columns[w * kGateChunk + thread_index()];
      dgain[thread_index()] += total;
    }
  }
};

}  // namespace hybridmoe::cuda
