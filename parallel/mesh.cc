#include "parallel/mesh.h"

#include <map>
#include <string>

#include "core/error.h"

namespace hybridmoe {

Mesh::Mesh(const Layout& layout, std::int64_t kv_heads)
    : layout_(layout), kv_heads_(kv_heads > 0 ? kv_heads : layout.tensor) {
  require(layout.world != 0, "a mesh needs to know the number of ranks");
  std::string all;
  for (const std::string& reason : layout_violations(layout, {.kv_heads = kv_heads_})) {
    all += cat(all.empty() ? "" : "; ", reason);
  }
  require(all.empty(), "impossible parallel layout: ", all);
}

int Mesh::color(Group group, int rank) const {
  const int expert_block = layout_.expert * layout_.expert_tensor;
  switch (group) {
    case Group::World:
      return 0;
    case Group::Data:
      return tensor_rank(rank);
    case Group::Tensor:
      return data_rank(rank);
    case Group::KeyValue:
      // Tensor rank t holds key/value head floor(t G / T) when T > G, and G / T heads of its own when not.
      return kv_heads_ < layout_.tensor ? static_cast<int>(tensor_rank(rank) * kv_heads_ / layout_.tensor)
                                        : tensor_rank(rank);
    case Group::Expert:
      return rank / expert_block;
    case Group::ExpertTensor:
      return rank / layout_.expert_tensor;
    case Group::ExpertData:
      return rank % expert_block;
  }
  throw Error("unknown group");
}

std::vector<int> Mesh::members(Group group, int rank) const {
  std::vector<int> ranks;
  for (int other = 0; other < layout_.world; ++other) {
    if (color(group, other) == color(group, rank)) ranks.push_back(other);
  }
  return ranks;
}

bool same_groups(const Mesh& mesh, Group a, Group b) {
  std::map<int, int> b_of_a, a_of_b;  // colors that occur together: each with one other
  for (int rank = 0; rank < mesh.layout().world; ++rank) {
    const int in_a = mesh.color(a, rank), in_b = mesh.color(b, rank);
    if (b_of_a.emplace(in_a, in_b).first->second != in_b) return false;
    if (a_of_b.emplace(in_b, in_a).first->second != in_a) return false;
  }
  return true;
}

MeshCommunicators::MeshCommunicators(const Mesh& mesh, Communicator& world, const MakeCommunicator& make,
                                     const std::vector<int>& host_of_rank) {
  require(world.size() == mesh.layout().world, "a mesh for ", mesh.layout().world,
          " ranks, but the world has ", world.size());
  groups_.world = &world;
  groups_.expert_tensor = mesh.layout().expert_tensor;
  owned_.push_back(make_local_communicator());
  made_.emplace_back(Group::World, &world);
  groups_.data = find_or_make(mesh, Group::Data, make);
  groups_.tensor = find_or_make(mesh, Group::Tensor, make);
  groups_.expert = find_or_make(mesh, Group::Expert, make);
  groups_.expert_data = find_or_make(mesh, Group::ExpertData, make);
  groups_.key_value = find_or_make(mesh, Group::KeyValue, make);
  if (!host_of_rank.empty()) make_relays(mesh, host_of_rank, make);
}

// Every rank makes all three, also where its own expert group lies on one host, or its host has one rank of
// the group: making is collective over the world.
void MeshCommunicators::make_relays(const Mesh& mesh, const std::vector<int>& host_of_rank,
                                    const MakeCommunicator& make) {
  require(std::ssize(host_of_rank) == mesh.layout().world, "hosts for ", host_of_rank.size(), " of ",
          mesh.layout().world, " ranks");
  bool several = false;
  for (int rank = 0; rank < mesh.layout().world; ++rank) {
    const int first = mesh.members(Group::Expert, rank).front();
    several = several || host_of_rank[rank] != host_of_rank[first];
  }
  if (!several) return;
  const int rank = groups_.world->rank();
  const std::vector<int> all = mesh.members(Group::Expert, rank);
  std::vector<int> here;
  for (const int other : all) {
    relays_.host_of.push_back(host_of_rank[other]);
    if (host_of_rank[other] == host_of_rank[rank]) here.push_back(other);
  }
  for (Communicator** place : {&relays_.gather, &relays_.cross, &relays_.scatter}) {
    owned_.push_back(make(Group::Expert, place == &relays_.cross ? all : here));
    *place = owned_.back().get();
  }
  groups_.relays = &relays_;
}

// Groups of a kind have the same size everywhere and the mesh alone decides, so every rank takes the same
// branch.
Communicator* MeshCommunicators::find_or_make(const Mesh& mesh, Group group, const MakeCommunicator& make) {
  const int rank = groups_.world->rank();
  const std::vector<int> members = mesh.members(group, rank);
  if (members.size() == 1) return owned_.front().get();
  for (const auto& [other, communicator] : made_) {
    if (same_groups(mesh, group, other)) return communicator;
  }
  owned_.push_back(make(group, members));
  Communicator* const made = owned_.back().get();
  const bool right = made->size() == std::ssize(members) && members[made->rank()] == rank;
  require(right, "the communicator made for rank ", rank, " of the world is rank ", made->rank(), " of ",
          made->size());
  made_.emplace_back(group, made);
  return made;
}

}  // namespace hybridmoe
