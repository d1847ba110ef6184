// Disturbs chosen calls of a communicator, so that tests can show that a rank which dies, stalls, throws or
// computes nonsense is noticed.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "parallel/forwarding_communicator.h"
#include "parallel/mesh.h"

namespace hybridmoe {

struct Fault {
  enum class Kind {
    Throw,       // Error instead of the call
    Delay,       // the call is made after `delay`
    Stop,        // the process stops before the call (SIGSTOP)
    Kill,        // the process dies before the call (SIGKILL)
    FlipInput,   // a bit of the caller's input changes before the call, and stays changed
    FlipOutput,  // a bit of the output changes once it is there: in the first test() that finds it, or wait()
    WrongRows,   // all_to_all_rows sends another rank one row less than it expects
  };

  std::string label;
  int rank = 0;  // of the group
  int call = 1;  // number of the call among those with this label on this communicator, from 1
  Kind kind = Kind::Throw;
  std::chrono::milliseconds delay{0};
  // From the beginning of the tensor, modulo its size. The highest bit of the first element by default: of a
  // floating-point number the sign.
  std::int64_t bit = -1;
};

class FaultCommunicator : public ForwardingCommunicator {
 public:
  // Faults of other ranks and labels do nothing here. A fault that its call cannot have (a bit of an empty
  // tensor or of a barrier, wrong rows of anything but rows) is an Error when the call is made.
  FaultCommunicator(Communicator& inner, std::vector<Fault> faults)
      : ForwardingCommunicator(inner), faults_(std::move(faults)) {}
  FaultCommunicator(std::unique_ptr<Communicator> inner, std::vector<Fault> faults)
      : ForwardingCommunicator(std::move(inner)), faults_(std::move(faults)) {}

  Event all_reduce(const Tensor& data, ReduceOp op, const char* label) override;
  Event reduce_scatter(const Tensor& input, const Tensor& output, const char* label) override;
  Event all_gather(const Tensor& input, const Tensor& output, const char* label) override;
  Event broadcast(const Tensor& data, int root, const char* label) override;
  Event all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows, const Tensor& recv,
                        const std::vector<std::int64_t>& recv_rows, const char* label) override;
  void barrier(const char* label) override;
  std::vector<std::string> gather_strings(const std::string& mine, const char* label) override;

 private:
  // Counts the call, does what comes before it, and returns its fault that is still to be done, if any.
  const Fault* before(const char* label, const Tensor& input, bool rows = false);
  Event after(Event event, const Fault* fault, const Tensor& output);

  const std::vector<Fault> faults_;
  std::map<std::string, int> calls_;  // by label
};

// Groups of this kind made by `make` have the faults; other kinds are left alone.
MakeCommunicator with_faults(MakeCommunicator make, Group kind, std::vector<Fault> faults);

}  // namespace hybridmoe
