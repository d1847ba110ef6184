// MPI's return codes become Errors.
#pragma once

#include <mpi.h>
#include <string>

#include "core/error.h"

namespace hybridmoe {

// Throws Error("DOING: MPI's words") unless the code is MPI_SUCCESS. The communicator concerned must return
// its errors (MPI_ERRORS_RETURN), else MPI ends the program before.
template <class... Doing>
void check_mpi(int code, const Doing&... doing) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw Error(cat(doing..., ": ", std::string(text, length)));
}

}  // namespace hybridmoe
