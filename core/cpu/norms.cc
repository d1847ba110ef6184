// RMSNorm on the residual stream.
#include <cmath>

#include "core/cpu/cpu_backend.h"
#include "core/cpu/parallel.h"
#include "core/cpu/row_norm.h"

namespace hybridmoe::cpu {
namespace {

template <class C>
void forward(const ResidualNormForward& op, int threads) {
  const std::int64_t d = op.gain.elements();
  const C* gain = op.gain.ptr<C>();
  parallel_ranges(threads, op.x.rows(), row_grain(d * 4 * sizeof(C)),
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t t = begin; t < end; ++t) {
                      const C* sum = row_of<C>(op.x, t);
                      if (!op.branch.empty()) {
                        add_rows(sum, row_of<C>(op.branch, t), row_of<C>(op.sum, t), d);
                        sum = row_of<C>(op.sum, t);
                      } else if (!op.sum.empty() && op.sum.data != op.x.data) {
                        std::copy_n(sum, d, row_of<C>(op.sum, t));
                      }
                      const float rstd = rstd_of(sum_of_squares(sum, d), d, op.eps);
                      op.rstd.ptr<float>()[t] = rstd;
                      scale_row(sum, rstd, gain, row_of<C>(op.y, t), d);
                    }
                  });
}

template <class C>
void backward(const ResidualNormBackward& op, int threads, Scratch& scratch) {
  const std::int64_t d = op.gain.elements();
  const C* gain = op.gain.ptr<C>();
  PartialSums dgain(scratch, threads, d);
  parallel_ranges(threads, op.dy.rows(), row_grain(d * 4 * sizeof(C)),
                  [&](std::int64_t begin, std::int64_t end, int thread) {
                    float* partial = dgain.of(thread);
                    for (std::int64_t t = begin; t < end; ++t) {
                      norm_backward_row(row_of<C>(op.dy, t), row_of<C>(op.sum, t), gain,
                                        op.rstd.ptr<float>()[t], optional_row<C>(op.skip, t),
                                        row_of<C>(op.dsum, t), partial, d);
                    }
                  });
  dgain.add_to(op.dgain.ptr<float>(), 0, d);
}

// Of some rows; doubles, since the squares of small gradients underflow in fp32.
struct StreamSums {
  double squares = 0;
  float largest = 0;
};

template <class C>
void add_row_to(const C* x, std::int64_t d, StreamSums& sums) {
  double squares = 0;
  float largest = sums.largest;
#pragma omp simd reduction(+ : squares) reduction(max : largest)
  for (std::int64_t i = 0; i < d; ++i) {
    const float value = to_float(x[i]);
    const float magnitude = std::fabs(value);
    squares += static_cast<double>(value) * static_cast<double>(value);
    largest = magnitude > largest ? magnitude : largest;
  }
  sums.squares += squares;
  sums.largest = largest;
}

template <class C>
void stream_sums(const ResidualStatistics& op, int threads, Scratch& scratch) {
  scratch.reserve(threads, sizeof(StreamSums));
  const auto of = [&](int thread) { return reinterpret_cast<StreamSums*>(scratch.block(thread)); };
  for (int thread = 0; thread < threads; ++thread) *of(thread) = {};
  parallel_ranges(threads, op.x.rows(), row_grain(op.x.shape[1] * sizeof(C)),
                  [&](std::int64_t begin, std::int64_t end, int thread) {
                    for (std::int64_t t = begin; t < end; ++t) {
                      add_row_to(row_of<C>(op.x, t), op.x.shape[1], *of(thread));
                    }
                  });
  for (int thread = 0; thread < threads; ++thread) {
    *op.squares.ptr<double>() += of(thread)->squares;
    if (op.absmax.empty()) continue;
    double& known = *op.absmax.ptr<double>();
    known = std::max(known, static_cast<double>(of(thread)->largest));
  }
}

}  // namespace

void CpuBackend::residual_norm_forward(const ResidualNormForward& op, Stream*) {
  with_compute_type([&]<class C>(C) { forward<C>(op, options_.threads); });
  progress();
}

void CpuBackend::residual_norm_backward(const ResidualNormBackward& op, Stream*) {
  with_compute_type([&]<class C>(C) { backward<C>(op, options_.threads, scratch_); });
  progress();
}

void CpuBackend::residual_statistics(const ResidualStatistics& op, Stream*) {
  with_compute_type([&]<class C>(C) { stream_sums<C>(op, options_.threads, scratch_); });
}

}  // namespace hybridmoe::cpu
