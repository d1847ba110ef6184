// RMSNorm on the residual stream: one pass over device memory each way, a row per block at a time.
#include <algorithm>

#include "core/cuda/partials.h"
#include "core/cuda/residual_row.h"

namespace hybridmoe::cuda {
namespace {

template <class C, int W>
struct ResidualNormForwardKernel {
  static constexpr int kThreads = 512;
  Rows<const C> x, branch;
  const C* gain;
  Rows<C> sum, y;
  float* rstd;
  std::int64_t d;
  float eps;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t t = block_x();
    // What a thread puts there is read by itself only.
    auto* row = shared_memory<Vector<C, W>>();
    float squares = read_residual<C, W>(x, branch, sum, t, d, row);
    squares = over_block<Plus>(squares, after<float>(row, d / W));
    const float r = reciprocal_root(squares / static_cast<float>(d) + eps);
    if (thread_index() == 0) rstd[t] = r;
    for (std::int64_t i = thread_index(); i < d / W; i += block_threads()) {
      Vector<C, W> v = row[i];
      const Vector<C, W> g = load<C, W>(gain + i * W);
      HYBRIDMOE_UNROLL
      for (int j = 0; j < W; ++j) v.value[j] = rounded<C>(to_float(v.value[j]) * r * to_float(g.value[j]));
      store<C, W>(y[t] + i * W, v);
    }
  }
};

// Starts a copy of a vector to shared memory, for the thread itself; what is shorter than 16 bytes is there
// at once.
template <class C, int W>
HYBRIDMOE_DEVICE void start_copy_of(Packed<C, W>* to, const C* from) {
  if constexpr (sizeof(Packed<C, W>) == 16) {
    start_copy(to, from);
  } else {
    *to = load_packed<C, W>(from);
  }
}

// Blocks take rows in turns and keep their part of dgain, column by column, in shared memory.
template <class C, int W>
struct ResidualNormBackwardKernel {
  static constexpr int kThreads = 512;
  static constexpr int kBlocksPerProcessor = 4;  // twice as many of half as many threads
  Rows<const C> dy, sum;
  const float* rstd;
  const C* gain;
  Rows<const C> skip;
  Rows<C> dsum;
  float* partial;  // [blocks, d]
  std::int64_t n, d;

  HYBRIDMOE_DEVICE void operator()() const {
    auto* upstream = shared_memory<Packed<C, W>>();
    auto* normed = after<Packed<C, W>>(upstream, d / W);
    auto* passed = after<Packed<C, W>>(normed, d / W);
    auto* dgain = after<float>(passed, d / W);
    auto* scratch = after<float>(dgain, d);
    // Element j of vector i lies at j * d / W + i: neighbouring threads use neighbouring banks.
    for (std::int64_t i = thread_index(); i < d / W; i += block_threads())
      for (int j = 0; j < W; ++j) dgain[j * (d / W) + i] = 0;
    for (std::int64_t t = block_x(); t < n; t += grid_x()) {
      const float r = rstd[t];
      float dot = 0;
      for (std::int64_t i = thread_index(); i < d / W; i += block_threads()) {
        // Under way at once with the others, and in no register: it is needed behind the sum only.
        if (skip.given()) start_copy_of<C, W>(passed + i, skip[t] + i * W);
        const Packed<C, W> u = load_packed_once<C, W>(dy[t] + i * W);
        const Packed<C, W> x = load_packed_once<C, W>(sum[t] + i * W), g = load_packed<C, W>(gain + i * W);
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) {
          const float product = u[j] * x[j];
          dot += product * g[j];
          dgain[j * (d / W) + i] += product * r;
        }
        upstream[i] = u;
        normed[i] = x;
      }
      commit_copies();
      dot = over_block<Plus>(dot, scratch);
      wait_for_copies<0>();
      const float pull = r * r * r * (dot / static_cast<float>(d));
      for (std::int64_t i = thread_index(); i < d / W; i += block_threads()) {
        const Packed<C, W> u = upstream[i], x = normed[i], g = load_packed<C, W>(gain + i * W);
        Packed<C, W> s;
        if (skip.given()) s = passed[i];
        Vector<C, W> result;
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) {
          const float own = r * u[j] * g[j] - pull * x[j];
          result.value[j] = rounded<C>(skip.given() ? own + s[j] : own);
        }
        store<C, W>(dsum[t] + i * W, result);
      }
      sync_block();  // scratch is used again
    }
    for (std::int64_t i = thread_index(); i < d / W; i += block_threads())
      for (int j = 0; j < W; ++j) partial[block_x() * d + i * W + j] = dgain[j * (d / W) + i];
  }
};

