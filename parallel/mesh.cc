#include "parallel/mesh.h"

#include "core/error.h"
#include "parallel/mpi_communicator.h"
#include "parallel/mpi_error.h"

namespace hybridmoe {

std::vector<std::string> layout_violations(const Layout& layout, const LayoutDemands& demands) {
  std::vector<std::string> reasons;
  const auto at_least_one = [&](const char* name, int value) {
    if (value < 1) reasons.push_back(cat(name, " ", value, " must be at least 1"));
  };
  at_least_one("the world of", layout.world);
  at_least_one("tensor size", layout.tensor);
  at_least_one("expert size", layout.expert);
  at_least_one("expert-tensor size", layout.expert_tensor);
  if (!reasons.empty()) return reasons;  // nothing can be divided

  const auto divides = [&](const std::string& name, std::int64_t divisor, const char* what, int value) {
    if (value % divisor != 0) reasons.push_back(cat(name, " ", divisor, " must divide ", what, " ", value));
  };
  const int t = layout.tensor, et = layout.expert_tensor, g = demands.kv_heads;
  const std::int64_t experts_over = std::int64_t{layout.expert} * et;
  divides("tensor size", t, "the number of ranks", layout.world);
  divides("tensor size", t, "the heads", demands.heads);
  if (g > 0 && g % t != 0 && t % g != 0) {
    reasons.push_back(
        cat("tensor size ", t, " must divide the key/value heads ", g, " or be a multiple of them"));
  }
  divides("tensor size", t, "the sequence length", demands.sequence_length);
  divides("tensor size", t, "the dense hidden size", demands.dense_hidden);
  divides("tensor size", t, "the shared experts' hidden size", demands.shared_hidden);
  divides("expert-tensor size", et, "the expert hidden size", demands.expert_hidden);
  divides("expert size times expert-tensor size", experts_over, "the number of ranks", layout.world);
  divides("expert size", layout.expert, "the number of experts", demands.experts);
  if (layout.world % t == 0) {
    divides("the number of data-parallel ranks", layout.world / t, "the sequences of a micro-batch",
            demands.micro_batch_sequences);
  }
  return reasons;
}

Mesh::Mesh(const Layout& layout, int kv_heads)
    : layout_(layout), kv_heads_(kv_heads > 0 ? kv_heads : layout.tensor) {
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
      return kv_heads_ < layout_.tensor ? tensor_rank(rank) * kv_heads_ / layout_.tensor : tensor_rank(rank);
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

MeshCommunicators::MeshCommunicators(MPI_Comm world, const Mesh& mesh) {
  int rank = 0, size = 0;
  check_mpi(MPI_Comm_rank(world, &rank), "asking for the rank");
  check_mpi(MPI_Comm_size(world, &size), "asking for the number of ranks");
  require(size == mesh.layout().world, "a mesh for ", mesh.layout().world, " ranks, but MPI has ", size);
  const auto progress = make_mpi_progress();
  owned_.push_back(make_local_communicator());
  Communicator* const alone = owned_.back().get();
  if (size > 1) owned_.push_back(make_mpi_communicator(world, progress));
  groups_.world = owned_.back().get();

  // Groups of a kind have the same size everywhere, so every rank takes the same branch.
  const auto make = [&](Group group) -> Communicator* {
    const std::size_t members = mesh.members(group, rank).size();
    if (members == 1) return alone;
    if (members == static_cast<std::size_t>(size)) return groups_.world;
    MPI_Comm part = MPI_COMM_NULL;
    check_mpi(MPI_Comm_split(world, mesh.color(group, rank), rank, &part), "splitting the world");
    owned_.push_back(make_mpi_communicator(part, progress));
    check_mpi(MPI_Comm_free(&part), "freeing a communicator");  // the communicator has a duplicate
    return owned_.back().get();
  };
  groups_.data = make(Group::Data);
  groups_.tensor = make(Group::Tensor);
  groups_.expert = make(Group::Expert);
  groups_.expert_data = make(Group::ExpertData);
  groups_.key_value = make(Group::KeyValue);
  groups_.expert_tensor = mesh.layout().expert_tensor;
}

}  // namespace hybridmoe
