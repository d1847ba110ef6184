// Tensors of any backend as the host reads and writes them: where they lie, or part by part through a staging
// buffer where the host does not reach them. For what happens now and then: checkpoints, checks, biases.
#pragma once

#include <functional>
#include <optional>

#include "core/buffer.h"

namespace hybridmoe {

class HostParts {
 public:
  explicit HostParts(Backend& backend) : backend_(backend) {}  // which must outlive it

  // Calls use(part) for consecutive flat parts of a contiguous tensor, in host memory. Waits for what is
  // queued.
  void read(const Tensor& tensor, const std::function<void(const Tensor& part)>& use) {
    walk(tensor, true, false, use);
  }
  // Calls fill(part) likewise; what it leaves in the parts is the tensor's on return.
  void write(const Tensor& tensor, const std::function<void(const Tensor& part)>& fill) {
    walk(tensor, false, true, fill);
  }
  // Calls change(part): both.
  void update(const Tensor& tensor, const std::function<void(const Tensor& part)>& change) {
    walk(tensor, true, true, change);
  }

 private:
  void walk(const Tensor& tensor, bool in, bool out, const std::function<void(const Tensor&)>& body);

  Backend& backend_;
  std::optional<Buffer> staging_;  // made when it is needed
};

}  // namespace hybridmoe
