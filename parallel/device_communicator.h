// A communicator of device tensors over collectives that are queued on the device, beside one of hosts for
// what lies in host memory. The host goes on while collectives are under way; whoever waits for the device
// calls progress(), which finds out what failed, and tells the watchdog which collective is not finished.
#pragma once

#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "core/activity.h"
#include "core/backend.h"
#include "core/device_collectives.h"
#include "parallel/forwarding_communicator.h"

namespace hybridmoe {

class DeviceCommunicator final : public ForwardingCommunicator {
 public:
  // `group` is the number that `activity` knows host's group by (null: nobody watches). host, backend and
  // activity outlive it.
  DeviceCommunicator(Communicator& host, Backend& backend, std::unique_ptr<DeviceCollectives> device,
                     Activity* activity, int group)
      : ForwardingCommunicator(host),
        backend_(backend),
        device_(std::move(device)),
        activity_(activity),
        group_(group) {}

  Event all_reduce(const Tensor& data, ReduceOp op, const char* label) override;
  Event reduce_scatter(const Tensor& input, const Tensor& output, const char* label) override;
  Event all_gather(const Tensor& input, const Tensor& output, const char* label) override;
  Event broadcast(const Tensor& data, int root, const char* label) override;
  Event all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows, const Tensor& recv,
                        const std::vector<std::int64_t>& recv_rows, const char* label) override;
  // Throws Error naming the group and the collective that is not finished when one has failed.
  void progress() override;
  // The oldest collective that was not finished at the last progress(); group -1: none, or nobody watches.
  Activity::Collective unfinished() const {
    return queued_.empty() ? Activity::Collective{} : queued_.front().what;
  }

 private:
  struct Queued {
    Event event;
    Activity::Collective what;
  };

  // What lies in host memory may still be written by what is queued.
  bool on_host(const Tensor& tensor) const;
  template <class Start>
  Event queue(const char* label, const Start& start);

  Backend& backend_;
  std::unique_ptr<DeviceCollectives> device_;
  Activity* activity_;
  int group_;
  std::deque<Queued> queued_;  // in the order of the device's stream
};

}  // namespace hybridmoe
