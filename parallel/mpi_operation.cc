#include "parallel/mpi_operation.h"

#include <climits>

#include "parallel/mpi_error.h"

namespace hybridmoe {

MPI_Datatype mpi_number_type(DType dtype, const char* label) {
  switch (dtype) {
    case DType::F64:
      return MPI_DOUBLE;
    case DType::F32:
      return MPI_FLOAT;
    case DType::I64:
      return MPI_INT64_T;
    case DType::I32:
      return MPI_INT32_T;
    default:
      throw Error(cat(label, ": reductions are for f64, f32, i64 and i32, not ", name_of(dtype)));
  }
}

MpiBytes::MpiBytes(std::int64_t bytes) : count_(static_cast<int>(bytes)) {
  if (bytes <= INT_MAX) return;
  constexpr int kBlock = 1 << 20;
  MPI_Datatype block, blocks;
  check_mpi(MPI_Type_contiguous(kBlock, MPI_BYTE, &block), "making a large type");
  check_mpi(MPI_Type_contiguous(static_cast<int>(bytes / kBlock), block, &blocks), "making a large type");
  const int lengths[] = {1, static_cast<int>(bytes % kBlock)};
  const MPI_Aint offsets[] = {0, bytes / kBlock * kBlock};
  const MPI_Datatype types[] = {blocks, MPI_BYTE};
  check_mpi(MPI_Type_create_struct(2, lengths, offsets, types, &type_), "making a large type");
  check_mpi(MPI_Type_commit(&type_), "making a large type");
  MPI_Type_free(&block);
  MPI_Type_free(&blocks);
  count_ = 1;
}

MpiBytes::~MpiBytes() {
  if (type_ != MPI_BYTE) MPI_Type_free(&type_);
}

void MpiOperation::reset(const char* label) {
  label_ = label;
  requests_.clear();
  receives_.clear();
  failure_.clear();
}

MPI_Request* MpiOperation::add_request() {
  requests_.push_back(MPI_REQUEST_NULL);
  return &requests_.back();
}

MPI_Request* MpiOperation::add_receive(int peer, std::int64_t bytes) {
  receives_.push_back({static_cast<int>(requests_.size()), peer, bytes});
  return add_request();
}

bool MpiOperation::test() {
  if (requests_.empty()) return true;
  int done = 0;
  statuses_.resize(requests_.size());
  const int code = MPI_Testall(static_cast<int>(requests_.size()), requests_.data(), &done, statuses_.data());
  if (code != MPI_SUCCESS || done != 0) finish(code);
  return requests_.empty();
}

void MpiOperation::wait() {
  while (!test()) progress_->advance();
  if (!failure_.empty()) throw Error(failure_);
}

// All requests are over (or have failed): keeps what went wrong, and forgets them.
void MpiOperation::finish(int code) {
  try {
    if (code == MPI_ERR_IN_STATUS) {
      for (const MPI_Status& status : statuses_) {
        if (status.MPI_ERROR != MPI_ERR_PENDING) check_mpi(status.MPI_ERROR, label_);
      }
    }
    check_mpi(code, label_);
    for (const Receive& receive : receives_) {
      MPI_Count bytes = 0;
      MPI_Get_elements_x(&statuses_[receive.request], MPI_BYTE, &bytes);
      require(bytes == receive.bytes, label_, ": rank ", receive.peer, " of the group sent ", bytes,
              " bytes where ", receive.bytes, " were expected; its row counts disagree with this rank's");
    }
  } catch (const Error& error) {
    failure_ = error.what();
  }
  requests_.clear();
}

}  // namespace hybridmoe
