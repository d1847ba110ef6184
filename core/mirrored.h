// A tensor that both the host and the operators read or write: one buffer where both reach it, else one on
// either side and copies between them.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "core/memory_plan.h"

namespace hybridmoe {

class Mirrored {
 public:
  // As MemoryPlan::add_rows; must stay where it is until the plan is committed.
  void plan(MemoryPlan& memory, const Backend& backend, const std::string& name, const Shape& shape,
            std::int64_t expected_rows, DType dtype, const std::string& component) {
    apart_ = backend.device() != Device::CPU;
    if (apart_) memory.add_shared(&host_, name + " on the host", shape, dtype, component);
    memory.add_rows(apart_ ? &device_ : &host_, name, shape, expected_rows, dtype, component);
  }
  void plan(MemoryPlan& memory, const Backend& backend, const std::string& name, const Shape& shape,
            DType dtype, const std::string& component) {
    plan(memory, backend, name, shape, shape[0], dtype, component);
  }

  const Tensor& host() const { return host_; }  // touch it only while no copy of it is queued
  const Tensor& device() const { return apart_ ? device_ : host_; }

  // The operators' copy of rows begin .. end = the host's. Queued.
  void upload(std::int64_t begin, std::int64_t end, Backend& backend, Stream* stream) const {
    if (apart_) backend.copy(host_.rows(begin, end), device_.rows(begin, end), stream);
  }
  void upload(Backend& backend, Stream* stream) const { upload(0, host_.rows(), backend, stream); }
  // The other way round; waits.
  void download(std::int64_t begin, std::int64_t end, Backend& backend, Stream* stream) const {
    if (apart_) backend.copy(device_.rows(begin, end), host_.rows(begin, end), stream);
    backend.synchronize(stream);
  }
  void download(Backend& backend, Stream* stream) const { download(0, host_.rows(), backend, stream); }

 private:
  Tensor host_, device_;
  bool apart_ = false;
};

}  // namespace hybridmoe
