// The norm-gate: residual add, RMSNorm, router and its statistics, and the way back. In bf16, where the sizes
// allow it, in tiles (norm_gate_tiles*.h); else a block has a token at a time, and its first warp routes.
#include <algorithm>

#include "core/cuda/norm_gate_tiles.h"
#include "core/cuda/norm_gate_tiles_backward.h"
#include "core/cuda/partials.h"
#include "core/cuda/residual_row.h"

namespace hybridmoe::cuda {
namespace {

constexpr std::size_t kScratchBytes = 32 * sizeof(double);  // of over_block

// Shared memory of both kernels, for d elements and E experts: the row in C, floats [E] three times, sums.
template <class C, int W>
struct GateMemory {
  Vector<C, W>* row;               // what is normalised
  float *logits, *probs, *scores;  // [E] each
  GateSums sums;

  HYBRIDMOE_DEVICE GateMemory(std::int64_t d, int experts, bool statistics) {
    sums.sums = shared_memory<double>();
    row = after<Vector<C, W>>(sums.sums, GateSums::kExtra);
    logits = after<float>(row, d / W);
    probs = logits + experts;
    scores = probs + experts;
    sums.counts = scores + experts;
    sums.prob_sum = sums.counts + experts;
    for (int e = thread_index(); e < 2 * experts; e += block_threads()) sums.counts[e] = 0;
    if (thread_index() < kRouterSums) sums.sums[thread_index()] = 0;
    if (thread_index() == 0) sums.sums[kRouterSums] = -INFINITY;
    sync_block();
    if (!statistics) sums.counts = nullptr;
  }
  static std::size_t bytes(std::int64_t d, int experts) {
    return shared_bytes_of<double>(GateSums::kExtra) + shared_bytes_of<C>(d) + 5 * experts * sizeof(float) +
           kScratchBytes;
  }
  HYBRIDMOE_DEVICE float* scratch(int experts) const { return scores + 3 * experts; }
};

// logits [E] shared = y · routerᵀ, with y in shared memory; a warp per expert.
template <class C, int W>
HYBRIDMOE_DEVICE void router_logits(const Vector<C, W>* y, const Rows<const C>& router, std::int64_t d,
                                    int experts, float* logits) {
  const int lane = thread_index() % kWarp, warps = block_threads() / kWarp;
  for (int e = thread_index() / kWarp; e < experts; e += warps) {
    float dot = 0;
    for (std::int64_t i = lane; i < d / W; i += kWarp) {
      const Vector<C, W> w = load<C, W>(router[e] + i * W), v = y[i];
      HYBRIDMOE_UNROLL
      for (int j = 0; j < W; ++j) dot += to_float(w.value[j]) * to_float(v.value[j]);
    }
    dot = warp_sum(dot);
    if (lane == 0) logits[e] = dot;
  }
  sync_block();
}

template <class C, int W>
struct NormGateForwardKernel : GateForwardCall<C> {
  static constexpr int kThreads = 256;
  using Call = GateForwardCall<C>;
  using Call::x, Call::branch, Call::gain, Call::router, Call::rule, Call::sum, Call::y, Call::rstd,
      Call::probs, Call::lse, Call::topk, Call::weights, Call::partial, Call::n, Call::d, Call::eps;

  HYBRIDMOE_DEVICE void operator()() const {
    const int experts = rule.experts;
    const GateMemory<C, W> memory(d, experts, partial != nullptr);
    for (std::int64_t t = block_x(); t < n; t += grid_x()) {
      float squares = read_residual<C, W>(x, branch, sum, t, d, memory.row);
      float r = 1;
      if (gain != nullptr) {
        squares = over_block<Plus>(squares, memory.scratch(experts));
        r = reciprocal_root(squares / static_cast<float>(d) + eps);
        if (thread_index() == 0) rstd[t] = r;
      }
      for (std::int64_t i = thread_index(); i < d / W; i += block_threads()) {
        Vector<C, W> v = memory.row[i];
        if (gain != nullptr) {
          const Vector<C, W> g = load<C, W>(gain + i * W);
          HYBRIDMOE_UNROLL
          for (int j = 0; j < W; ++j)
            v.value[j] = rounded<C>(to_float(v.value[j]) * r * to_float(g.value[j]));
          memory.row[i] = v;
        }
        if (y.given()) store<C, W>(y[t] + i * W, v);
      }
      sync_block();
      router_logits<C, W>(memory.row, router, d, experts, memory.logits);
      if (thread_index() < kWarp) {
        rule.route(memory.logits, memory.probs, memory.scores, probs[t], lse + t, topk[t], weights[t],
                   memory.sums);
      }
      sync_block();
    }
    if (partial == nullptr) return;
    double* joined = partial + block_x() * (2 * experts + GateSums::kExtra);
    for (int e = thread_index(); e < 2 * experts; e += block_threads())
      joined[e] = static_cast<double>(memory.sums.counts[e]);
    if (thread_index() < GateSums::kExtra)
      joined[2 * experts + thread_index()] = memory.sums.sums[thread_index()];
  }
};

template <class C, int W>
struct NormGateBackwardKernel : GateBackwardCall<C> {
  static constexpr int kThreads = 256;
  using Call = GateBackwardCall<C>;
  using Call::y, Call::sum, Call::gain, Call::router, Call::rule, Call::rstd, Call::probs, Call::lse,
      Call::topk, Call::weights, Call::dweights, Call::counts, Call::balance_scale, Call::z_scale, Call::dy,
      Call::skip, Call::dlogits, Call::dlogits_rounded, Call::dsum, Call::partial, Call::n, Call::d;

