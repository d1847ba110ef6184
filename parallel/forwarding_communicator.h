// A communicator that stands before another and passes every call on: what counts, records or disturbs calls
// derives from it and overrides those that it cares about.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/communicator.h"

namespace hybridmoe {

class ForwardingCommunicator : public Communicator {
 public:
  // `inner` outlives this, or belongs to it.
  explicit ForwardingCommunicator(Communicator& inner) : inner_(&inner) {}
  explicit ForwardingCommunicator(std::unique_ptr<Communicator> inner)
      : owned_(std::move(inner)), inner_(owned_.get()) {}

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  Event all_reduce(const Tensor& data, ReduceOp op, const char* label) override {
    return inner_->all_reduce(data, op, label);
  }
  Event reduce_scatter(const Tensor& input, const Tensor& output, const char* label) override {
    return inner_->reduce_scatter(input, output, label);
  }
  Event all_gather(const Tensor& input, const Tensor& output, const char* label) override {
    return inner_->all_gather(input, output, label);
  }
  Event broadcast(const Tensor& data, int root, const char* label) override {
    return inner_->broadcast(data, root, label);
  }
  Event all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows, const Tensor& recv,
                        const std::vector<std::int64_t>& recv_rows, const char* label) override {
    return inner_->all_to_all_rows(send, send_rows, recv, recv_rows, label);
  }
  void barrier(const char* label) override { inner_->barrier(label); }
  void progress() override { inner_->progress(); }
  void add_background(const std::weak_ptr<Background>& work) override { inner_->add_background(work); }
  std::vector<std::string> gather_strings(const std::string& mine, const char* label) override {
    return inner_->gather_strings(mine, label);
  }

 private:
  std::unique_ptr<Communicator> owned_;
  Communicator* inner_;
};

}  // namespace hybridmoe
