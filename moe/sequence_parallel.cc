#include "moe/sequence_parallel.h"

namespace hybridmoe {

void SequenceParallel::plan(MemoryPlan& memory, std::int64_t rows, std::int64_t d) {
  if (ranks() == 1) return;
  const DType C = backend_.compute_type();
  memory.add(&buffers_[kFirst], "gathered rows", {ranks() * rows, d}, C, "gathered rows");
  memory.add(&buffers_[kSecond], "gathered rows 2", {ranks() * rows, d}, C, "gathered rows");
  memory.add(&sum_, "summed rows", {rows, d}, C, "gathered rows");
}

SequenceParallel::Gathering SequenceParallel::gather(const Tensor& own, Buffer buffer, const char* label) {
  if (ranks() == 1) return {own, {}};
  const Tensor all = buffers_[buffer].rows(0, ranks() * own.rows());
  return {all, tensor_.all_gather(own, all, label)};
}

Tensor SequenceParallel::partial(const Tensor& target, Buffer buffer) const {
  return ranks() == 1 ? target : buffers_[buffer].rows(0, ranks() * target.rows());
}

void SequenceParallel::reduce(const Tensor& partial, const Tensor& target, bool accumulate, const char* label,
                              Stream* stream) {
  if (ranks() == 1) return;
  const Tensor sum = accumulate ? sum_.rows(0, target.rows()) : target;
  tensor_.reduce_scatter(partial, sum, label).wait();
  if (accumulate) backend_.add(target, sum, target, stream);
}

}  // namespace hybridmoe