  HYBRIDMOE_DEVICE void operator()() const {
    const int experts = rule.experts;
    auto* row = shared_memory<Vector<C, W>>();
    auto* upstream = after<float>(row, d / W);
    float* dgain = upstream + d;
    float *of_row = dgain + d, *p = of_row + experts, *dl = p + experts, *loads = dl + experts;
    float* scratch = loads + experts;
    for (int e = thread_index(); e < experts; e += block_threads()) loads[e] = static_cast<float>(counts[e]);
    // Element j of vector i lies at j * d / W + i: neighbouring threads use neighbouring banks.
    const std::int64_t columns = d / W;
    for (std::int64_t i = thread_index(); i < d; i += block_threads()) dgain[i] = 0;
    sync_block();
    for (std::int64_t t = block_x(); t < n; t += grid_x()) {
      if (rule.sigmoid) {
        for (std::int64_t i = thread_index(); i < columns; i += block_threads())
          row[i] = load<C, W>(y[t] + i * W);
        sync_block();
        router_logits<C, W>(row, router, d, experts, of_row);
      }
      if (thread_index() < kWarp) {
        for (int e = thread_index(); e < experts; e += kWarp) p[e] = probs[t][e];
        sync_warp();
        rule.backward(p, of_row, rule.choice_of(topk[t], weights[t], dweights[t]), lse[t], loads,
                      balance_scale, z_scale, dl);
        for (int e = thread_index(); e < experts; e += kWarp) {
          dlogits[t][e] = dl[e];
          dlogits_rounded[t * experts + e] = rounded<C>(dl[e]);
        }
      }
      sync_block();
      const float r = gain != nullptr ? rstd[t] : 1;
      float dot = 0;
      for (std::int64_t i = thread_index(); i < columns; i += block_threads()) {
        const Vector<C, W> u = load_once<C, W>(dy[t] + i * W);
        float total[W];
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) total[j] = to_float(u.value[j]);
        for (int e = 0; e < experts; ++e) {
          const Vector<C, W> w = load<C, W>(router[e] + i * W);
          HYBRIDMOE_UNROLL
          for (int j = 0; j < W; ++j) total[j] += dl[e] * to_float(w.value[j]);
        }
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) upstream[j * columns + i] = total[j];
        if (gain == nullptr) continue;
        const Vector<C, W> x = load_once<C, W>(sum[t] + i * W), g = load<C, W>(gain + i * W);
        row[i] = x;
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) {
          const float product = total[j] * to_float(x.value[j]);
          dot += product * to_float(g.value[j]);
          dgain[j * columns + i] += product * r;
        }
      }
      float pull = 0;
      if (gain != nullptr) pull = r * r * r * (over_block<Plus>(dot, scratch) / static_cast<float>(d));
      for (std::int64_t i = thread_index(); i < columns; i += block_threads()) {
        Vector<C, W> passed = {}, x = {}, g = {};
        if (skip.given()) passed = load_once<C, W>(skip[t] + i * W);
        if (gain != nullptr) x = row[i], g = load<C, W>(gain + i * W);
        Vector<C, W> result;
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) {
          float own = upstream[j * columns + i];
          if (gain != nullptr) own = r * own * to_float(g.value[j]) - pull * to_float(x.value[j]);
          result.value[j] = rounded<C>(skip.given() ? own + to_float(passed.value[j]) : own);
        }
        store<C, W>(dsum[t] + i * W, result);
      }
      sync_block();
    }
    if (gain == nullptr) return;
    for (std::int64_t i = thread_index(); i < columns; i += block_threads())
      for (int j = 0; j < W; ++j) partial[block_x() * d + i * W + j] = dgain[j * columns + i];
  }
};

// What the router and the experts read: y, or without a norm what stands in for it.
const Tensor& gate_input(const NormGateForward& op) {
  if (!op.y.empty()) return op.y;
  return op.sum.empty() ? op.x : op.sum;
}

// Calls body(Constant<E>()) with the experts that tiles are made for; false: these sizes have none.
template <class Body>
bool with_gate_tiles(DType compute_type, bool vectors, std::int64_t d, std::int64_t experts,
                     const Body& body) {
  if (compute_type != DType::BF16 || !vectors || d % kGateChunk != 0 || experts > 128) return false;
  if (experts <= 32) {
    body(Constant<32>());
  } else if (experts <= 64) {
    body(Constant<64>());
  } else {
    body(Constant<128>());
  }
  return true;
}

}  // namespace

