// MPI under the communicator interface. Everything that MPI knows about a run enters through this file: start
// and end of MPI, and communicators over groups of ranks.
//
// One thread of a process calls into MPI (MPI_THREAD_FUNNELED): the one that made the MpiEnvironment.
#pragma once

#include <memory>
#include <mpi.h>

#include "core/communicator.h"

namespace hybridmoe {

// MPI from construction to destruction; one per process, first thing in main after the signal handlers
// (parallel/stop_signal.h). A process that mpirun did not start is a world of one rank and needs no daemon.
// Throws Error when MPI was started already or offers too few guarantees about threads.
class MpiEnvironment {
 public:
  MpiEnvironment(int* argc, char*** argv);
  // MPI_Finalize, which waits for the other ranks. While an exception unwinds the stack they would wait for
  // this one for ever, so then the job is aborted with status 1 instead. Catch in main and call abort to
  // print the reason first.
  ~MpiEnvironment();
  MpiEnvironment(const MpiEnvironment&) = delete;
  MpiEnvironment& operator=(const MpiEnvironment&) = delete;

  int rank() const { return rank_; }  // in the world
  int size() const { return size_; }

  // Ends every rank of the job with this exit status, after flushing stdout and stderr.
  [[noreturn]] void abort(int status);

 private:
  int exceptions_at_start_;
  int rank_ = 0;
  int size_ = 1;
};

// The library and its version: "Open MPI v4.1.4".
std::string mpi_version();

// A communicator over the ranks of `group`, in their order. Collective over the group: it makes a duplicate
// of `group`, so the caller's own traffic cannot mix with it. The duplicate lives until MPI_Finalize, because
// freeing it would be a collective and destructors perform none.
//
// Sums: reduce_scatter adds in rank order, x_0 + x_1 + ..., whatever the sizes. all_reduce has the order of
// MPI_Iallreduce, which in Open MPI depends on the sizes and the number of ranks alone and ends with the same
// bits on every rank. Memory beside the caller's tensors: at most kReduceScatterScratch bytes for all
// reduce_scatters of a communicator together, plus what MPI takes itself.
//
// A failed operation throws Error from wait(), with MPI's own words; calls after it throw the same.
//
// Waiting on one communicator must not keep another's reduce_scatter from advancing, since a peer may wait
// for that: communicators with operations in flight at the same time share one MpiProgress.
class MpiProgress;
std::shared_ptr<MpiProgress> make_mpi_progress();
std::unique_ptr<Communicator> make_mpi_communicator(MPI_Comm group, std::shared_ptr<MpiProgress> progress);

inline constexpr std::int64_t kReduceScatterScratch = std::int64_t{8} << 20;

}  // namespace hybridmoe
