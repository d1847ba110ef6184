#include "parallel/device_communicator.h"

namespace hybridmoe {

bool DeviceCommunicator::on_host(const Tensor& tensor) const {
  if (tensor.device != Device::CPU) return false;
  backend_.synchronize(backend_.main_stream());
  return true;
}

template <class Start>
Event DeviceCommunicator::queue(const char* label, const Start& start) {
  Activity::Collective what{.label = label};
  if (activity_ != nullptr) what = activity_->issue(group_, label);
  Event event = start();
  // Finished ones go here too: a step may queue many before anybody waits.
  while (!queued_.empty() && queued_.front().event.test()) queued_.pop_front();
  queued_.push_back({event, what});
  return event;
}

Event DeviceCommunicator::all_reduce(const Tensor& data, ReduceOp op, const char* label) {
  if (on_host(data)) return ForwardingCommunicator::all_reduce(data, op, label);
  return queue(label, [&] { return device_->all_reduce(data, op); });
}

Event DeviceCommunicator::reduce_scatter(const Tensor& input, const Tensor& output, const char* label) {
  if (on_host(input)) return ForwardingCommunicator::reduce_scatter(input, output, label);
  return queue(label, [&] { return device_->reduce_scatter(input, output); });
}

Event DeviceCommunicator::all_gather(const Tensor& input, const Tensor& output, const char* label) {
  if (on_host(output)) return ForwardingCommunicator::all_gather(input, output, label);
  return queue(label, [&] { return device_->all_gather(input, output); });
}

Event DeviceCommunicator::broadcast(const Tensor& data, int root, const char* label) {
  if (on_host(data)) return ForwardingCommunicator::broadcast(data, root, label);
  return queue(label, [&] { return device_->broadcast(data, root); });
}

Event DeviceCommunicator::all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows,
                                          const Tensor& recv, const std::vector<std::int64_t>& recv_rows,
                                          const char* label) {
  if (on_host(send)) return ForwardingCommunicator::all_to_all_rows(send, send_rows, recv, recv_rows, label);
  return queue(label, [&] { return device_->all_to_all_rows(send, send_rows, recv, recv_rows); });
}

void DeviceCommunicator::progress() {
  try {
    device_->check();
    while (!queued_.empty() && queued_.front().event.test()) queued_.pop_front();
  } catch (const Error& failure) {
    const std::string group =
        activity_ == nullptr ? std::string() : activity_->groups()[static_cast<std::size_t>(group_)]->name;
    throw Error(cat(failure.what(), queued_.empty() ? ""
                                                    : cat(" (", group, group.empty() ? "" : " group, ",
                                                          queued_.front().what.label, ")")));
  }
  ForwardingCommunicator::progress();
}

}  // namespace hybridmoe
