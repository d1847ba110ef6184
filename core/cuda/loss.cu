// Embedding, and LM head with cross-entropy. The embedding's gradient sorts the tokens by id, so that every
// row of the table is summed by one block, in the order of the tokens.
#include <algorithm>
#include <cmath>

#include "core/cuda/cuda_backend.h"
#include "core/cuda/reduce.h"
#include "core/cuda/rows.h"
#include "core/cuda/stable_sort.h"

namespace hybridmoe::cuda {
namespace {

constexpr int kDigitBits = 8;
constexpr std::int64_t kPiece = 32;  // sorted tokens of a block

// Row of a rank's part of the table, `rows` for a token that it does not hold.
struct LocalRow {
  const std::int32_t* tokens;
  std::int64_t first_row, rows;
  HYBRIDMOE_DEVICE std::int64_t operator()(std::int64_t t) const {
    const std::int64_t row = tokens[t] - first_row;
    return tokens[t] >= 0 && row >= 0 && row < rows ? row : rows;
  }
};

// One digit of the row of the i-th token in the order so far.
struct RowDigit {
  LocalRow row_of;
  const std::int32_t* order;  // null: as they come
  int shift;
  HYBRIDMOE_DEVICE int operator()(std::int64_t i) const {
    const std::int64_t row = row_of(order == nullptr ? i : order[i]);
    return static_cast<int>((row >> shift) & ((1 << kDigitBits) - 1));
  }
};
struct Reorder {
  const std::int32_t* from;
  std::int32_t* to;
  HYBRIDMOE_DEVICE void operator()(std::int64_t i, std::int32_t place) const {
    to[place] = from == nullptr ? static_cast<std::int32_t>(i) : from[i];
  }
};

template <class C, int W>
struct EmbeddingForwardKernel {
  static constexpr int kThreads = 256;
  LocalRow row_of;
  Rows<const C> weight;
  Rows<C> y;
  std::int64_t n, d;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t t = block_x() * (block_threads() / kWarp) + thread_index() / kWarp;
    if (t >= n) return;
    const std::int64_t row = row_of(t);
    for (std::int64_t i = thread_index() % kWarp; i < d / W; i += kWarp) {
      Vector<C, W> v = {};
      if (row < row_of.rows) v = load<C, W>(weight[row] + i * W);
      store<C, W>(y[t] + i * W, v);
    }
  }
};

// The rows of a piece of the sorted tokens, one more on either side, -1 beyond the ends: [kPiece + 2].
HYBRIDMOE_DEVICE void read_piece(const LocalRow& row_of, const std::int32_t* order, std::int64_t n,
                                 std::int64_t piece, std::int64_t* rows) {
  for (std::int64_t i = thread_index(); i < kPiece + 2; i += block_threads()) {
    const std::int64_t at = piece * kPiece + i - 1;
    rows[i] = at < 0 || at >= n ? -1 : row_of(order[at]);
  }
  sync_block();
}

// Sums the runs of equal rows within a piece of the sorted tokens. A run that reaches over an end of the
// piece goes to partial [pieces, 2, d]: into the first place when it comes from the piece before, else into
// the second.
template <class C>
struct SumRuns {
  static constexpr int kThreads = 256;
  LocalRow row_of;
  const std::int32_t* order;
  Rows<const C> dy;
  Rows<float> dweight;
  float* partial;
  std::int64_t n, d;

  HYBRIDMOE_DEVICE void operator()() const {
    auto* rows = shared_memory<std::int64_t>();
    read_piece(row_of, order, n, block_x(), rows);
    const std::int64_t begin = block_x() * kPiece;
    const int count = static_cast<int>(n - begin < kPiece ? n - begin : kPiece);
    for (std::int64_t i = thread_index(); i < d; i += block_threads()) {
      float sum = 0;
      bool comes_from_before = rows[0] == rows[1];
      for (int p = 1; p <= count; ++p) {
        if (rows[p] == row_of.rows) break;  // tokens of other ranks are the last
        sum += to_float(dy[order[begin + p - 1]][i]);
        if (p < count && rows[p + 1] == rows[p]) continue;
        const bool goes_on = rows[p + 1] == rows[p];
        if (comes_from_before || goes_on) {
          partial[(2 * block_x() + (comes_from_before ? 0 : 1)) * d + i] = sum;
        } else {
          dweight[rows[p]][i] += sum;
        }
        sum = 0;
        comes_from_before = false;
      }
    }
  }
};

// Adds up each run that reaches over pieces, from the piece where it begins on.
struct JoinRuns {
  static constexpr int kThreads = 256;
  LocalRow row_of;
  const std::int32_t* order;
  const float* partial;
  Rows<float> dweight;
  std::int64_t n, d;

