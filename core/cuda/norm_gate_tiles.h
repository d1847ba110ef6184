// The norm-gate in bf16 by mma.sync: a block has 64 tokens and goes over the width in chunks of 64, so that
// the router's weights are read once for 64 tokens. The logits are rstd · ((sum ⊙ gain) Wᵀ): their product
// runs while the sum of squares is still being added up.
#pragma once

#include "core/cuda/attention_tiles.h"
#include "core/cuda/norm_gate_call.h"

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
    const GatePlace place;
    HYBRIDMOE_UNROLL
    for (int first = 0; first < kExperts && chunk < chunks; first += kGateWarps * kWarp / 8) {
      const int row = first + place.row[0], column = chunk * kGateChunk + place.chunk * GatePlace::kWidth;
      start_copy(tile(chunk).at(row, place.chunk), row < experts ? router[row] + column : nullptr);
    }
    commit_copies();
  }
};

template <int kExperts>
struct GateTilesForward : GateForwardCall<BFloat16> {
  static constexpr int kThreads = kGateWarps * kWarp;
  static constexpr int kBlocksPerProcessor = 2;

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
    Packed<BFloat16, W> value[U], added[U];
    const auto fetch = [&](int chunk) {
      HYBRIDMOE_UNROLL
      for (int u = 0; u < U; ++u) {
        const std::int64_t t = first + place.row[u], at = chunk * kGateChunk + place.chunk * W;
        value[u] = added[u] = {};
        if (t >= n || chunk >= chunks) continue;
        value[u] = load_packed_once<BFloat16, W>(x[t] + at);
        if (branch.given()) added[u] = load_packed_once<BFloat16, W>(branch[t] + at);
      }
    };
    float squares[U] = {}, product[kN / 8][4] = {};
    fetch(0);
    weights_of.start(0, chunks);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      weights_of.start(chunk + 1, chunks);
      const std::int64_t at = chunk * kGateChunk + place.chunk * W;
      Packed<BFloat16, W> g;
      if (gain != nullptr) g = load_packed<BFloat16, W>(gain + at);
      HYBRIDMOE_UNROLL
      for (int u = 0; u < U; ++u) {
        Vector<BFloat16, W> v;
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) {
          v.value[j] = to_bfloat16(branch.given() ? value[u][j] + added[u][j] : value[u][j]);
          squares[u] += to_float(v.value[j]) * to_float(v.value[j]);
        }
        const std::int64_t t = first + place.row[u];
        if (sum.given() && t < n) store<BFloat16, W>(sum[t] + at, v);
        if (gain != nullptr) {
          HYBRIDMOE_UNROLL
          for (int j = 0; j < W; ++j) v.value[j] = to_bfloat16(to_float(v.value[j]) * g[j]);
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
      Packed<BFloat16, W> value[kAtOnce][U];
      HYBRIDMOE_UNROLL
      for (int c = 0; c < kAtOnce; ++c) {
        HYBRIDMOE_UNROLL
        for (int u = 0; u < U; ++u) {
          const std::int64_t t = first + place.row[u], at = (last - c) * kGateChunk + place.chunk * W;
          if (t < n && at >= 0) value[c][u] = load_packed<BFloat16, W>((sum.given() ? sum[t] : x[t]) + at);
        }
      }
      HYBRIDMOE_UNROLL
      for (int c = 0; c < kAtOnce; ++c) {
        const std::int64_t at = (last - c) * kGateChunk + place.chunk * W;
        if (at < 0) continue;
        Packed<BFloat16, W> g;
        if (gain != nullptr) g = load_packed<BFloat16, W>(gain + at);
        HYBRIDMOE_UNROLL
        for (int u = 0; u < U; ++u) {
          const std::int64_t t = first + place.row[u];
          if (t >= n) continue;
          const float r = scales[place.row[u]];
          Vector<BFloat16, W> v;
          HYBRIDMOE_UNROLL
          for (int j = 0; j < W; ++j)
            v.value[j] = to_bfloat16(gain != nullptr ? value[c][u][j] * r * g[j] : value[c][u][j]);
          store<BFloat16, W>(y[t] + at, v);
        }
      }
    }
  }
};

}  // namespace hybridmoe::cuda
