// The movements of a hierarchical exchange that are under way on this rank (parallel/relay_transport.h).
#pragma once

#include <deque>
#include <memory>

#include "parallel/relay_duties.h"
#include "parallel/row_transport.h"

namespace hybridmoe {

// The rows of a movement by source and destination. `counts` outlives it.
class PairRows {
 public:
  PairRows(const PairCounts& counts, std::int64_t ranks, int chunk, bool back)
      : counts_(&counts), ranks_(ranks), chunk_(chunk), back_(back) {}
  std::int64_t operator()(int source, int destination) const;
  std::int64_t sum(const RelayDuties::Range& sources, const RelayDuties::Range& destinations) const;

 private:
  const PairCounts* counts_;
  std::int64_t ranks_;
  int chunk_;
  bool back_;
};

struct RelayMovement {
  RowMovement rows;
  PairRows pairs;
  Tensor gathered, crossing;  // room_for(pairs) rows each
};

class RelayQueue : public Background, public std::enable_shared_from_this<RelayQueue> {
 public:
  // relays outlives the queue; `rank` of the expert group.
  RelayQueue(const HostRelays& relays, int rank)
      : relays_(relays), duties_(relays.host_of, rank), rank_(rank) {}

  const RelayDuties& duties() const { return duties_; }
  // Rows that this rank passes on, in the direction in which there are more.
  std::int64_t room_for(const PairRows& rows) const;
  Event start(const RelayMovement& movement);
  void advance() override;
  // Forgets what is under way; the communicators are not used any more.
  void abandon() { transfers_.clear(); }

 private:
  class Transfer;
  Event unfinished_before(const Transfer& transfer) const;

  const HostRelays& relays_;
  RelayDuties duties_;
  int rank_;
  std::deque<std::shared_ptr<Transfer>> transfers_;  // not done, in the order in which they began
  bool advancing_ = false;
};

}  // namespace hybridmoe
