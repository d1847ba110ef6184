#include "parallel/staged_communicator.h"

#include <algorithm>
#include <map>

#include "core/buffer.h"
#include "parallel/forwarding_communicator.h"

namespace hybridmoe {
namespace {

// Buffers that host and device share, used again once a call is over.
class StagingPool {
 public:
  explicit StagingPool(Backend& backend) : backend_(backend) {}

  // The smallest free one that is large enough. Back in the pool when the last copy of the pointer goes.
  std::shared_ptr<Buffer> take(std::int64_t bytes) {
    auto place = free_.lower_bound(bytes);
    std::unique_ptr<Buffer> buffer;
    if (place != free_.end()) {
      buffer = std::move(place->second);
      free_.erase(place);
    } else {
      std::int64_t size = 4096;
      while (size < bytes) size *= 2;
      buffer = std::make_unique<Buffer>(backend_, DType::U8, Shape{size}, Where::Shared);
    }
    return {buffer.release(), [this](Buffer* used) { free_.emplace(used->tensor().bytes(), used); }};
  }

 private:
  Backend& backend_;
  std::multimap<std::int64_t, std::unique_ptr<Buffer>> free_;
};

// A call under way: what is to be copied where when it is over.
class Staged final : public Event::State {
 public:
  Staged(Backend& backend, Event event, std::shared_ptr<Buffer> buffer)
      : backend_(backend), event_(std::move(event)), buffer_(std::move(buffer)) {}

  void copy_back(const Tensor& staged, const Tensor& target) {
    staged_ = staged;
    target_ = target;
  }
  bool test() override {
    if (!event_.test()) return false;
    finish();
    return true;
  }
  void wait() override {
    event_.wait();
    finish();
  }

 private:
  // What comes later on the stream finds the result; the buffer is free when the copy is done, which the next
  // call waits for before it uses one.
  void finish() {
    if (buffer_ == nullptr) return;
    if (!target_.empty()) backend_.copy(staged_, target_, backend_.main_stream());
    buffer_.reset();
  }

  Backend& backend_;
  Event event_;
  std::shared_ptr<Buffer> buffer_;
  Tensor staged_, target_;
};

class StagedCommunicator final : public ForwardingCommunicator {
 public:
  StagedCommunicator(Communicator& inner, Backend& backend)
      : ForwardingCommunicator(inner), backend_(backend), pool_(backend) {}

  Event all_reduce(const Tensor& data, ReduceOp op, const char* label) override {
    if (size() == 1) return {};
    settle();
    if (data.device == Device::CPU) return ForwardingCommunicator::all_reduce(data, op, label);
    const Stage stage = take(data.bytes());
    const Tensor staged = stage.at(0, data);
    copy_out(data, staged);
    return finish(ForwardingCommunicator::all_reduce(staged, op, label), stage, staged, data);
  }
  Event reduce_scatter(const Tensor& input, const Tensor& output, const char* label) override {
    if (size() == 1) return copied(input, output);
    settle();
    if (input.device == Device::CPU) return ForwardingCommunicator::reduce_scatter(input, output, label);
    const Stage stage = take(input.bytes());
    const Tensor staged = stage.at(0, input), part = own_part(staged, output);
    copy_out(input, staged);
    return finish(ForwardingCommunicator::reduce_scatter(staged, part, label), stage, part, output);
  }
  Event all_gather(const Tensor& input, const Tensor& output, const char* label) override {
    if (size() == 1) return copied(input, output);
    settle();
    if (output.device == Device::CPU) return ForwardingCommunicator::all_gather(input, output, label);
    const Stage stage = take(output.bytes());
    const Tensor staged = stage.at(0, output), part = own_part(staged, input);
    copy_out(input, part);
    return finish(ForwardingCommunicator::all_gather(part, staged, label), stage, staged, output);
  }
  Event broadcast(const Tensor& data, int root, const char* label) override {
    if (size() == 1) return {};
    settle();
    if (data.device == Device::CPU) return ForwardingCommunicator::broadcast(data, root, label);
    const Stage stage = take(data.bytes());
    const Tensor staged = stage.at(0, data);
    if (rank() == root) copy_out(data, staged);
    return finish(ForwardingCommunicator::broadcast(staged, root, label), stage, staged, data);
  }
  Event all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows, const Tensor& recv,
                        const std::vector<std::int64_t>& recv_rows, const char* label) override {
    if (size() == 1) return copied(send, recv);
    settle();
    if (send.device == Device::CPU) {
      return ForwardingCommunicator::all_to_all_rows(send, send_rows, recv, recv_rows, label);
    }
    const Stage stage = take(send.bytes() + recv.bytes());
    const Tensor sent = stage.at(0, send), received = stage.at(send.bytes(), recv);
    copy_out(send, sent);
    const Event event = ForwardingCommunicator::all_to_all_rows(sent, send_rows, received, recv_rows, label);
    return finish(event, stage, received, recv);
  }

 private:
  struct Stage {
    std::shared_ptr<Buffer> buffer;
    // A tensor like another at `offset` bytes.
    Tensor at(std::int64_t offset, const Tensor& like) const {
      return {static_cast<char*>(buffer->tensor().data) + offset, like.dtype, like.shape};
    }
  };
  // What a world of one rank does, queued.
  Event copied(const Tensor& from, const Tensor& to) {
    if (from.data != to.data) backend_.copy(from, to, backend_.main_stream());
    return {};
  }
  Stage take(std::int64_t bytes) { return {pool_.take(bytes)}; }
  void settle() { backend_.synchronize(backend_.main_stream()); }
  void copy_out(const Tensor& from, const Tensor& to) {
    backend_.copy(from, to, backend_.main_stream());
    settle();
  }
  // The rank-th part of what is staged for all ranks.
  Tensor own_part(const Tensor& staged, const Tensor& like) const {
    return {static_cast<char*>(staged.data) + rank() * like.bytes(), like.dtype, like.shape};
  }
  Event finish(const Event& event, const Stage& stage, const Tensor& staged, const Tensor& target) {
    const auto state = std::make_shared<Staged>(backend_, event, stage.buffer);
    state->copy_back(staged, target);
    return Event(state);
  }

  Backend& backend_;
  StagingPool pool_;
};

}  // namespace

std::unique_ptr<Communicator> make_staged_communicator(Communicator& inner, Backend& backend) {
  return std::make_unique<StagedCommunicator>(inner, backend);
}

}  // namespace hybridmoe
