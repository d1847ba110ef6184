// The groups of ranks that a worker belongs to, as the model and the optimizer see them.
#pragma once

#include <vector>

#include "core/activity.h"
#include "core/communicator.h"

namespace hybridmoe {

// Where the ranks of an expert group run, and the communicators over which hosts pass on each other's rows.
// They serve nothing else: each has an order of calls of its own.
struct HostRelays {
  std::vector<int> host_of;         // by rank of `expert`; ranks of a host are neighbours
  Communicator* gather = nullptr;   // this rank's neighbours on its host, within the expert group
  Communicator* cross = nullptr;    // all of the expert group
  Communicator* scatter = nullptr;  // the same ranks as gather
};

// Nothing is owned: whoever made the communicators (parallel/mesh.h; a test: one local communicator for all)
// keeps them alive for longer than everything that was given this struct. No communicator is null. Members
// may be the same communicator where groups coincide (tensor size 1: `data` is `world`) and are the local
// communicator where a group has one rank. All ranks of a group issue the same collectives on it in the same
// order.
struct Groups {
  Communicator* world = nullptr;
  Communicator* data = nullptr;         // ranks with other sequences and the same dense shards
  Communicator* tensor = nullptr;       // ranks that split the dense matrices and each sequence
  Communicator* expert = nullptr;       // ranks that exchange rows: together they hold every expert once
  Communicator* expert_data = nullptr;  // ranks that hold the same experts (shards)
  Communicator* key_value = nullptr;   // ranks that hold the same key and value heads: `data`, and more ranks
                                       // when there are more tensor ranks than such heads
  int expert_tensor = 1;               // ET: rank r of `expert` holds shard r % ET of expert part r / ET
  const HostRelays* relays = nullptr;  // null: no expert group is known to span several hosts

  // What this rank is doing, for the watchdog; null: nobody asks.
  Activity* activity = nullptr;
  void mark_step(std::int64_t step) const {
    if (activity != nullptr) activity->set_step(step);
  }
  void mark_phase(const char* phase) const {  // a string literal
    if (activity != nullptr) activity->set_phase(phase);
  }
  void mark_layer(int layer) const {  // -1: in none
    if (activity != nullptr) activity->set_layer(layer);
  }
};

// Data parallelism alone: every rank of `all` holds the whole model. `alone` is a local communicator.
inline Groups data_parallel_groups(Communicator& all, Communicator& alone) {
  return {.world = &all,
          .data = &all,
          .tensor = &alone,
          .expert = &alone,
          .expert_data = &all,
          .key_value = &all};
}

}  // namespace hybridmoe
