// The CPU backend: oneDNN for products with weights, OpenMP and loops that the compiler vectorises for the
// rest. Types are dispatched once, at the top of each operator; below, everything is a template over the
// compute type C (float or BFloat16) and computes in fp32. Nothing is allocated once every operator has seen
// its largest shape.
#pragma once

#include <vector>

#include "core/backend.h"
#include "core/cpu/gemm.h"
#include "core/cpu/scratch.h"

namespace hybridmoe::cpu {

// The groups of a grouped product: rows offsets[e] .. offsets[e + 1] have their own weight.
struct GroupedProduct {
  const std::int64_t* offsets;
  std::int64_t count;
  std::int64_t weight_elements;  // of one group
};

// A run of elements of a segment, and what an optimizer pass summed over it.
struct ElementBlock {
  std::int64_t begin, end;
  const Segment* segment;
  double sum[kUpdateColumns];  // the gradient table uses the first kGradColumns
  double largest;
};

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const CpuBackendOptions& options);

  std::string name() const override;
  Device device() const override { return Device::CPU; }
  DType compute_type() const override { return options_.compute_type; }

  // products.cc
  void linear_forward(const LinearForward&, Stream*) override;
  void linear_backward_input(const LinearBackwardInput&, Stream*) override;
  void linear_backward_weight(const LinearBackwardWeight&, Stream*) override;
  void add(const Tensor& a, const Tensor& b, const Tensor& y, Stream*) override;
  void convert(const Tensor& source, const Tensor& target, Stream*) override;
  void zero(const Tensor& target, Stream*) override;

  // norms.cc
  void residual_norm_forward(const ResidualNormForward&, Stream*) override;
  void residual_norm_backward(const ResidualNormBackward&, Stream*) override;
  void residual_statistics(const ResidualStatistics&, Stream*) override;

  // head_norms.cc
  void head_norm_statistics(const HeadNormStatistics&, Stream*) override;
  void head_norm_backward_statistics(const HeadNormBackwardStatistics&, Stream*) override;
  void head_norm_rope_forward(const HeadNormRopeForward&, Stream*) override;
  void head_norm_rope_backward(const HeadNormRopeBackward&, Stream*) override;

  // norm_gate.cc
  void norm_gate_forward(const NormGateForward&, Stream*) override;
  void norm_gate_backward(const NormGateBackward&, Stream*) override;

  // attention.cc, attention_backward.cc
  void attention_forward(const AttentionForward&, Stream*) override;
  void attention_backward(const AttentionBackward&, Stream*) override;

  // experts.cc
  void sort_slots(const SortSlots&, Stream*) override;
  void gather_rows(const GatherRows&, Stream*) override;
  void combine_rows(const CombineRows&, Stream*) override;
  void gather_scalars(const GatherScalars&, Stream*) override;
  void scatter_scalars(const ScatterScalars&, Stream*) override;
  void swiglu_forward(const SwigluForward&, Stream*) override;
  void swiglu_backward(const SwigluBackward&, Stream*) override;

  // dispatch.cc
  void dispatch_keys(const DispatchKeys&, Stream*) override;
  void count_dispatch(const CountDispatch&, Stream*) override;
  void pack_choices(const PackChoices&, Stream*) override;
  void combine_scalars(const CombineScalars&, Stream*) override;

  // loss.cc
  void embedding_forward(const EmbeddingForward&, Stream*) override;
  void embedding_backward(const EmbeddingBackward&, Stream*) override;
  void head_partial(const HeadPartial&, Stream*) override;
  void head_rescale(const HeadRescale&, Stream*) override;
  void head_finish(const HeadFinish&, Stream*) override;

  // optimizer.cc
  void grad_table(const GradTable&, Stream*) override;
  void step_scalars(const StepScalars&, Stream*) override;
  void adamw(const AdamW&, Stream*) override;
  void split_master(const SplitMaster&, Stream*) override;
  void join_master(const JoinMaster&, Stream*) override;

 private:
  // Calls body with a value of the compute type.
  template <class Body>
  void with_compute_type(const Body& body) const {
    if (options_.compute_type == DType::BF16) {
      body(BFloat16{});
    } else {
      body(float{});
    }
  }
  void run_product(const MatrixProduct& whole, const Tensor& offsets, std::int64_t weight_elements);
  void run_grouped(const MatrixProduct& whole, const GroupedProduct& groups);

  CpuBackendOptions options_;
  ProductEngine products_;
  Scratch scratch_;
  // Who multiplies which group of a grouped product; members so that their memory is kept.
  std::vector<int> group_order_, group_thread_;
  std::vector<std::int64_t> thread_rows_;
  std::vector<ElementBlock> blocks_;  // of the optimizer's current call; kept likewise
};

}  // namespace hybridmoe::cpu
