// Which ranks work together: arithmetic on rank numbers, then the communicators of a rank's groups, made by
// whatever connects the ranks (parallel/mpi_world.h; parallel/thread_communicator.h).
//
// Tensor ranks are neighbours. Expert groups are runs of E * ET neighbours, whatever the tensor size: expert
// parallelism folds over tensor x data.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "core/groups.h"
#include "core/layout.h"

namespace hybridmoe {

enum class Group {
  World,
  Data,          // equal r mod T: the same dense shards, other sequences
  Tensor,        // equal r / T
  KeyValue,      // replicas of the same key and value heads: Data, unless T exceeds the key/value heads
  Expert,        // E * ET neighbours: every expert once; rows are exchanged among them
  ExpertTensor,  // ET neighbours: shards of the same experts
  ExpertData,    // equal r mod (E * ET): the same experts (shards)
};

// The place of each rank in a legal layout.
class Mesh {
 public:
  // Throws Error with all reasons when the layout is not legal for so many key/value heads (0: enough for
  // every tensor rank) or its world is not known.
  explicit Mesh(const Layout& layout, std::int64_t kv_heads = 0);

  const Layout& layout() const { return layout_; }
  int tensor_rank(int rank) const { return rank % layout_.tensor; }
  int data_rank(int rank) const { return rank / layout_.tensor; }
  int expert_tensor_rank(int rank) const { return rank % layout_.expert_tensor; }
  // Which of the E parts of the experts this rank holds: experts [e * n / E, (e + 1) * n / E).
  int expert_rank(int rank) const { return rank / layout_.expert_tensor % layout_.expert; }

  // Two ranks are in the same group of a kind when their colors are equal.
  int color(Group group, int rank) const;
  // The ranks of the world in `rank`'s group of this kind, ascending.
  std::vector<int> members(Group group, int rank) const;

 private:
  Layout layout_;
  std::int64_t kv_heads_;
};

// Whether the two kinds divide the world into the same groups.
bool same_groups(const Mesh& mesh, Group a, Group b);

// Makes the communicator of the calling rank's group of this kind, or of a part of it, whose members are
// these ranks of the world in ascending order, the caller among them. Collective: every rank of the world
// calls it for the same kinds in the same order, each with its own members.
using MakeCommunicator =
    std::function<std::unique_ptr<Communicator>(Group group, const std::vector<int>& members)>;

// The communicators of this rank's groups, which `groups()` lends out. Construction is collective over
// `world`, which outlives this and whose rank numbers are the mesh's. Groups that are the world share its
// communicator, groups of one rank are local, and kinds that coincide share one communicator. `host_of_rank`
// (empty: one host) makes the relays where an expert group of any rank spans several hosts. Throws Error when
// the mesh is for another number of ranks.
class MeshCommunicators {
 public:
  MeshCommunicators(const Mesh& mesh, Communicator& world, const MakeCommunicator& make,
                    const std::vector<int>& host_of_rank = {});
  MeshCommunicators(const MeshCommunicators&) = delete;
  MeshCommunicators& operator=(const MeshCommunicators&) = delete;
  Groups groups() const { return groups_; }

 private:
  Communicator* find_or_make(const Mesh& mesh, Group group, const MakeCommunicator& make);
  void make_relays(const Mesh& mesh, const std::vector<int>& host_of_rank, const MakeCommunicator& make);

  std::vector<std::unique_ptr<Communicator>> owned_;
  std::vector<std::pair<Group, Communicator*>> made_;
  HostRelays relays_;
  Groups groups_;
};

}  // namespace hybridmoe
