// The reference backend: every operator as plain loops over doubles, in the order the formulas are written.
// It is what the other backends are measured against, and what `precision: F64` runs on. Readable before
// fast; no operator keeps more than one row of temporaries. C and S of core/operators/common.h are f64.
#pragma once

#include <cstdint>

#include "core/backend.h"

namespace hybridmoe::reference {

// The rows of a matrix of doubles, or the elements of a vector as rows of one; null for an absent tensor.
class Rows {
 public:
  Rows(double* data, std::int64_t stride) : data_(data), stride_(stride) {}
  explicit Rows(const Tensor& tensor)
      : data_(tensor.empty() ? nullptr : tensor.ptr<double>()), stride_(tensor.row_stride()) {}

  bool given() const { return data_ != nullptr; }
  double* operator[](std::int64_t row) const { return given() ? data_ + row * stride_ : nullptr; }

 private:
  double* data_;
  std::int64_t stride_;
};

// Elements of a vector or a contiguous tensor; null when absent.
inline double* elements_of(const Tensor& tensor) { return tensor.empty() ? nullptr : tensor.ptr<double>(); }

inline double dot(const double* a, const double* b, std::int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// y += scale · x
inline void add_scaled(double scale, const double* x, double* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] += scale * x[i];
}

class ReferenceBackend : public Backend {
 public:
  std::string name() const override { return "reference (f64)"; }
  Device device() const override { return Device::CPU; }
  DType compute_type() const override { return DType::F64; }

  void linear_forward(const LinearForward&, Stream*) override;
  void linear_backward_input(const LinearBackwardInput&, Stream*) override;
  void linear_backward_weight(const LinearBackwardWeight&, Stream*) override;
  void add(const Tensor& a, const Tensor& b, const Tensor& y, Stream*) override;
  void convert(const Tensor& source, const Tensor& target, Stream*) override;
  void zero(const Tensor& target, Stream*) override;

  void residual_norm_forward(const ResidualNormForward&, Stream*) override;
  void residual_norm_backward(const ResidualNormBackward&, Stream*) override;
  void residual_statistics(const ResidualStatistics&, Stream*) override;
  void head_norm_statistics(const HeadNormStatistics&, Stream*) override;
  void head_norm_backward_statistics(const HeadNormBackwardStatistics&, Stream*) override;
  void head_norm_rope_forward(const HeadNormRopeForward&, Stream*) override;
  void head_norm_rope_backward(const HeadNormRopeBackward&, Stream*) override;
  void norm_gate_forward(const NormGateForward&, Stream*) override;
  void norm_gate_backward(const NormGateBackward&, Stream*) override;

  void attention_forward(const AttentionForward&, Stream*) override;
  void attention_backward(const AttentionBackward&, Stream*) override;

  void sort_slots(const SortSlots&, Stream*) override;
  void gather_rows(const GatherRows&, Stream*) override;
  void combine_rows(const CombineRows&, Stream*) override;
  void gather_scalars(const GatherScalars&, Stream*) override;
  void scatter_scalars(const ScatterScalars&, Stream*) override;
  void dispatch_keys(const DispatchKeys&, Stream*) override;
  void count_dispatch(const CountDispatch&, Stream*) override;
  void pack_choices(const PackChoices&, Stream*) override;
  void combine_scalars(const CombineScalars&, Stream*) override;
  void swiglu_forward(const SwigluForward&, Stream*) override;
  void swiglu_backward(const SwigluBackward&, Stream*) override;

  void embedding_forward(const EmbeddingForward&, Stream*) override;
  void embedding_backward(const EmbeddingBackward&, Stream*) override;
  void head_partial(const HeadPartial&, Stream*) override;
  void head_rescale(const HeadRescale&, Stream*) override;
  void head_finish(const HeadFinish&, Stream*) override;

  void grad_table(const GradTable&, Stream*) override;
  void step_scalars(const StepScalars&, Stream*) override;
  void adamw(const AdamW&, Stream*) override;
  void split_master(const SplitMaster&, Stream*) override;
  void join_master(const JoinMaster&, Stream*) override;
};

}  // namespace hybridmoe::reference
