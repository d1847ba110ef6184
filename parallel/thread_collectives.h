// What the collectives of parallel/thread_communicator.h compute, once all ranks' arguments are together.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/communicator.h"

namespace hybridmoe {

enum class Collective {
  AllReduce,
  ReduceScatter,
  AllGather,
  Broadcast,
  AllToAllRows,
  Barrier,
  GatherStrings
};

// One rank's part of a call, checked (parallel/collective_arguments.h); what its collective does not have is
// empty.
struct ThreadArguments {
  Collective collective = Collective::Barrier;
  std::string label;
  ReduceOp op = ReduceOp::Sum;
  int root = 0;
  Tensor input = {}, output = {};  // the same tensor in all_reduce and broadcast
  std::vector<std::int64_t> send_rows = {}, recv_rows = {};
  std::string text = {};
};

// What must be the same on every rank of a call: `all_reduce "loss", sum of 4 f64`.
std::string description(const ThreadArguments& arguments);

// Does for all ranks what the collective says; their descriptions are equal. Nothing to do for barriers and
// texts. Throws Error when a rank does not expect the rows that another sends.
void perform(const std::vector<ThreadArguments>& ranks);

}  // namespace hybridmoe
