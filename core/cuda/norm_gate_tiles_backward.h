// The way back through the norm-gate's tiles. With u = dy + dlogits · W, a row's result needs Σ u ⊙ gain ⊙
// sum first. The second part of that is Σ dlogits · logits / rstd, so that a pass over dy and sum gives the
// rest; then a second one forms dlogits · W chunk by chunk, keeps it in shared memory, and writes the result.
#pragma once

#include "core/cuda/norm_gate_tiles.h"

namespace hybridmoe::cuda {

template <int kExperts>
struct GateTilesBackward : GateBackwardCall<BFloat16> {
  static constexpr int kThreads = kGateWarps * kWarp;
  static constexpr int kBlocksPerProcessor = 2;

  static constexpr int kProductStride = kGateChunk + 4;  // of the product's rows: no two in the same banks

  static std::size_t shared_bytes(std::int64_t width, int experts) {
    return kGateTokens * kExperts * sizeof(BFloat16) +
           GateWeights<kExperts>::kStages * GateWeights<kExperts>::kElements * sizeof(BFloat16) +
           (kGateTokens * kProductStride + kGateWarps * kGateChunk + width + experts + kGateTokens +
            kGateWarps * 2 * experts) *
               sizeof(float) +
           3 * 16;
  }

  HYBRIDMOE_DEVICE void operator()() const {
    const int experts = rule.experts;
    auto* gradients = shared_memory<BFloat16>();
    auto* staged = after<BFloat16>(gradients, kGateTokens * kExperts);
    auto* product = after<float>(staged, GateWeights<kExperts>::kStages * GateWeights<kExperts>::kElements);
    float* columns = product + kGateTokens * kProductStride;  // [warps, chunk]
    float *dgain = columns + kGateWarps * kGateChunk, *loads = dgain + d, *through = loads + experts;
    float* scratch = through + kGateTokens;
    for (std::int64_t i = thread_index(); i < d; i += block_threads()) dgain[i] = 0;
    for (int e = thread_index(); e < experts; e += block_threads()) loads[e] = static_cast<float>(counts[e]);
    sync_block();

    const HeadTile<kExperts> tile{gradients};
    const GateWeights<kExperts> weights_of{staged, router, experts};
    const GatePlace place;
    const auto chunks = static_cast<int>(d / kGateChunk);
    const std::int64_t blocks = (n + kGateTokens - 1) / kGateTokens;
    for (std::int64_t block = block_x(); block < blocks; block += grid_x()) {
      const std::int64_t first = block * kGateTokens;
      // The weights' place is free still, and has that of all tokens' probabilities.
      gradients_of_logits(first, tile, reinterpret_cast<float*>(staged), loads, scratch, through);
      sync_block();
      float r[U], pull[U] = {};
      HYBRIDMOE_UNROLL
      for (int u = 0; u < U; ++u) {
        const std::int64_t t = first + place.row[u];
        r[u] = gain != nullptr && t < n ? rstd[t] : 1;
      }
      if (gain != nullptr) {
        add_products(first, pull);
        HYBRIDMOE_UNROLL
        for (int u = 0; u < U; ++u) {
          const float dot = over_lanes<Plus>(pull[u], 8) + through[place.row[u]] / r[u];
          pull[u] = r[u] * r[u] * r[u] * (dot / static_cast<float>(d));
        }
      }

      Elements next[U];
      read(first, 0, next);
      weights_of.start(0, chunks);
      for (int chunk = 0; chunk < chunks; ++chunk) {
        weights_of.start(chunk + 1, chunks);
        wait_for_copies<1>();
        sync_block();
        multiply_chunk(tile, weights_of.tile(chunk), product);
        sync_block();
        Elements own[U];
        HYBRIDMOE_UNROLL
        for (int u = 0; u < U; ++u) own[u] = next[u];
        if (chunk + 1 < chunks) read(first, chunk + 1, next);  // under way until the next product is there
        const std::int64_t at = chunk * kGateChunk + place.chunk * W;
        Packed<BFloat16, W> g;
        if (gain != nullptr) g = load_packed<BFloat16, W>(gain + at);
        float of_columns[W] = {};
        HYBRIDMOE_UNROLL
        for (int u = 0; u < U; ++u) {
          const std::int64_t t = first + place.row[u];
          if (t >= n) continue;
          Vector<BFloat16, W> result;
          HYBRIDMOE_UNROLL
          for (int j = 0; j < W; ++j) {
            const float upstream =
                own[u].dy[j] + product[place.row[u] * kProductStride + place.chunk * W + j];
            const float value = own[u].sum[j];
            of_columns[j] += upstream * value * r[u];
            float total = upstream;
            if (gain != nullptr) total = r[u] * (upstream * g[j]) - pull[u] * value;
            result.value[j] = to_bfloat16(skip.given() ? total + own[u].skip[j] : total);
          }
          store<BFloat16, W>(dsum[t] + at, result);
        }
        if (gain != nullptr) add_columns(of_columns, columns, dgain + chunk * kGateChunk);
      }
      wait_for_copies<0>();
      sync_block();
    }
    if (gain == nullptr) return;
    for (std::int64_t i = thread_index(); i < d; i += block_threads()) partial[block_x() * d + i] = dgain[i];
  }

