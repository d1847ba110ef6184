// Sequence parallelism (arXiv 2205.05198): the ranks of a tensor group share their sequences' rows. Outside
// of attention and dense matrices each holds a T-th of them, consecutive rows in the order of the ranks;
// before a column-split product the rows are gathered, behind a row-split one the partial results are summed
// and each rank keeps its own rows. A group of one rank gathers, sums and copies nothing.
#pragma once

#include <cstdint>

#include "core/backend.h"
#include "core/communicator.h"
#include "core/memory_plan.h"

namespace hybridmoe {

class SequenceParallel {
 public:
  SequenceParallel(Backend& backend, Communicator& tensor) : backend_(backend), tensor_(tensor) {}

  // The two buffers for rows of all ranks. A layer uses the first for what enters a product and for the
  // partial result behind it, the second for what must live beside those.
  enum Buffer { kFirst, kSecond };

  int ranks() const { return tensor_.size(); }
  int rank() const { return tensor_.rank(); }
  // Plans the buffers for `rows` own rows of width d.
  void plan(MemoryPlan& memory, std::int64_t rows, std::int64_t d);

  // Rows of all ranks, on their way.
  struct Gathering {
    Tensor rows;  // [T n, d]
    Event ready;
    const Tensor& wait() const {
      ready.wait();
      return rows;
    }
  };
  // own [n, d]: must stay as it is until the rows are there.
  Gathering gather(const Tensor& own, Buffer buffer, const char* label);

  // Where the partial result for `target` [n, d] is to be written: [T n, d], `target` itself with one rank.
  Tensor partial(const Tensor& target, Buffer buffer) const;
  // Whether a product that writes a partial result adds to what is there, given that the target shall be
  // added to.
  bool product_accumulates(bool accumulate) const { return accumulate && ranks() == 1; }
  // target = (accumulate ? target : 0) + this rank's rows of the sum of the partial results.
  void reduce(const Tensor& partial, const Tensor& target, bool accumulate, const char* label,
              Stream* stream);

 private:
  Backend& backend_;
  Communicator& tensor_;
  Tensor buffers_[2];  // (T n, d)
  Tensor sum_;         // (n, d)
};

}  // namespace hybridmoe
