// LM head with cross-entropy.
#include <algorithm>
#include <cmath>

#include "core/cuda/cuda_backend.h"
#include "core/cuda/local_row.h"
#include "core/cuda/reduce.h"
#include "core/cuda/rows.h"

namespace hybridmoe::cuda {
namespace {

// Reads of a thread that are under way together in a pass over logits: without, a row waits for memory most
// of the time.
constexpr int kHeadReads = 4;

// A block per token: padding, the largest logit, the sum of exponentials.
template <int W>
struct HeadPartialKernel {
  static constexpr int kThreads = 512;
  Rows<float> logits;
  LocalRow target_row;
  int valid;  // columns that are real
  float *most, *sumexp, *target_logit;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t t = block_x();
    const int columns = static_cast<int>(target_row.rows), step = block_threads() * W, whole = valid / W * W;
    float* row = logits[t];
    float top = -INFINITY, sum = 0;
    for (int j = thread_index() * W; j < whole; j += kHeadReads * step) {
      Vector<float, W> v[kHeadReads];
      HYBRIDMOE_UNROLL
      for (int r = 0; r < kHeadReads; ++r) {
        if (j + r * step < whole) {
          v[r] = load<float, W>(row + j + r * step);
        } else {
          HYBRIDMOE_UNROLL
          for (int i = 0; i < W; ++i) v[r].value[i] = -INFINITY;
        }
      }
      float larger = top;
      HYBRIDMOE_UNROLL
      for (int i = 0; i < kHeadReads * W; ++i) larger = fmaxf(larger, v[i / W].value[i % W]);
      if (larger > top) sum *= expf(top - larger), top = larger;
      HYBRIDMOE_UNROLL
      for (int i = 0; i < kHeadReads * W; ++i) sum += expf(v[i / W].value[i % W] - top);
    }
    for (int j = whole + thread_index(); j < valid; j += block_threads()) {
      const float larger = fmaxf(top, row[j]);
      if (larger > top) sum *= expf(top - larger), top = larger;
      sum += expf(row[j] - top);
    }
    for (int j = valid + thread_index(); j < columns; j += block_threads()) row[j] = -INFINITY;
    float* scratch = shared_memory<float>();
    const float largest = over_block<Larger>(top, scratch);
    sync_block();
    sum = top == -INFINITY ? sum : sum * expf(top - largest);
    sum = over_block<Plus>(sum, scratch);
    if (thread_index() != 0) return;
    const std::int64_t target = target_row(t);
    most[t] = largest;
    sumexp[t] = largest == -INFINITY ? 0 : sum;
    target_logit[t] = target == columns ? 0 : target < valid ? row[target] : -INFINITY;
  }
};

struct HeadRescaleKernel {
  static constexpr int kThreads = 256;
  const float *most, *global_max;
  float* sumexp;
  std::int64_t count;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t t = block_x() * block_threads() + thread_index();
    if (t < count) sumexp[t] *= expf(most[t] - global_max[t]);
  }
};

// One block: sums and maxima over the tokens of a chunk.
struct HeadSumsKernel {
  static constexpr int kThreads = 512;
  const std::int32_t* targets;
  const float *most, *sumexp, *target_logit;
  float* token_loss;
  double *sums, *logit_max, *lse_max;
  std::int64_t count;

  HYBRIDMOE_DEVICE void operator()() const {
    double sum[kHeadSums] = {}, top = -INFINITY, largest_lse = -INFINITY;
    for (std::int64_t t = thread_index(); t < count; t += block_threads()) {
      const bool counts = targets[t] >= 0;
      const float lse = most[t] + logf(sumexp[t]);
      if (token_loss != nullptr) token_loss[t] = counts ? lse - target_logit[t] : 0;
      if (!counts) continue;
      sum[kHeadCrossEntropy] += static_cast<double>(lse) - static_cast<double>(target_logit[t]);
      sum[kHeadTargets] += 1;
      sum[kHeadLse] += static_cast<double>(lse);
      top = Larger::of(top, static_cast<double>(most[t]));
      largest_lse = Larger::of(largest_lse, static_cast<double>(lse));
    }
    double* scratch = shared_memory<double>();
    for (int s = 0; s < kHeadSums; ++s) {
      sum[s] = over_block<Plus>(sum[s], scratch);
      sync_block();
    }
    top = over_block<Larger>(top, scratch);
    sync_block();
    largest_lse = over_block<Larger>(largest_lse, scratch);
    if (thread_index() != 0) return;
    for (int s = 0; s < kHeadSums; ++s) sums[s] += sum[s];
    if (logit_max != nullptr) *logit_max = Larger::of(*logit_max, top);
    if (lse_max != nullptr) *lse_max = Larger::of(*lse_max, largest_lse);
  }
};

