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

  // The operators' copy = the host's. Queued.
  void upload(Backend& backend, Stream* stream) const {
    if (apart_) backend.copy(host_, device_, stream);
  }
  // The other way round. Queued, and marked: the host's copy is there after Backend::await_mark.
  void start_download(Backend& backend, Stream* stream) const {
    if (apart_) backend.copy(device_, host_, stream);
    backend.mark(stream);
  }
  void download(Backend& backend, Stream* stream) const {
    start_download(backend, stream);
    backend.await_mark();
  }

 private:
  Tensor host_, device_;
  bool apart_ = false;
};

}  // namespace hybridmoe
