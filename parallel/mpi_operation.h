// What an asynchronous MPI call leaves behind: requests to test, receives whose size is checked, the failure.
#pragma once

#include <cstdint>
#include <memory>
#include <mpi.h>
#include <string>
#include <vector>

#include "core/communicator.h"
#include "parallel/mpi_progress.h"

namespace hybridmoe {

// The type for arithmetic in MPI; throws Error for a type that all_reduce does not take.
MPI_Datatype mpi_number_type(DType dtype, const char* label);

// `bytes` bytes as a count and a type, although MPI's counts are ints. The type lives as long as the object;
// MPI keeps what a started call needs.
class MpiBytes {
 public:
  explicit MpiBytes(std::int64_t bytes);
  ~MpiBytes();
  MpiBytes(const MpiBytes&) = delete;
  MpiBytes& operator=(const MpiBytes&) = delete;
  int count() const { return count_; }
  MPI_Datatype type() const { return type_; }

 private:
  int count_;
  MPI_Datatype type_ = MPI_BYTE;
};

// A set of requests that belong to one call. A failure is kept and thrown by wait().
class MpiOperation : public Event::State {
 public:
  // wait() keeps `progress` moving.
  explicit MpiOperation(std::shared_ptr<MpiProgress> progress) : progress_(std::move(progress)) {}

  // Forgets the last call; all its requests have finished.
  void reset(const char* label);
  const char* label() const { return label_; }
  const std::string& failure() const { return failure_; }

  // The place for the handle of the next request; valid until the next call of either.
  MPI_Request* add_request();
  // The same for a receive that must bring exactly so many bytes.
  MPI_Request* add_receive(int peer, std::int64_t bytes);

  bool test() override;
  void wait() override;

 private:
  struct Receive {
    int request, peer;
    std::int64_t bytes;
  };
  void finish(int code);

  std::shared_ptr<MpiProgress> progress_;
  const char* label_ = "";
  std::vector<MPI_Request> requests_;
  std::vector<MPI_Status> statuses_;
  std::vector<Receive> receives_;
  std::string failure_;
};

}  // namespace hybridmoe