// A block per token: the gradient of scale · loss in the place of the logits, or in C beside them, W at once.
template <class C, int W>
struct HeadGradientKernel {
  static constexpr int kThreads = 512, kRead = W < 4 ? W : 4, kParts = W / kRead;
  static constexpr int kBatch = kHeadReads / kParts;
  Rows<const float> logits;
  LocalRow target_row;
  const std::int32_t* targets;
  const float *most, *sumexp;
  Rows<C> dlogits;
  float scale;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t t = block_x();
    const int columns = static_cast<int>(target_row.rows), target = static_cast<int>(target_row(t));
    const int step = block_threads() * W;
    const float* from = logits[t];
    C* to = dlogits[t];
    if (targets[t] < 0) {
      for (int j = thread_index() * W; j < columns; j += step) store<C, W>(to + j, Vector<C, W>{});
      return;
    }
    const float top = most[t], share = 1 / sumexp[t];
    for (int j = thread_index() * W; j < columns; j += kBatch * step) {
      Vector<float, kRead> logit[kBatch][kParts];
      HYBRIDMOE_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        if (j + b * step >= columns) continue;
        HYBRIDMOE_UNROLL
        for (int part = 0; part < kParts; ++part)
          logit[b][part] = load_once<float, kRead>(from + j + b * step + part * kRead);
      }
      HYBRIDMOE_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int first = j + b * step;
        if (first >= columns) continue;
        Vector<C, W> gradient;
        HYBRIDMOE_UNROLL
        for (int i = 0; i < W; ++i) {
          const float p = expf(logit[b][i / kRead].value[i % kRead] - top) * share;
          gradient.value[i] = rounded<C>(scale * (p - (first + i == target ? 1.0f : 0.0f)));
        }
        store<C, W>(to + first, gradient);
      }
    }
  }
};

constexpr std::size_t kScratchBytes = 32 * sizeof(double);  // of over_block

}  // namespace

void CudaBackend::head_partial(const HeadPartial& op, Stream* stream) {
  const std::int64_t tokens = op.h.rows(), columns = op.weight.rows();
  if (tokens == 0) return;
  linear_forward({.x = op.h, .weight = op.weight, .y = op.logits}, stream);
  const LocalRow target_row{elements<const std::int32_t>(op.targets), op.first_row, columns};
  const auto valid = std::clamp<std::int64_t>(op.valid_rows - op.first_row, 0, columns);
  const auto run = [&]<int W>(Constant<W>) {
    using Kernel = HeadPartialKernel<W>;
    launch(Kernel{Rows<float>(op.logits), target_row, static_cast<int>(valid), elements<float>(op.max),
                  elements<float>(op.sumexp), elements<float>(op.target_logit)},
           {.x = tokens,
            .threads = threads_for(divide_up(columns, W), Kernel::kThreads),
            .shared_bytes = kScratchBytes},
           stream);
  };
  in_vectors(columns, {&op.logits}) ? run(Constant<4>()) : run(Constant<1>());
}

void CudaBackend::head_rescale(const HeadRescale& op, Stream* stream) {
  const std::int64_t count = op.sumexp.elements();
  if (count == 0) return;
  launch(HeadRescaleKernel{elements<const float>(op.max), elements<const float>(op.global_max),
                           elements<float>(op.sumexp), count},
         {.x = divide_up(count, HeadRescaleKernel::kThreads), .threads = HeadRescaleKernel::kThreads},
         stream);
}

void CudaBackend::head_finish(const HeadFinish& op, Stream* stream) {
  const std::int64_t tokens = op.h.rows(), columns = op.weight.rows();
  if (tokens == 0) return;
  launch(HeadSumsKernel{elements<const std::int32_t>(op.targets), elements<const float>(op.max),
                        elements<const float>(op.sumexp), elements<const float>(op.target_logit),
                        elements<float>(op.token_loss), elements<double>(op.sums),
                        elements<double>(op.logit_max), elements<double>(op.lse_max), tokens},
         {.x = 1, .threads = threads_for(tokens, HeadSumsKernel::kThreads), .shared_bytes = kScratchBytes},
         stream);
  if (op.dh.empty() && op.dweight.empty()) return;
  const Tensor& gradient = compute_type_ == DType::F32 ? op.logits : op.dlogits;
  const bool vectors = in_vectors(columns, {&op.logits, &gradient});
  with_vectors(compute_type_, vectors, [&]<class C, int W>(C, Constant<W>) {
    using Kernel = HeadGradientKernel<C, W>;
    const LocalRow target_row{elements<const std::int32_t>(op.targets), op.first_row, columns};
    launch(Kernel{Rows<const float>(op.logits), target_row, elements<const std::int32_t>(op.targets),
                  elements<const float>(op.max), elements<const float>(op.sumexp), Rows<C>(gradient),
                  static_cast<float>(op.scale)},
           {.x = tokens, .threads = threads_for(divide_up(columns, W), Kernel::kThreads)}, stream);
  });
  if (!op.dh.empty()) linear_backward_input({.dy = gradient, .weight = op.weight, .dx = op.dh}, stream);
  if (!op.dweight.empty()) {
    linear_backward_weight({.x = op.h, .dy = gradient, .dweight = op.dweight}, stream);
  }
}

}  // namespace hybridmoe::cuda
