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

}  // namespace

void CpuBackend::residual_norm_forward(const ResidualNormForward& op, Stream*) {
  with_compute_type([&]<class C>(C) { forward<C>(op, options_.threads); });
  progress();
}

void CpuBackend::residual_norm_backward(const ResidualNormBackward& op, Stream*) {
  with_compute_type([&]<class C>(C) { backward<C>(op, options_.threads, scratch_); });
  progress();
}

}  // namespace hybridmoe::cpu
