// What a process must keep moving while it waits for anything: the calls that take more than MPI's own
// progress, because their receives are posted bit by bit, and what others ask it to.
#pragma once

#include <memory>
#include <vector>

#include "core/communicator.h"

namespace hybridmoe {

class MpiProgress {
 public:
  // The work is advanced for as long as somebody else keeps it alive.
  void add(std::weak_ptr<Background> work) {
    std::erase_if(works_, [](const auto& old) { return old.expired(); });
    works_.push_back(std::move(work));
  }
  void advance() {
    for (const auto& work : works_) {
      if (const auto alive = work.lock()) alive->advance();
    }
  }

 private:
  std::vector<std::weak_ptr<Background>> works_;
};

}  // namespace hybridmoe
