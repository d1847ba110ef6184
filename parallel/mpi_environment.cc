#include <cstdio>
#include <cstdlib>
#include <exception>

#include "parallel/mpi_communicator.h"
#include "parallel/mpi_error.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#endif

namespace hybridmoe {
namespace {

// Open MPI forks a daemon for a process without mpirun, unless told that the process will stay alone. The
// variables are those that mpirun, Slurm's and other PMI launchers set.
void stay_alone_without_launcher() {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"}) {
    if (std::getenv(name) != nullptr) return;
  }
  setenv("OMPI_MCA_ess_singleton_isolated", "1", 0);
}

}  // namespace

MpiEnvironment::MpiEnvironment(int* argc, char*** argv) : exceptions_at_start_(std::uncaught_exceptions()) {
  int started = 0;
  MPI_Initialized(&started);
  require(started == 0, "MPI was started before; a process makes one MpiEnvironment");
  stay_alone_without_launcher();
  int provided = 0;
#ifdef __SANITIZE_ADDRESS__
  __lsan_disable();  // what plugins leak that are unloaded again has no name to suppress it by
#endif
  const int code = MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided);
#ifdef __SANITIZE_ADDRESS__
  __lsan_enable();
#endif
  check_mpi(code, "starting MPI");
  require(provided >= MPI_THREAD_FUNNELED, "this MPI library was built without support for threads (level ",
          provided, ", at least ", int{MPI_THREAD_FUNNELED}, " is needed); install Open MPI");
  check_mpi(MPI_Comm_rank(MPI_COMM_WORLD, &rank_), "asking for the rank");
  check_mpi(MPI_Comm_size(MPI_COMM_WORLD, &size_), "asking for the number of ranks");
}

MpiEnvironment::~MpiEnvironment() {
  if (std::uncaught_exceptions() > exceptions_at_start_) abort(1);
#ifdef __SANITIZE_ADDRESS__
  // Leaks of MPI's plugins have no names any more once MPI_Finalize has unloaded them, and could not be told
  // from ours (tests/sanitizers/leaks.txt).
  __lsan_do_leak_check();
#endif
  MPI_Finalize();
}

std::string mpi_version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  check_mpi(MPI_Get_library_version(text, &length), "asking for the library's version");
  const std::string all(text, static_cast<std::size_t>(length));
  return all.substr(0, all.find_first_of(",\n"));  // behind it: who built it, and for whom
}

void MpiEnvironment::abort(int status) {
  std::fflush(stdout);
  std::fflush(stderr);
  if (size_ > 1) MPI_Abort(MPI_COMM_WORLD, status);
  std::_Exit(status);  // a single rank needs no abort message; MPI_Abort does not return
}

}  // namespace hybridmoe