// In double: squares of small values vanish in fp32. partial [blocks] of sums, then [blocks] of maxima.
template <class C, int W>
struct ResidualStatisticsKernel {
  static constexpr int kThreads = 256;
  Rows<const C> x;
  double* partial;
  std::int64_t n, d;

  HYBRIDMOE_DEVICE void operator()() const {
    double squares = 0;
    float most = 0;
    for (std::int64_t t = block_x(); t < n; t += grid_x()) {
      for (std::int64_t i = thread_index(); i < d / W; i += block_threads()) {
        const Vector<C, W> v = load<C, W>(x[t] + i * W);
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) {
          const float value = to_float(v.value[j]), size = value < 0 ? -value : value;
          squares += static_cast<double>(value) * static_cast<double>(value);
          most = size > most ? size : most;  // a NaN is not larger
        }
      }
    }
    double* scratch = shared_memory<double>();
    squares = over_block<Plus>(squares, scratch);
    sync_block();
    const double largest = over_block<Larger>(static_cast<double>(most), scratch);
    if (thread_index() != 0) return;
    partial[block_x()] = squares;
    partial[grid_x() + block_x()] = largest;
  }
};

constexpr std::size_t kScratchBytes = 32 * sizeof(double);  // of over_block

}  // namespace

void CudaBackend::residual_norm_forward(const ResidualNormForward& op, Stream* stream) {
  const std::int64_t n = op.x.rows(), d = op.x.shape[1];
  if (n == 0) return;
  const bool vectors = in_vectors(d, {&op.x, &op.branch, &op.gain, &op.sum, &op.y});
  with_vectors(compute_type_, vectors, [&]<class C, int W>(C, Constant<W>) {
    using Kernel = ResidualNormForwardKernel<C, W>;
    launch(Kernel{Rows<const C>(op.x), Rows<const C>(op.branch), elements<const C>(op.gain), Rows<C>(op.sum),
                  Rows<C>(op.y), elements<float>(op.rstd), d, static_cast<float>(op.eps)},
           {.x = n,
            .threads = threads_for(d / W, Kernel::kThreads),
            .shared_bytes = shared_bytes_of<C>(d) + kScratchBytes},
           stream);
  });
}

void CudaBackend::residual_norm_backward(const ResidualNormBackward& op, Stream* stream) {
  const std::int64_t n = op.dy.rows(), d = op.dy.shape[1];
  if (n == 0) return;
  const bool vectors = in_vectors(d, {&op.dy, &op.sum, &op.gain, &op.skip, &op.dsum});
  std::int64_t blocks = 0;
  float* partial = nullptr;
  with_vectors(compute_type_, vectors, [&]<class C, int W>(C, Constant<W>) {
    using Kernel = ResidualNormBackwardKernel<C, W>;
    const int threads = threads_for(d / W, Kernel::kThreads);
    blocks = row_parts(n, 4, Kernel::kBlocksPerProcessor * (threads <= Kernel::kThreads / 2 ? 2 : 1));
    partial = workspace<float>(blocks * d, stream);
    launch(Kernel{Rows<const C>(op.dy), Rows<const C>(op.sum), elements<const float>(op.rstd),
                  elements<const C>(op.gain), Rows<const C>(op.skip), Rows<C>(op.dsum), partial, n, d},
           {.x = blocks,
            .threads = threads,
            .shared_bytes = 3 * shared_bytes_of<C>(d) + shared_bytes_of<float>(d) + kScratchBytes},
           stream);
  });
  join_partials<Plus>(partial, blocks, d, elements<float>(op.dgain), stream);
}

void CudaBackend::residual_statistics(const ResidualStatistics& op, Stream* stream) {
  const std::int64_t n = op.x.rows(), d = op.x.shape[1];
  if (n == 0) return;
  const std::int64_t blocks = row_parts(n, 1);
  auto* partial = workspace<double>(2 * blocks, stream);
  with_vectors(compute_type_, in_vectors(d, {&op.x}), [&]<class C, int W>(C, Constant<W>) {
    using Kernel = ResidualStatisticsKernel<C, W>;
    launch(Kernel{Rows<const C>(op.x), partial, n, d},
           {.x = blocks, .threads = threads_for(d / W, Kernel::kThreads), .shared_bytes = kScratchBytes},
           stream);
  });
  join_partials<Plus>(partial, blocks, 1, elements<double>(op.squares), stream);
  if (!op.absmax.empty()) {
    join_partials<Larger>(partial + blocks, blocks, 1, elements<double>(op.absmax), stream);
  }
}

}  // namespace hybridmoe::cuda