  HYBRIDMOE_DEVICE void operator()() const {
    auto* rows = shared_memory<std::int64_t>();
    read_piece(row_of, order, n, block_x(), rows);
    const std::int64_t row = rows[kPiece];
    if (row < 0 || row == row_of.rows || rows[kPiece + 1] != row) return;
    int first = kPiece;  // of the run
    while (first > 1 && rows[first - 1] == row) --first;
    if (first == 1 && rows[0] == row) return;
    std::int64_t end = block_x() + 2;  // the first piece that does not begin with this row
    while (end * kPiece < n && row_of(order[end * kPiece]) == row) ++end;
    for (std::int64_t i = thread_index(); i < d; i += block_threads()) {
      float sum = partial[(2 * block_x() + 1) * d + i];
      for (std::int64_t piece = block_x() + 1; piece < end; ++piece) sum += partial[2 * piece * d + i];
      dweight[row][i] += sum;
    }
  }
};

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

void CudaBackend::embedding_forward(const EmbeddingForward& op, Stream* stream) {
  const std::int64_t n = op.tokens.elements(), d = op.weight.shape[1];
  if (n == 0) return;
  const LocalRow row_of{elements<const std::int32_t>(op.tokens), op.first_row, op.weight.rows()};
  with_vectors(compute_type_, in_vectors(d, {&op.weight, &op.y}), [&]<class C, int W>(C, Constant<W>) {
    using Kernel = EmbeddingForwardKernel<C, W>;
    launch(Kernel{row_of, Rows<const C>(op.weight), Rows<C>(op.y), n, d},
           {.x = divide_up(n, Kernel::kThreads / kWarp), .threads = Kernel::kThreads}, stream);
  });
}

void CudaBackend::embedding_backward(const EmbeddingBackward& op, Stream* stream) {
  const std::int64_t n = op.tokens.elements(), d = op.dy.shape[1], rows = op.dweight.rows();
  if (n == 0) return;
  const LocalRow row_of{elements<const std::int32_t>(op.tokens), op.first_row, rows};
  // Two orders, the workspace of the sort, the partial sums.
  const std::int64_t pieces = divide_up(n, kPiece), keys = 1 << kDigitBits;
  const std::int64_t sort_words = sort_workspace(n, keys) / static_cast<std::int64_t>(sizeof(float));
  float* memory = workspace<float>(2 * n + sort_words + 2 * pieces * d, stream);
  auto* orders = reinterpret_cast<std::int32_t*>(memory);
  float* partial = memory + 2 * n + sort_words;
  const std::int32_t* order = nullptr;
  int pass = 0;
  for (int shift = 0; shift == 0 || (rows >> shift) > 0; shift += kDigitBits, ++pass) {
    std::int32_t* sorted = orders + pass % 2 * n;
    stable_sort(RowDigit{row_of, order, shift}, Reorder{order, sorted}, n, static_cast<int>(keys), nullptr,
                orders + 2 * n, stream);
    order = sorted;
  }
  const Rows<float> dweight(op.dweight);
  const std::size_t shared = (kPiece + 2) * sizeof(std::int64_t);
  with_type(compute_type_, [&]<class C>(C) {
    using Kernel = SumRuns<C>;
    launch(Kernel{row_of, order, Rows<const C>(op.dy), dweight, partial, n, d},
           {.x = pieces, .threads = threads_for(d, Kernel::kThreads), .shared_bytes = shared}, stream);
  });
  launch(JoinRuns{row_of, order, partial, dweight, n, d},
         {.x = pieces, .threads = threads_for(d, JoinRuns::kThreads), .shared_bytes = shared}, stream);
}

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
