// A bucket's master weights as the host reads and writes them, however they are kept (OptimizerState).
// Writing rounds the owned weights too; other ranks get them when they are gathered.
#pragma once

#include "core/host_parts.h"
#include "core/parameter_store.h"

namespace hybridmoe {

class HostMasters {
 public:
  HostMasters(Backend& backend, HostParts& host) : backend_(backend), host_(host) {}  // which must outlive it

  // Calls use(part) for consecutive parts [.] S of the masters of owned elements begin .. end of the bucket's
  // shard, in host memory. Waits for what is queued.
  void read(const ParameterStore::Bucket& bucket, std::int64_t begin, std::int64_t end,
            const std::function<void(const Tensor& part)>& use);
  // Calls change(part) likewise: each part is changed where it is.
  void update(const ParameterStore::Bucket& bucket, std::int64_t begin, std::int64_t end,
              const std::function<void(const Tensor& part)>& change);

 private:
  Backend& backend_;
  HostParts& host_;
};

}  // namespace hybridmoe