 private:
  static constexpr int W = GatePlace::kWidth, U = GatePlace::kVectors;
  struct Elements {
    Packed<BFloat16, W> dy, sum, skip;
  };

  // This thread's elements of a chunk, for the last time.
  HYBRIDMOE_DEVICE void read(std::int64_t first, int chunk, Elements (&to)[U]) const {
    const GatePlace place;
    const std::int64_t at = chunk * kGateChunk + place.chunk * W;
    HYBRIDMOE_UNROLL
    for (int u = 0; u < U; ++u) {
      const std::int64_t t = first + place.row[u];
      if (t >= n) continue;
      to[u].dy = load_packed_once<BFloat16, W>(dy[t] + at);
      if (gain != nullptr) to[u].sum = load_packed_once<BFloat16, W>(sum[t] + at);
      if (skip.given()) to[u].skip = load_packed_once<BFloat16, W>(skip[t] + at);
    }
  }

  // The gradients of the logits of the block's tokens, to memory and, rounded, to `tile`; zeros for experts
  // and tokens that are not there. A warp has 8 tokens. p: [tokens, kExperts]; through: [tokens] = Σ dlogits
  // · logits.
  HYBRIDMOE_DEVICE void gradients_of_logits(std::int64_t first, const HeadTile<kExperts>& tile, float* p,
                                            const float* loads, float* scratch, float* through) const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, experts = rule.experts;
    constexpr int kTokens = kGateTokens / kGateWarps, kEach = kExperts / kWarp;  // experts of a lane
    float *dl = scratch + warp * 2 * experts, *logit = dl + experts;
    p += warp * kTokens * kExperts;
    constexpr int kValues = kTokens * kEach, kAtOnce = kValues < 16 ? kValues : 16;
    for (int from = 0; from < kValues; from += kAtOnce) {
      float given[kAtOnce];
      HYBRIDMOE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const std::int64_t t = first + warp * kTokens + (from + i) / kEach;
        const int e = lane + i % kEach * kWarp;
        given[i] = t < n && e < experts ? probs[t][e] : 0;
      }
      HYBRIDMOE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) p[(from + i) * kWarp + lane] = given[i];
    }
    GateChoice next = {};
    if (first + warp * kTokens < n) next = choice_of(first + warp * kTokens);
    for (int k = 0; k < kTokens; ++k, p += kExperts) {
      const int token = warp * kTokens + k;
      const std::int64_t t = first + token;
      const GateChoice choice = next;
      if (k + 1 < kTokens && t + 1 < n) next = choice_of(t + 1);
      float with_logits = 0;
      if (t < n) {
        for (int e = lane; rule.sigmoid && e < experts; e += kWarp) logit[e] = logits[t][e];
        sync_warp();
        rule.backward(p, logit, choice, lse[t], loads, balance_scale, z_scale, dl);
      }
      for (int e = lane; e < kExperts; e += kWarp) {
        const bool real = t < n && e < experts;
        const BFloat16 value = to_bfloat16(real ? dl[e] : 0.0f);
        *(tile.at(token, e / 8) + e % 8) = value;
        if (!real) continue;
        dlogits[t][e] = dl[e];
        dlogits_rounded[t * experts + e] = value;
        // The logit from its probability; where that has vanished, so has the gradient.
        if (gain != nullptr && (rule.sigmoid || p[e] > 0))
          with_logits += to_float(value) * (rule.sigmoid ? logit[e] : lse[t] + logf(p[e]));
      }
      with_logits = warp_sum(with_logits);
      if (lane == 0) through[token] = with_logits;
      sync_warp();
    }
  }
  HYBRIDMOE_DEVICE GateChoice choice_of(std::int64_t t) const {
    return rule.choice_of(topk[t], weights[t], dweights[t]);
  }

  // dot += this thread's part of Σ dy ⊙ gain ⊙ sum of its rows. The chunks that are read again soonest come
  // last: they are the likeliest to be in a cache then.
  HYBRIDMOE_DEVICE void add_products(std::int64_t first, float (&dot)[U]) const {
    constexpr int kAtOnce = 2;
    const GatePlace place;
    for (auto last = static_cast<int>(d / kGateChunk) - 1; last >= 0; last -= kAtOnce) {
      Packed<BFloat16, W> upstream[kAtOnce][U], value[kAtOnce][U];
      HYBRIDMOE_UNROLL
      for (int c = 0; c < kAtOnce; ++c) {
        HYBRIDMOE_UNROLL
        for (int u = 0; u < U; ++u) {
          const std::int64_t t = first + place.row[u], at = (last - c) * kGateChunk + place.chunk * W;
          if (t >= n || at < 0) continue;
          upstream[c][u] = load_packed<BFloat16, W>(dy[t] + at);
          value[c][u] = load_packed<BFloat16, W>(sum[t] + at);
        }
      }
      HYBRIDMOE_UNROLL
      for (int c = 0; c < kAtOnce; ++c) {
        const std::int64_t at = (last - c) * kGateChunk + place.chunk * W;
        if (at < 0) continue;
        const Packed<BFloat16, W> g = load_packed<BFloat16, W>(gain + at);
        HYBRIDMOE_UNROLL
        for (int u = 0; u < U; ++u) {
          HYBRIDMOE_UNROLL
          for (int j = 0; j < W; ++j) dot[u] += upstream[c][u][j] * g[j] * value[c][u][j];
        }
      }
    }
  }

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
