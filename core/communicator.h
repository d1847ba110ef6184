// Collectives over a group of ranks. They take tensors, never counts and byte sizes. One rank is a world: the
// local communicator below really copies, so no caller asks whether it is distributed.
//
// Contract: every rank of the group issues the same collectives in the same program order. A call returns at
// once with an event; inputs may be reused and outputs read when the event is done (`wait`). `label` names
// the collective in a watchdog's report; it must be a string literal. Reductions have a fixed order: the same
// inputs on the same layout give the same bits. Destroying a communicator performs no collective.
//
// Where a backend queues work, the inputs are what that leaves which was queued on its main stream before the
// call, and what is queued there after `wait` finds the outputs: callers never synchronize for a collective.
// Communicators of device tensors see to it, with a wait of the host or without (parallel/device_groups.h);
// those of host memory alone serve backends that queue nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace hybridmoe {

enum class ReduceOp { Sum, Max };

// An error that every rank of a group throws together with the same text, so that all can end in order.
class SharedError : public Error {
 public:
  using Error::Error;
};

// Time in which the calling thread did nothing but wait for other ranks, in Event::wait and
// Communicator::agree: seconds since the thread began. A rank's own work is what its step took beyond that,
// wherever in the step the waiting was.
double seconds_waited();

// Counts its lifetime as such, once where waits are nested.
class CountedWait {
 public:
  CountedWait();
  ~CountedWait();
  CountedWait(const CountedWait&) = delete;
  CountedWait& operator=(const CountedWait&) = delete;
};

// The completion of an asynchronous call. Copies share the state; an empty event is done.
class Event {
 public:
  class State {
   public:
    virtual ~State() = default;
    virtual bool test() = 0;  // has it finished? makes progress
    virtual void wait() = 0;  // blocks the host; throws Error when the operation failed
  };
  Event() = default;
  explicit Event(std::shared_ptr<State> state) : state_(std::move(state)) {}
  bool test() const { return state_ == nullptr || state_->test(); }
  void wait() const {
    if (state_ == nullptr) return;
    const CountedWait counted;
    state_->wait();
  }

 private:
  std::shared_ptr<State> state_;
};

// Work of this process that must go on while it waits for something else, because other ranks wait for it: a
// receive to be posted, rows to be passed on.
class Background {
 public:
  virtual ~Background() = default;
  virtual void advance() = 0;  // never blocks; whoever waits for the work gets its failures
};

class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  // data = reduction over the ranks, in place. F64, F32, I64 or I32.
  virtual Event all_reduce(const Tensor& data, ReduceOp op, const char* label) = 0;
  // output [m] = the rank-th of `size` equal parts of the sum of input [size * m], summed in rank order.
  // output may be that part of input. F64, F32, BF16 (summed in fp32, rounded once), I64 or I32.
  virtual Event reduce_scatter(const Tensor& input, const Tensor& output, const char* label) = 0;
  // output [size * m] = the ranks' inputs [m] in rank order. input may be the rank-th part of output. Any
  // type.
  virtual Event all_gather(const Tensor& input, const Tensor& output, const char* label) = 0;
  // data = rank root's data. Any type.
  virtual Event broadcast(const Tensor& data, int root, const char* label) = 0;
  // Rows of a matrix: send_rows[r] rows of `send` (in rank order) go to rank r, whose recv_rows[this] says
  // so.
  virtual Event all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows,
                                const Tensor& recv, const std::vector<std::int64_t>& recv_rows,
                                const char* label) = 0;
  virtual void barrier(const char* label) = 0;
  // Lets nonblocking operations advance; cheap. CPU operators call it between tiles.
  virtual void progress() {}
  // From now on, for as long as somebody else keeps it alive, `work` advances in progress() and while this
  // process waits on this communicator or on others of the same world. Throws Error where there is none that
  // could.
  virtual void add_background(const std::weak_ptr<Background>& work);

  // Makes all ranks fail together: every rank passes its own error text (empty: fine). When any rank's is not
  // empty, every rank throws SharedError with all of them ("rank 3: ..."). Blocking. Use it after every step
  // that can fail on one rank alone (opening a file, validating a configuration).
  void agree(const std::string& error, const char* label);

  // Every rank's bytes, in rank order. Blocking. (For agree and other small exchanges.)
  virtual std::vector<std::string> gather_strings(const std::string& mine, const char* label) = 0;
};

// The world of one process.
std::unique_ptr<Communicator> make_local_communicator();

}  // namespace hybridmoe
