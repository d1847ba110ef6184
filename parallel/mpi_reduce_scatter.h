// reduce_scatter by direct exchange: every rank sends each peer its part and adds what it gets in rank order,
// so a sum does not depend on how a buffer is cut; bf16 is added in fp32 and rounded once. Each rank sends
// (W-1)/W of the buffer, the least possible; Open MPI's own nonblocking version reduces everything onto rank
// 0 first and takes a buffer's worth of memory per call in flight.
//
// Sends are posted at once and need no memory. Receives go slice by slice through a few slots of scratch
// memory, first come first served within a communicator. A peer's sends may finish only once the receives
// here are posted, so whoever waits for anything advances every queue of the process (MpiProgress).
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <vector>

#include "parallel/mpi_operation.h"

namespace hybridmoe {

class ReduceScatterQueue : public Background, public std::enable_shared_from_this<ReduceScatterQueue> {
 public:
  ReduceScatterQueue(MPI_Comm comm, int rank, int size, std::int64_t scratch_bytes,
                     std::shared_ptr<MpiProgress> progress);

  // The arguments have been checked (parallel/collective_arguments.h). The queue stays alive through the
  // events that it gave out.
  Event start(const Tensor& input, const Tensor& output, const char* label);

  // Adds what has arrived and posts the next receives; never blocks. Failures are kept by the calls' events.
  void advance() override;

 private:
  class Call;
  struct Slot {
    explicit Slot(std::shared_ptr<MpiProgress> progress) : receives(std::move(progress)) {}
    MpiOperation receives;
    std::shared_ptr<Call> call;
    std::int64_t begin = 0, end = 0;  // elements of the output
    std::vector<std::byte> scratch;   // (size - 1) slices
  };
  static constexpr int kSlots = 2;  // one is added up while the other fills

  std::int64_t slice_elements(const Call& call) const;
  void post_receives(Slot& slot);
  void add_up(Slot& slot);

  MPI_Comm comm_;
  int rank_, size_;
  std::int64_t slot_bytes_;
  std::shared_ptr<MpiProgress> progress_;
  std::deque<std::shared_ptr<Call>> unposted_;  // calls with slices whose receive is not posted yet
  std::array<Slot, kSlots> slots_;
  std::int64_t posted_ = 0, added_ = 0;  // slices since the beginning; slot = slice % kSlots
};

}  // namespace hybridmoe
