// The CUDA backend: every operator as kernels of this folder, products with weights through cuBLASLt where
// that is the better one. The same sources run on the host executor (portable.h); what only a device has is
// in device.h and its two implementations.
//
// Work is queued on the given stream (null: the main stream) in the order of the calls. Reductions over rows
// go through partial results in a workspace, which a second kernel adds up in a fixed order; nothing is
// allocated once every operator has seen its largest shape.
#pragma once

#include <memory>
#include <vector>

#include "core/backend.h"
#include "core/cuda/device.h"
#include "core/cuda/segment_blocks.h"
#include "core/cuda_plugin.h"

namespace hybridmoe::cuda {

class CudaBackend final : public Backend {
 public:
  // device: where it runs. compute_type: F32 or BF16. Throws Error when the device cannot run `grouped`.
  CudaBackend(std::unique_ptr<DeviceRuntime> device, DType compute_type, GroupedKernels grouped);
  ~CudaBackend() override;

  std::string name() const override { return device_->name(); }
  Device device() const override { return device_->kind(); }
  DType compute_type() const override { return compute_type_; }
  void* allocate(std::size_t bytes) override { return device_->allocate(bytes); }
  void release(void* memory, std::size_t bytes) noexcept override { device_->release(memory, bytes); }
  std::int64_t granule() const override { return device_->granule(); }
  void* reserve(std::size_t bytes) override {
    return granule() > 0 ? device_->reserve(bytes) : device_->allocate(bytes);
  }
  void map(void* reserved, std::int64_t begin, std::int64_t end) override;
  void release_reserved(void* reserved, std::size_t bytes) noexcept override {
    granule() > 0 ? device_->release_reserved(reserved, bytes) : device_->release(reserved, bytes);
  }
  void* allocate_shared(std::size_t bytes) override { return device_->allocate_shared(bytes); }
  void release_shared(void* memory, std::size_t bytes) noexcept override {
    device_->release_shared(memory, bytes);
  }
  void copy(const Tensor& source, const Tensor& target, Stream* stream) override {
    if (source.bytes() > 0)
      device_->copy(target.data, source.data, static_cast<std::size_t>(source.bytes()), stream);
  }
  Stream* main_stream() override { return device_->main_stream(); }
  void synchronize(Stream* stream) override;
  void mark(Stream* stream) override { device_->mark(stream); }
  void await_mark() override;

  // products.cu
  void linear_forward(const LinearForward&, Stream*) override;
  void linear_backward_input(const LinearBackwardInput&, Stream*) override;
  void linear_backward_weight(const LinearBackwardWeight&, Stream*) override;
  void add(const Tensor& a, const Tensor& b, const Tensor& y, Stream*) override;
  void convert(const Tensor& source, const Tensor& target, Stream*) override;
  void zero(const Tensor& target, Stream*) override;

  // norms.cu
  void residual_norm_forward(const ResidualNormForward&, Stream*) override;
  void residual_norm_backward(const ResidualNormBackward&, Stream*) override;
  void residual_statistics(const ResidualStatistics&, Stream*) override;

  // head_norms.cu
  void head_norm_statistics(const HeadNormStatistics&, Stream*) override;
  void head_norm_backward_statistics(const HeadNormBackwardStatistics&, Stream*) override;
  void head_norm_rope_forward(const HeadNormRopeForward&, Stream*) override;
  void head_norm_rope_backward(const HeadNormRopeBackward&, Stream*) override;

  // norm_gate.cu
  void norm_gate_forward(const NormGateForward&, Stream*) override;
  void norm_gate_backward(const NormGateBackward&, Stream*) override;

  // attention.cu
  void attention_forward(const AttentionForward&, Stream*) override;
  void attention_backward(const AttentionBackward&, Stream*) override;

  // experts.cu
  void sort_slots(const SortSlots&, Stream*) override;
  void gather_rows(const GatherRows&, Stream*) override;
  void combine_rows(const CombineRows&, Stream*) override;
  void gather_scalars(const GatherScalars&, Stream*) override;
  void scatter_scalars(const ScatterScalars&, Stream*) override;
  void swiglu_forward(const SwigluForward&, Stream*) override;
  void swiglu_backward(const SwigluBackward&, Stream*) override;

  // dispatch.cu
  void dispatch_keys(const DispatchKeys&, Stream*) override;
  void count_dispatch(const CountDispatch&, Stream*) override;
  void pack_choices(const PackChoices&, Stream*) override;
  void combine_scalars(const CombineScalars&, Stream*) override;

  // embedding.cu
  void embedding_forward(const EmbeddingForward&, Stream*) override;
  void embedding_backward(const EmbeddingBackward&, Stream*) override;

  // loss.cu
  void head_partial(const HeadPartial&, Stream*) override;
  void head_rescale(const HeadRescale&, Stream*) override;
  void head_finish(const HeadFinish&, Stream*) override;

  // optimizer.cu
  void grad_table(const GradTable&, Stream*) override;
  void step_scalars(const StepScalars&, Stream*) override;
  void adamw(const AdamW&, Stream*) override;
  void split_master(const SplitMaster&, Stream*) override;
  void join_master(const JoinMaster&, Stream*) override;

 private:
  template <class Done>
  void poll(const Done& done);
  // Memory for partial results of one operator: valid until the next call. Never shrinks.
  template <class T>
  T* workspace(std::int64_t count, Stream* stream) {
    return static_cast<T*>(workspace_.get(*device_, count * static_cast<std::int64_t>(sizeof(T)), stream));
  }
  // Blocks that fill the device when each has a part of the rows, `per_processor` that a processor holds at
  // once: at least `least` rows each, the same number for the same n.
  std::int64_t row_parts(std::int64_t n, std::int64_t least, int per_processor = 4) const;
  void multiply(const Product& product, Stream* stream);
  const SegmentBlocks& blocks_of(const std::vector<Segment>& segments, Stream* stream);

  std::unique_ptr<DeviceRuntime> device_;
  DType compute_type_;
  GroupedKernels grouped_;
  GrowingMemory workspace_;
  std::vector<std::unique_ptr<SegmentBlocks>> segment_blocks_;  // of every list of segments seen
};

}  // namespace hybridmoe::cuda
