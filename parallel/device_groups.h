// The groups of a rank for tensors of a device: through host memory over the communicators that are there
// (staged_communicator.h), or on the device over NCCL, with those as the way of what lies in host memory
// (device_communicator.h). Either is ordered behind what is queued on the main stream: NCCL on the device, by
// events; host memory, and what is staged in it, by a wait of the host.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "core/cuda_plugin.h"
#include "core/groups.h"
#include "parallel/device_communicator.h"
#include "parallel/watched_communicator.h"

namespace hybridmoe {

class DeviceGroups {
 public:
  // Makes the collectives of a group; collective over it.
  using MakeCollectives =
      std::function<std::unique_ptr<DeviceCollectives>(const NcclMember& member, Backend& backend)>;
  struct Nccl {
    const WatchedGroups* watched = nullptr;  // of the groups; null: nobody watches
    std::function<std::array<char, 128>()> make_id = make_nccl_id;
    MakeCollectives make = make_nccl_collectives;
  };

  // groups and backend outlive it. A backend whose tensors lie in host memory keeps the groups as they are.
  DeviceGroups(const Groups& groups, Backend& backend);
  // Over NCCL; collective over the ranks of every group. Throws Error when NCCL fails.
  DeviceGroups(const Groups& groups, Backend& backend, const Nccl& nccl);
  const Groups& groups() const { return groups_; }

  // For Backend::set_progress_hook: communication of all groups goes on; throws Error when a collective of
  // the device has failed. While the host waits for the device, the rank counts as waiting in the oldest of
  // them.
  void progress(Backend::Moment moment);

 private:
  // Each different member of the groups in the place of what it was.
  void replace(const std::function<std::unique_ptr<Communicator>(Communicator& host)>& make);
  std::unique_ptr<Communicator> join(Communicator& host, Backend& backend, const Nccl& nccl);

  std::vector<std::unique_ptr<Communicator>> communicators_;
  std::vector<DeviceCommunicator*> on_device_;
  std::optional<Activity::Waiting> waiting_;
  Groups groups_;
};

}  // namespace hybridmoe
