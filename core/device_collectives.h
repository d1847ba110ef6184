// Collectives of device tensors over one group of ranks, queued on the device: what a communicator of hosts
// cannot do. parallel/device_communicator.h makes a communicator of both.
#pragma once

#include <vector>

#include "core/communicator.h"

namespace hybridmoe {

// As the calls of Communicator, for tensors of the device alone. Inputs may be reused, and outputs read, by
// what is queued on the backend's main stream after the returned event's wait(), which blocks no host; test()
// says whether the device is done. Both throw Error when the collective failed.
class DeviceCollectives {
 public:
  virtual ~DeviceCollectives() = default;
  virtual Event all_reduce(const Tensor& data, ReduceOp op) = 0;
  virtual Event reduce_scatter(const Tensor& input, const Tensor& output) = 0;
  virtual Event all_gather(const Tensor& input, const Tensor& output) = 0;
  virtual Event broadcast(const Tensor& data, int root) = 0;
  virtual Event all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows,
                                const Tensor& recv, const std::vector<std::int64_t>& recv_rows) = 0;
  // Throws Error when something under way has failed, on this rank or another.
  virtual void check() = 0;
};

}  // namespace hybridmoe
