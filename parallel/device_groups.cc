#include "parallel/device_groups.h"

#include <map>

#include "parallel/staged_communicator.h"

namespace hybridmoe {

DeviceGroups::DeviceGroups(const Groups& groups, Backend& backend) : groups_(groups) {
  if (backend.device() != Device::CPU)
    replace([&](Communicator& host) { return make_staged_communicator(host, backend); });
}

DeviceGroups::DeviceGroups(const Groups& groups, Backend& backend, const Nccl& nccl) : groups_(groups) {
  replace([&](Communicator& host) {
    return host.size() > 1 ? join(host, backend, nccl) : make_staged_communicator(host, backend);
  });
}

void DeviceGroups::replace(const std::function<std::unique_ptr<Communicator>(Communicator&)>& make) {
  std::map<Communicator*, Communicator*> made;
  for (auto member : {&Groups::world, &Groups::data, &Groups::tensor, &Groups::expert, &Groups::expert_data,
                      &Groups::key_value}) {
    Communicator*& place = made[groups_.*member];
    if (place == nullptr) {
      communicators_.push_back(make(*(groups_.*member)));
      place = communicators_.back().get();
    }
    groups_.*member = place;
  }
  // Relays pass rows on from buffers that they read on the host.
  groups_.relays = nullptr;
}

std::unique_ptr<Communicator> DeviceGroups::join(Communicator& host, Backend& backend, const Nccl& nccl) {
  NcclMember member{.rank = host.rank(), .size = host.size()};
  std::string error;
  try {
    if (host.rank() == 0) member.id = nccl.make_id();
  } catch (const Error& failure) {
    error = failure.what();
  }
  host.agree(error, "NCCL group");
  host.broadcast({member.id.data(), DType::U8, {std::ssize(member.id)}}, 0, "NCCL group").wait();
  const int number = nccl.watched == nullptr ? -1 : nccl.watched->number_of(host);
  Activity* const activity = number < 0 ? nullptr : groups_.activity;
  std::unique_ptr<DeviceCollectives> collectives;
  {
    // It waits for the other ranks where nobody can ask it for progress.
    std::optional<Activity::Waiting> waiting;
    if (activity != nullptr) waiting.emplace(*activity, activity->issue(number, "joining the NCCL group"));
    collectives = nccl.make(member, backend);
  }
  auto communicator =
      std::make_unique<DeviceCommunicator>(host, backend, std::move(collectives), activity, number);
  on_device_.push_back(communicator.get());
  return communicator;
}

void DeviceGroups::progress(Backend::Moment moment) {
  // Over again: what it waits for may be another collective by now.
  waiting_.reset();
  if (moment == Backend::Moment::Waited) return;
  for (DeviceCommunicator* communicator : on_device_) communicator->progress();
  groups_.world->progress();
  if (moment != Backend::Moment::Waiting) return;
  for (const DeviceCommunicator* communicator : on_device_) {
    if (const Activity::Collective what = communicator->unfinished(); what.group >= 0) {
      waiting_.emplace(*groups_.activity, what);
      return;
    }
  }
}

}  // namespace hybridmoe