void CudaBackend::norm_gate_forward(const NormGateForward& op, Stream* stream) {
  const std::int64_t n = op.x.rows(), d = op.x.shape[1], experts = op.router.shape[0];
  if (n == 0) return;
  const bool statistics = !op.counts.empty();
  const bool vectors = in_vectors(d, {&op.x, &op.branch, &op.gain, &op.router, &op.sum, &op.y});
  const GateRule rule(op.rule, op.router, op.bias);
  const std::int64_t columns = 2 * experts + GateSums::kExtra;
  double* partial = nullptr;
  std::int64_t blocks = divide_up(n, kGateTokens);
  const auto allocate = [&] {
    if (statistics) partial = workspace<double>(blocks * columns, stream);
  };
  const bool in_tiles = with_gate_tiles(compute_type_, vectors, d, experts, [&]<int E>(Constant<E>) {
    using Kernel = GateTilesForward<E>;
    allocate();
    launch(Kernel{{op, rule, partial}},
           {.x = blocks, .threads = Kernel::kThreads, .shared_bytes = Kernel::shared_bytes(rule.experts)},
           stream);
  });
  if (!in_tiles) {
    blocks = row_parts(n, 4);
    allocate();
    with_vectors(compute_type_, vectors, [&]<class C, int W>(C, Constant<W>) {
      using Kernel = NormGateForwardKernel<C, W>;
      launch(Kernel{{op, rule, partial}},
             {.x = blocks,
              .threads = Kernel::kThreads,
              .shared_bytes = GateMemory<C, W>::bytes(d, static_cast<int>(experts))},
             stream);
    });
  }
  if (!statistics) return;
  launch(
      JoinGateSums{partial, blocks, rule.experts, elements<double>(op.counts), elements<double>(op.prob_sum),
                   elements<double>(op.sums), elements<double>(op.logit_max)},
      {.x = divide_up(columns, kWarp),
       .threads = JoinGateSums::kThreads,
       .shared_bytes = JoinGateSums::shared_bytes()},
      stream);
}

void CudaBackend::norm_gate_backward(const NormGateBackward& op, Stream* stream) {
  const NormGateForward& f = op.forward;
  const std::int64_t n = op.dy.rows(), d = op.dy.shape[1], experts = f.router.shape[0];
  if (n == 0) return;
  const Tensor &y = gate_input(f), &sum = f.sum.empty() ? f.x : f.sum;
  const bool norm = !f.gain.empty(), sigmoid = f.rule.scores == RouterScores::Sigmoid;
  const bool vectors = in_vectors(d, {&y, &sum, &f.gain, &f.router, &op.dy, &op.skip, &op.dsum});
  const GateRule rule(f.rule, f.router, f.bias);
  // Of the workspace: dgain by blocks, logits, the rounded gradients of the logits, the counts. Products use
  // none of it.
  std::int64_t blocks = row_parts(n, 4);
  const std::int64_t all = n * experts;
  const std::int64_t partial_words = norm ? divide_up(blocks * d, 4) * 4 : 0,
                     logit_words = divide_up(all, 4) * 4;
  auto* partial = workspace<float>(partial_words + 2 * logit_words + 2 * experts, stream);
  const Tensor logits(partial + partial_words, DType::F32, {n, experts}, device());
  const Tensor dlogits(partial + partial_words + logit_words, compute_type_, {n, experts}, device());
  // From host memory once, not by every block.
  const Tensor counts(partial + partial_words + 2 * logit_words, DType::F64, {experts}, device());
  copy(op.balance_counts, counts, stream);
  const GateBackwardMemory memory{counts, logits, dlogits, partial};
  const bool in_tiles = with_gate_tiles(compute_type_, vectors, d, experts, [&]<int E>(Constant<E>) {
    using Kernel = GateTilesBackward<E>;
    blocks = std::min(blocks, divide_up(n, kGateTokens));
    // A sigmoid loses what its logit was near 1.
    if (sigmoid) linear_forward({.x = y, .weight = f.router, .y = logits}, stream);
    launch(Kernel{{op, y, sum, rule, memory}},
           {.x = blocks, .threads = Kernel::kThreads, .shared_bytes = Kernel::shared_bytes(d, rule.experts)},
           stream);
  });
  if (!in_tiles)
    with_vectors(compute_type_, vectors, [&]<class C, int W>(C, Constant<W>) {
      using Kernel = NormGateBackwardKernel<C, W>;
      launch(Kernel{{op, y, sum, rule, memory}},
             {.x = blocks,
              .threads = Kernel::kThreads,
              .shared_bytes = shared_bytes_of<C>(d) + (2 * d + 4 * experts) * sizeof(float) + kScratchBytes},
             stream);
    });
  if (norm) join_partials<Plus>(partial, blocks, d, elements<float>(op.dgain), stream);
  linear_backward_weight({.x = y, .dy = dlogits, .dweight = op.drouter}, stream);
}

}  // namespace hybridmoe::cuda
