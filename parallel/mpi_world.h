// The world that MPI connects, with the ranks of a host as neighbours, so that tensor groups and (while they
// fit) expert groups stay within a host whatever order mpirun placed the ranks in.
#pragma once

#include <memory>
#include <mpi.h>
#include <string>

#include "parallel/hosts.h"
#include "parallel/mesh.h"
#include "parallel/mpi_communicator.h"

namespace hybridmoe {

class MpiWorld {
 public:
  // Collective over `ranks`. Rank numbers of the world are places in neighbours_first of the ranks' host
  // names; rank 0 is rank 0 of `ranks`. `host` replaces the name of this rank's host (for tests).
  explicit MpiWorld(MPI_Comm ranks = MPI_COMM_WORLD, const std::string& host = this_host());

  // Over all ranks, in the order above; a local communicator for a world of one. Owned here.
  Communicator& communicator() const { return *communicator_; }
  // By rank number of the world.
  const Hosts& hosts() const { return hosts_; }

  // MPI's own communicator over the same ranks in the same order, for measurements; communicator() has its
  // own traffic.
  MPI_Comm raw() const { return ordered_; }

  // For MeshCommunicators over this world. Whoever waits on one of the communicators keeps all of them
  // moving.
  MakeCommunicator make_groups() const;

 private:
  std::shared_ptr<MpiProgress> progress_ = make_mpi_progress();
  MPI_Comm ordered_ = MPI_COMM_NULL;  // lives until MPI_Finalize, as communicators do
  Hosts hosts_;
  std::unique_ptr<Communicator> communicator_;
};

}  // namespace hybridmoe
