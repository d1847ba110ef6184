#include "parallel/device_groups.h"

#include <map>

#include "core/cuda_plugin.h"
#include "parallel/forwarding_communicator.h"
#include "parallel/staged_communicator.h"

namespace hybridmoe {
namespace {

class NcclCommunicator final : public ForwardingCommunicator {
 public:
  NcclCommunicator(Communicator& host, Backend& backend, const NcclMember& member)
      : ForwardingCommunicator(host), backend_(backend), device_(make_nccl_collectives(member, backend)) {}

  Event all_reduce(const Tensor& data, ReduceOp op, const char* label) override {
    if (on_host(data)) return ForwardingCommunicator::all_reduce(data, op, label);
    return device_->all_reduce(data, op);
  }
  Event reduce_scatter(const Tensor& input, const Tensor& output, const char* label) override {
    if (on_host(input)) return ForwardingCommunicator::reduce_scatter(input, output, label);
    return device_->reduce_scatter(input, output);
  }
  Event all_gather(const Tensor& input, const Tensor& output, const char* label) override {
    if (on_host(output)) return ForwardingCommunicator::all_gather(input, output, label);
    return device_->all_gather(input, output);
  }
  Event broadcast(const Tensor& data, int root, const char* label) override {
    if (on_host(data)) return ForwardingCommunicator::broadcast(data, root, label);
    return device_->broadcast(data, root);
  }
  Event all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows, const Tensor& recv,
                        const std::vector<std::int64_t>& recv_rows, const char* label) override {
    if (on_host(send))
      return ForwardingCommunicator::all_to_all_rows(send, send_rows, recv, recv_rows, label);
    return device_->all_to_all_rows(send, send_rows, recv, recv_rows);
  }
  void progress() override {
    device_->check();
    ForwardingCommunicator::progress();
  }

 private:
  // What lies in host memory may still be written by what is queued.
  bool on_host(const Tensor& tensor) const {
    if (tensor.device != Device::CPU) return false;
    backend_.synchronize(backend_.main_stream());
    return true;
  }

  Backend& backend_;
  std::unique_ptr<DeviceCollectives> device_;
};

}  // namespace

std::unique_ptr<Communicator> make_nccl_communicator(Communicator& host, Backend& backend) {
  NcclMember member{.rank = host.rank(), .size = host.size()};
  std::string error;
  try {
    if (host.rank() == 0) member.id = make_nccl_id();
  } catch (const Error& failure) {
    error = failure.what();
  }
  host.agree(error, "NCCL group");
  host.broadcast({member.id.data(), DType::U8, {std::ssize(member.id)}}, 0, "NCCL group").wait();
  return std::make_unique<NcclCommunicator>(host, backend, member);
}

DeviceGroups::DeviceGroups(const Groups& groups, Backend& backend, DeviceTransport transport)
    : groups_(groups) {
  if (backend.device() == Device::CPU) return;
  std::map<Communicator*, Communicator*> made;
  for (auto member : {&Groups::world, &Groups::data, &Groups::tensor, &Groups::expert, &Groups::expert_data,
                      &Groups::key_value}) {
    Communicator*& place = made[groups.*member];
    if (place == nullptr) {
      Communicator& host = *(groups.*member);
      communicators_.push_back(transport == DeviceTransport::Nccl && host.size() > 1
                                   ? make_nccl_communicator(host, backend)
                                   : make_staged_communicator(host, backend));
      place = communicators_.back().get();
    }
    groups_.*member = place;
  }
  // Relays pass rows on from buffers that they read on the host.
  groups_.relays = nullptr;
}

}  // namespace hybridmoe
