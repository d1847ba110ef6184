// Moves the rows of an exchange between the ranks of its group: straight from rank to rank, or with one
// message for each pair of hosts. Rows are never added up or changed on the way, so both bring the same bits.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/groups.h"
#include "core/memory_plan.h"
#include "core/operators/experts.h"

namespace hybridmoe {

// Counts of count_dispatch [ranks, ranks, 2 (1 + chunks)] by source and destination; where hosts relay.
using PairCounts = std::vector<std::int64_t>;

// What is under way at the same time has buffers of its own: a lane, in it a chunk.
enum class RowLane { Rows, Scalars, Choices };

// What the calls of a movement are called; string literals. A label belongs to groups of one size.
struct RowLabels {
  const char* direct;                                    // flat
  const char *within, *gathered, *crossing, *scattered;  // hierarchical: within the host, then over relays
};

struct RowMovement {
  RowLane lane = RowLane::Rows;
  int chunk = 1;
  bool back = false;  // rows return: who received sends
  const PairCounts* pairs = nullptr;
  Tensor send = {}, recv = {};                               // in rank order
  std::vector<std::int64_t> send_rows = {}, recv_rows = {};  // [ranks]
  const RowLabels* labels = nullptr;
};

// How wide rows are that a transport may have to hold, and how many.
struct RowSizes {
  std::int64_t n = 0, d = 0;  // tokens of each rank, width
  DType compute = DType::F32, statistics = DType::F32;
  double expected_load = 1;  // what the plan counts on, as a multiple of a balanced router's rows
};

// All ranks of the group make the same calls in the same order.
class RowTransport {
 public:
  virtual ~RowTransport() = default;
  // Plans buffers for rows of other ranks.
  virtual void declare_shared(MemoryPlan&, const ExchangePlace&, const RowSizes&) {}
  // from [ranks, w] I64 = what each rank has for this one in its `to` [ranks, w], and where hosts relay
  // *pairs = those of all ranks, which must stay where they are until the event is done.
  virtual Event exchange_counts(const Tensor& to, const Tensor& from, PairCounts* pairs) = 0;
  // Starts moving rows; what is passed may be reused or read when the event is done, and this rank has
  // nothing more to pass on then. One movement of a lane and chunk at a time. Event::wait throws Error when
  // it failed.
  virtual Event move(const RowMovement& movement) = 0;
};

// group outlives the transport.
std::unique_ptr<RowTransport> make_flat_transport(Communicator& group);

}  // namespace hybridmoe
