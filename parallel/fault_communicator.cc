#include "parallel/fault_communicator.h"

#include <algorithm>
#include <csignal>
#include <thread>
#include <utility>

namespace hybridmoe {
namespace {

void flip(const Tensor& tensor, const Fault& fault) {
  const std::int64_t bits = tensor.empty() ? 0 : tensor.bytes() * 8;
  require(bits > 0, "the fault in ", fault.label, " has no bit to flip");
  const std::int64_t bit = fault.bit < 0 ? size_of(tensor.dtype) * 8 - 1 : fault.bit % bits;
  static_cast<unsigned char*>(tensor.data)[bit / 8] ^= static_cast<unsigned char>(1u << (bit % 8));
}

// Flips the bit when the operation is over. An operation that failed has no output.
class FlipWhenDone : public Event::State {
 public:
  FlipWhenDone(Event inner, const Tensor& output, const Fault& fault)
      : inner_(std::move(inner)), output_(output), fault_(fault) {}
  bool test() override {
    if (!inner_.test()) return false;
    try {
      wait();
    } catch (const Error&) {
    }  // wait() says it again to whoever needs the output
    return true;
  }
  void wait() override {
    inner_.wait();
    if (!std::exchange(flipped_, true)) flip(output_, fault_);
  }

 private:
  Event inner_;
  Tensor output_;
  Fault fault_;
  bool flipped_ = false;
};

// Leaves out the first row, or the last one, whichever another rank was to get.
Tensor with_a_row_less(const Tensor& send, std::vector<std::int64_t>* rows, int self, const Fault& fault) {
  const auto any = [](std::int64_t count) { return count > 0; };
  const auto first = std::find_if(rows->begin(), rows->end(), any);
  const auto last = std::find_if(rows->rbegin(), rows->rend(), any);
  require(first != rows->end(), "the fault in ", fault.label, " finds no row to leave out");
  if (first - rows->begin() != self) {
    --*first;
    return send.rows(1, send.rows());
  }
  require(rows->rend() - last - 1 != self, "the fault in ", fault.label, " finds no row for another rank");
  --*last;
  return send.rows(0, send.rows() - 1);
}

}  // namespace

const Fault* FaultCommunicator::before(const char* label, const Tensor& input, bool rows) {
  const int call = ++calls_[label];
  for (const Fault& fault : faults_) {
    if (fault.label != label || fault.rank != rank() || fault.call != call) continue;
    switch (fault.kind) {
      case Fault::Kind::Throw:
        throw Error(cat("injected fault: rank ", rank(), ", call ", call, " of ", label));
      case Fault::Kind::Delay:
        std::this_thread::sleep_for(fault.delay);
        return nullptr;
      case Fault::Kind::Stop:
        std::raise(SIGSTOP);
        return nullptr;
      case Fault::Kind::Kill:
        std::raise(SIGKILL);
        return nullptr;
      case Fault::Kind::FlipInput:
        flip(input, fault);
        return nullptr;
      case Fault::Kind::FlipOutput:
        require(!input.empty(), "the fault in ", label, " has no output to change");
        return &fault;
      case Fault::Kind::WrongRows:
        require(rows, "the fault in ", label, " is for rows only");
        return &fault;
    }
  }
  return nullptr;
}

Event FaultCommunicator::after(Event event, const Fault* fault, const Tensor& output) {
  if (fault == nullptr) return event;
  return Event(std::make_shared<FlipWhenDone>(std::move(event), output, *fault));
}

Event FaultCommunicator::all_reduce(const Tensor& data, ReduceOp op, const char* label) {
  const Fault* fault = before(label, data);
  return after(ForwardingCommunicator::all_reduce(data, op, label), fault, data);
}

Event FaultCommunicator::reduce_scatter(const Tensor& input, const Tensor& output, const char* label) {
  const Fault* fault = before(label, input);
  return after(ForwardingCommunicator::reduce_scatter(input, output, label), fault, output);
}

Event FaultCommunicator::all_gather(const Tensor& input, const Tensor& output, const char* label) {
  const Fault* fault = before(label, input);
  return after(ForwardingCommunicator::all_gather(input, output, label), fault, output);
}

Event FaultCommunicator::broadcast(const Tensor& data, int root, const char* label) {
  const Fault* fault = before(label, data);
  return after(ForwardingCommunicator::broadcast(data, root, label), fault, data);
}

Event FaultCommunicator::all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows,
                                         const Tensor& recv, const std::vector<std::int64_t>& recv_rows,
                                         const char* label) {
  const Fault* fault = before(label, send, true);
  if (fault != nullptr && fault->kind == Fault::Kind::WrongRows) {
    std::vector<std::int64_t> rows = send_rows;
    const Tensor less = with_a_row_less(send, &rows, rank(), *fault);
    return ForwardingCommunicator::all_to_all_rows(less, rows, recv, recv_rows, label);
  }
  return after(ForwardingCommunicator::all_to_all_rows(send, send_rows, recv, recv_rows, label), fault, recv);
}

void FaultCommunicator::barrier(const char* label) {
  before(label, {});
  ForwardingCommunicator::barrier(label);
}

std::vector<std::string> FaultCommunicator::gather_strings(const std::string& mine, const char* label) {
  before(label, {});
  return ForwardingCommunicator::gather_strings(mine, label);
}

MakeCommunicator with_faults(MakeCommunicator make, Group kind, std::vector<Fault> faults) {
  return [make = std::move(make), kind, faults = std::move(faults)](
             Group group, const std::vector<int>& members) -> std::unique_ptr<Communicator> {
    auto communicator = make(group, members);
    if (group != kind) return communicator;
    return std::make_unique<FaultCommunicator>(std::move(communicator), faults);
  };
}

}  // namespace hybridmoe
