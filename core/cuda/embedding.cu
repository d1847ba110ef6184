// Embedding. Its gradient sorts the tokens by id, so that every row of the table is summed by one block, in
// the order of the tokens.
#include "core/cuda/cuda_backend.h"
#include "core/cuda/local_row.h"
#include "core/cuda/rows.h"
#include "core/cuda/stable_sort.h"

namespace hybridmoe::cuda {
namespace {

constexpr int kDigitBits = 8;
constexpr std::int64_t kPiece = 32;  // sorted tokens of a block

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
template <class C, int W>
struct SumRuns {
  static constexpr int kThreads = 256, kBatch = 4, kPart = W < 4 ? W : 4;
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
    int count = static_cast<int>(n - begin < kPiece ? n - begin : kPiece);
    while (count > 0 && rows[count] == row_of.rows) --count;  // tokens of other ranks are the last
    for (std::int64_t i = thread_index() * W; i < d; i += block_threads() * W) {
      float sum[W] = {};
      bool comes_from_before = rows[0] == rows[1];
      for (int first = 1; first <= count; first += kBatch) {
        Vector<C, W> v[kBatch];
        HYBRIDMOE_UNROLL
        for (int b = 0; b < kBatch; ++b)
          if (first + b <= count) v[b] = load_once<C, W>(dy[order[begin + first + b - 1]] + i);
        HYBRIDMOE_UNROLL
        for (int b = 0; b < kBatch; ++b) {
          const int p = first + b;
          if (p > count) continue;
          HYBRIDMOE_UNROLL
          for (int j = 0; j < W; ++j) sum[j] += to_float(v[b].value[j]);
          const bool goes_on = rows[p + 1] == rows[p];
          if (p < count && goes_on) continue;
          const bool whole = !comes_from_before && !goes_on;
          float* to = whole ? dweight[rows[p]] : partial + (2 * block_x() + (comes_from_before ? 0 : 1)) * d;
          put(sum, to + i, whole);
          HYBRIDMOE_UNROLL
          for (int j = 0; j < W; ++j) sum[j] = 0;
          comes_from_before = false;
        }
      }
    }
  }

 private:
  static HYBRIDMOE_DEVICE void put(const float (&sum)[W], float* to, bool add) {
    HYBRIDMOE_UNROLL
    for (int part = 0; part < W; part += kPart) {
      Vector<float, kPart> v = {};
      if (add) v = load<float, kPart>(to + part);
      HYBRIDMOE_UNROLL
      for (int j = 0; j < kPart; ++j) v.value[j] += sum[part + j];
      store<float, kPart>(to + part, v);
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
  const std::int64_t before = divide_up(2 * n + sort_words, 4) * 4;  // vectors follow
  float* memory = workspace<float>(before + 2 * pieces * d, stream);
  auto* orders = reinterpret_cast<std::int32_t*>(memory);
  float* partial = memory + before;
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
  const bool vectors = in_vectors(d, {&op.dy, &op.dweight});
  with_vectors(compute_type_, vectors, [&]<class C, int W>(C, Constant<W>) {
    using Kernel = SumRuns<C, W>;
    launch(Kernel{row_of, order, Rows<const C>(op.dy), dweight, partial, n, d},
           {.x = pieces, .threads = threads_for(divide_up(d, W), Kernel::kThreads), .shared_bytes = shared},
           stream);
  });
  launch(JoinRuns{row_of, order, partial, dweight, n, d},
         {.x = pieces, .threads = threads_for(d, JoinRuns::kThreads), .shared_bytes = shared}, stream);
}

}  // namespace hybridmoe::cuda
