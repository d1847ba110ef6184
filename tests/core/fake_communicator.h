// One rank of a group whose other ranks are only data that the test provides.
#pragma once

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "core/communicator.h"

namespace hybridmoe {

class FakeCommunicator : public Communicator {
 public:
  FakeCommunicator(int rank, int size) : rank_(rank), size_(size) {}

  // What gather_strings returns, but for this rank's own text.
  std::vector<std::string> texts;
  // What all_gather returns, by label; this rank's part must be what it passes.
  std::map<std::string, Tensor> gathered;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  Event all_gather(const Tensor& input, const Tensor& output, const char* label) override {
    const Tensor& all = gathered.at(label);
    require(all.dtype == output.dtype && all.elements() == output.elements() &&
                output.elements() == size_ * input.elements(),
            label, ": unexpected shape");
    require(std::memcmp(input.data, static_cast<char*>(all.data) + rank_ * input.bytes(), input.bytes()) == 0,
            label, ": not this rank's part");
    std::memcpy(output.data, all.data, all.bytes());
    return {};
  }
  std::vector<std::string> gather_strings(const std::string& mine, const char*) override {
    std::vector<std::string> all = texts;
    all.resize(size_);
    all[rank_] = mine;
    return all;
  }
  Event all_reduce(const Tensor&, ReduceOp, const char* label) override { return unexpected(label); }
  Event reduce_scatter(const Tensor&, const Tensor&, const char* label) override { return unexpected(label); }
  Event broadcast(const Tensor&, int, const char* label) override { return unexpected(label); }
  Event all_to_all_rows(const Tensor&, const std::vector<std::int64_t>&, const Tensor&,
                        const std::vector<std::int64_t>&, const char* label) override {
    return unexpected(label);
  }
  void barrier(const char* label) override { unexpected(label); }

 private:
  static Event unexpected(const char* label) { throw Error(cat(label, ": an unexpected collective")); }
  int rank_, size_;
};

}  // namespace hybridmoe
