// The groups of a rank for tensors of a device: through host memory over the communicators that are there
// (staged_communicator.h), or on the device over NCCL, with those as the way of what lies in host memory.
// Either is ordered behind what is queued on the main stream: NCCL on the device, by events; host memory, and
// what is staged in it, by a wait of the host.
#pragma once

#include <memory>
#include <vector>

#include "core/backend.h"
#include "core/groups.h"

namespace hybridmoe {

enum class DeviceTransport { Staged, Nccl };

class DeviceGroups {
 public:
  // groups and backend outlive it. A backend whose tensors lie in host memory keeps the groups as they are.
  // Collective over the ranks of every group with Nccl; throws Error when NCCL fails.
  DeviceGroups(const Groups& groups, Backend& backend, DeviceTransport transport = DeviceTransport::Staged);
  const Groups& groups() const { return groups_; }

 private:
  std::vector<std::unique_ptr<Communicator>> communicators_;
  Groups groups_;
};

// Device tensors over `host`'s ranks by NCCL, tensors in host memory over `host`. Collective; both outlive
// it.
std::unique_ptr<Communicator> make_nccl_communicator(Communicator& host, Backend& backend);

}  // namespace hybridmoe
