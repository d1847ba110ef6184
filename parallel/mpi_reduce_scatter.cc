#include "parallel/mpi_reduce_scatter.h"

#include <algorithm>
#include <cstddef>

#include "parallel/mpi_error.h"
#include "parallel/rank_order_reduction.h"

namespace hybridmoe {
namespace {

constexpr int kTag = 1;

}  // namespace

class ReduceScatterQueue::Call : public Event::State {
 public:
  Call(std::shared_ptr<ReduceScatterQueue> queue, const Tensor& in, const Tensor& out, const char* name)
      : input(in), output(out), label(name), sends(queue->progress_), queue_(std::move(queue)) {
    sends.reset(name);
  }
  bool test() override {
    queue_->advance();
    return finished();
  }
  void wait() override {
    while (!finished()) queue_->progress_->advance();
    sends.wait();  // throws when one failed
    if (!failure.empty()) throw Error(failure);
  }

  Tensor input, output;
  const char* label;
  MpiOperation sends;
  std::int64_t posted = 0, added = 0;  // elements of the output
  std::string failure;

 private:
  bool finished() { return (added == output.elements() || !failure.empty()) && sends.test(); }

  std::shared_ptr<ReduceScatterQueue> queue_;
};

ReduceScatterQueue::ReduceScatterQueue(MPI_Comm comm, int rank, int size, std::int64_t scratch_bytes,
                                       std::shared_ptr<MpiProgress> progress)
    : comm_(comm),
      rank_(rank),
      size_(size),
      slot_bytes_(scratch_bytes / kSlots),
      progress_(std::move(progress)),
      slots_{Slot(progress_), Slot(progress_)} {}

// Every rank cuts a call alike: the slices of all peers fill a slot.
std::int64_t ReduceScatterQueue::slice_elements(const Call& call) const {
  const std::int64_t bytes = slot_bytes_ / std::max(size_ - 1, 1);
  return std::clamp(bytes / size_of(call.output.dtype), std::int64_t{1}, std::int64_t{1} << 28);
}

Event ReduceScatterQueue::start(const Tensor& input, const Tensor& output, const char* label) {
  const auto call = std::make_shared<Call>(shared_from_this(), input, output, label);
  const std::int64_t part = output.elements(), slice = slice_elements(*call);
  for (std::int64_t begin = 0; begin < part; begin += slice) {
    const std::int64_t end = std::min(begin + slice, part);
    for (int distance = 1; distance < size_; ++distance) {  // not all to rank 0 first
      const int peer = (rank_ + distance) % size_;
      const Tensor message = input.flat(peer * part + begin, peer * part + end);
      check_mpi(MPI_Isend(message.data, static_cast<int>(message.bytes()), MPI_BYTE, peer, kTag, comm_,
                          call->sends.add_request()),
                "reduce_scatter ", label);
    }
  }
  if (part > 0) unposted_.push_back(call);
  advance();
  return Event(call);
}

void ReduceScatterQueue::advance() {
  while (added_ < posted_) {
    Slot& slot = slots_[added_ % kSlots];
    if (!slot.receives.test()) break;
    add_up(slot);
    ++added_;
  }
  while (!unposted_.empty() && posted_ < added_ + kSlots) {
    post_receives(slots_[posted_ % kSlots]);
    ++posted_;
  }
}

void ReduceScatterQueue::post_receives(Slot& slot) {
  slot.call = unposted_.front();
  Call& call = *slot.call;
  slot.begin = call.posted;
  slot.end = std::min(slot.begin + slice_elements(call), call.output.elements());
  const std::int64_t bytes = (slot.end - slot.begin) * size_of(call.output.dtype);
  if (std::ssize(slot.scratch) < bytes * (size_ - 1)) slot.scratch.resize(bytes * (size_ - 1));
  slot.receives.reset(call.label);
  std::byte* place = slot.scratch.data();
  for (int peer = 0; peer < size_; ++peer) {
    if (peer == rank_) continue;
    const int code = MPI_Irecv(place, static_cast<int>(bytes), MPI_BYTE, peer, kTag, comm_,
                               slot.receives.add_receive(peer, bytes));
    check_mpi(code, "reduce_scatter ", call.label);
    place += bytes;
  }
  call.posted = slot.end;
  if (call.posted == call.output.elements()) unposted_.pop_front();
}

void ReduceScatterQueue::add_up(Slot& slot) {
  Call& call = *slot.call;
  if (call.failure.empty()) call.failure = slot.receives.failure();
  const std::int64_t count = slot.end - slot.begin, part = call.output.elements();
  const std::byte* place = slot.scratch.data();
  std::vector<const void*> sources;
  for (int r = 0; r < size_; ++r) {
    if (r == rank_) {
      sources.push_back(call.input.flat(rank_ * part + slot.begin, rank_ * part + slot.end).data);
    } else {
      sources.push_back(place);
      place += count * size_of(call.output.dtype);
    }
  }
  reduce_in_order(ReduceOp::Sum, call.output.dtype, sources, call.output.flat(slot.begin, slot.end).data,
                  count);
  call.added = slot.end;
  slot.call.reset();
}

}  // namespace hybridmoe
