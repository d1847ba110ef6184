#include "parallel/mpi_world.h"

#include <algorithm>

#include "parallel/mpi_error.h"

namespace hybridmoe {

MpiWorld::MpiWorld(MPI_Comm ranks, const std::string& host) {
  int rank = 0, size = 0;
  check_mpi(MPI_Comm_rank(ranks, &rank), "asking for the rank");
  check_mpi(MPI_Comm_size(ranks, &size), "asking for the number of ranks");
  if (size == 1) {
    ordered_ = ranks;
    hosts_ = hosts_of({host});
    communicator_ = make_local_communicator();
    return;
  }
  communicator_ = make_mpi_communicator(ranks, progress_);
  ordered_ = ranks;
  hosts_ = hosts_of(communicator_->gather_strings(host, "host names"));
  const std::vector<int> order = neighbours_first(hosts_);
  if (std::is_sorted(order.begin(), order.end())) return;
  const auto place = std::find(order.begin(), order.end(), rank) - order.begin();
  check_mpi(MPI_Comm_split(ranks, 0, static_cast<int>(place), &ordered_), "ordering the ranks by hosts");
  communicator_ = make_mpi_communicator(ordered_, progress_);
  std::sort(hosts_.of_rank.begin(), hosts_.of_rank.end());
}

MakeCommunicator MpiWorld::make_groups() const {
  return [world = ordered_, progress = progress_](Group, const std::vector<int>& members) {
    int rank = 0;
    check_mpi(MPI_Comm_rank(world, &rank), "asking for the rank");
    MPI_Comm part = MPI_COMM_NULL;
    check_mpi(MPI_Comm_split(world, members.front(), rank, &part), "splitting the world");
    auto communicator = make_mpi_communicator(part, progress);
    check_mpi(MPI_Comm_free(&part), "freeing a communicator");  // the communicator has a duplicate
    return communicator;
  };
}

}  // namespace hybridmoe
