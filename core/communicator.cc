#include "core/communicator.h"

#include <chrono>
#include <cstring>

namespace hybridmoe {

namespace {

struct WaitClock {
  int depth = 0;
  std::chrono::steady_clock::time_point begin;
  std::chrono::steady_clock::duration total{0};
};
thread_local WaitClock wait_clock;

}  // namespace

double seconds_waited() { return std::chrono::duration<double>(wait_clock.total).count(); }

CountedWait::CountedWait() {
  if (wait_clock.depth++ == 0) wait_clock.begin = std::chrono::steady_clock::now();
}

CountedWait::~CountedWait() {
  if (--wait_clock.depth == 0) wait_clock.total += std::chrono::steady_clock::now() - wait_clock.begin;
}

void Communicator::agree(const std::string& error, const char* label) {
  const std::vector<std::string> errors = [&] {
    const CountedWait counted;
    return gather_strings(error, label);
  }();
  std::string all;
  bool same = true;
  for (int r = 0; r < size(); ++r) {
    same = same && errors[r] == errors[0];
    if (errors[r].empty()) continue;
    all += cat(all.empty() ? "" : "\n", "rank ", r, ": ", errors[r]);
  }
  if (all.empty()) return;
  if (same) throw SharedError(errors[0]);  // the same mistake everywhere needs saying once
  throw SharedError(all);
}

void Communicator::add_background(const std::weak_ptr<Background>&) {
  throw Error("this kind of communicator does not advance work in the background");
}

namespace {

class LocalCommunicator : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  Event all_reduce(const Tensor&, ReduceOp, const char*) override { return {}; }
  Event reduce_scatter(const Tensor& input, const Tensor& output, const char* label) override {
    return copy(input, output, label);
  }
  Event all_gather(const Tensor& input, const Tensor& output, const char* label) override {
    return copy(input, output, label);
  }
  Event broadcast(const Tensor&, int, const char*) override { return {}; }
  Event all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows, const Tensor& recv,
                        const std::vector<std::int64_t>& recv_rows, const char* label) override {
    require(send_rows == recv_rows, label, ": rows sent and received by the only rank differ");
    return copy(send, recv, label);
  }
  void barrier(const char*) override {}

  std::vector<std::string> gather_strings(const std::string& mine, const char*) override { return {mine}; }

 private:
  static Event copy(const Tensor& from, const Tensor& to, const char* label) {
    require(
        from.dtype == to.dtype && from.elements() == to.elements() && from.contiguous() && to.contiguous(),
        label, ": tensors ", from.shape.str(), " ", name_of(from.dtype), " and ", to.shape.str(), " ",
        name_of(to.dtype), " do not match");
    if (from.data != to.data && from.bytes() > 0) std::memmove(to.data, from.data, from.bytes());
    return {};
  }
};

}  // namespace

std::unique_ptr<Communicator> make_local_communicator() { return std::make_unique<LocalCommunicator>(); }

}  // namespace hybridmoe
