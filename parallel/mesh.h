// Which ranks work together. The first part is arithmetic on rank numbers and knows no MPI; the second makes
// the communicators of a rank's groups.
//
// Tensor ranks are neighbours. Expert groups are runs of E * ET neighbours, whatever the tensor size: expert
// parallelism folds over tensor x data. With tensor, expert and expert-tensor size 1 (all that this version
// trains with) the data and expert-data groups are the world and the others have one rank.
#pragma once

#include <memory>
#include <mpi.h>
#include <string>
#include <vector>

#include "core/groups.h"

namespace hybridmoe {

struct Layout {
  int world = 1;
  int tensor = 1;         // T: ranks that split dense matrices, heads and sequences
  int expert = 1;         // E: ranks (or groups of ET ranks) that split the set of experts
  int expert_tensor = 1;  // ET: ranks that split every expert
};

// What a layout must divide; 0: the model has none of it.
struct LayoutDemands {
  int heads = 0, kv_heads = 0, sequence_length = 0, dense_hidden = 0, shared_hidden = 0;
  int experts = 0, expert_hidden = 0;
  int micro_batch_sequences = 0;
};

// Every reason why the layout is impossible, in words with the numbers; empty: legal.
std::vector<std::string> layout_violations(const Layout& layout, const LayoutDemands& demands = {});

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
  // Throws Error with all reasons when the layout (without demands) is not legal. kv_heads 0 means as many as
  // tensor ranks need.
  explicit Mesh(const Layout& layout, int kv_heads = 0);

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
  int kv_heads_;
};

// The communicators of this rank's groups, which `groups()` lends out. Construction is collective over
// `world`. Groups that are the world share its communicator, groups of one rank are local.
class MeshCommunicators {
 public:
  MeshCommunicators(MPI_Comm world, const Mesh& mesh);
  Groups groups() const { return groups_; }

 private:
  std::vector<std::unique_ptr<Communicator>> owned_;
  Groups groups_;
};

}  // namespace hybridmoe
