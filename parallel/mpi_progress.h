// What a process must keep moving while it waits for anything: the calls that take more than MPI's own
// progress, because their receives are posted bit by bit.
#pragma once

#include <memory>
#include <vector>

namespace hybridmoe {

class MpiProgress {
 public:
  class Queue {
   public:
    virtual ~Queue() = default;
    virtual void advance() = 0;  // never blocks
  };
  // The queue is advanced for as long as somebody else keeps it alive.
  void add(std::weak_ptr<Queue> queue) { queues_.push_back(std::move(queue)); }
  void advance() {
    for (const auto& queue : queues_) {
      if (const auto alive = queue.lock()) alive->advance();
    }
  }

 private:
  std::vector<std::weak_ptr<Queue>> queues_;
};

}  // namespace hybridmoe
