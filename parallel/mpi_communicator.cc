#include "parallel/mpi_communicator.h"

#include <climits>
#include <cstring>
#include <numeric>
#include <utility>

#include "parallel/collective_arguments.h"
#include "parallel/mpi_error.h"
#include "parallel/mpi_operation.h"
#include "parallel/mpi_progress.h"
#include "parallel/mpi_reduce_scatter.h"

namespace hybridmoe {
namespace {

// Messages of all_to_all_rows; those of reduce_scatter have their own (parallel/mpi_reduce_scatter.h). Nobody
// sends the third.
constexpr int kRowsTag = 2, kNoTag = 3;

class MpiCommunicator : public Communicator {
 public:
  MpiCommunicator(MPI_Comm group, std::shared_ptr<MpiProgress> progress) : progress_(std::move(progress)) {
    check_mpi(MPI_Comm_dup(group, &comm_), "duplicating a communicator");
    check_mpi(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "setting an error handler");
    check_mpi(MPI_Comm_rank(comm_, &rank_), "asking for the rank");
    check_mpi(MPI_Comm_size(comm_, &size_), "asking for the number of ranks");
    reductions_ = std::make_shared<ReduceScatterQueue>(comm_, rank_, size_, kReduceScatterScratch, progress_);
    progress_->add(reductions_);
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  Event all_reduce(const Tensor& data, ReduceOp op, const char* label) override;
  Event reduce_scatter(const Tensor& input, const Tensor& output, const char* label) override;
  Event all_gather(const Tensor& input, const Tensor& output, const char* label) override;
  Event broadcast(const Tensor& data, int root, const char* label) override;
  Event all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows, const Tensor& recv,
                        const std::vector<std::int64_t>& recv_rows, const char* label) override;
  void barrier(const char* label) override;
  void progress() override;
  void add_background(const std::weak_ptr<Background>& work) override { progress_->add(work); }
  std::vector<std::string> gather_strings(const std::string& mine, const char* label) override;

 private:
  std::shared_ptr<MpiOperation> start(const char* label);
  void send_or_receive(MpiOperation& operation, const Tensor& rows, const std::vector<std::int64_t>& counts,
                       bool sending);

  std::shared_ptr<MpiProgress> progress_;
  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  std::vector<std::shared_ptr<MpiOperation>> operations_;  // reused once done and forgotten by the caller
  std::shared_ptr<ReduceScatterQueue> reductions_;
};

// The operation for a new call: an old one that nobody waits for any more, or a new one.
std::shared_ptr<MpiOperation> MpiCommunicator::start(const char* label) {
  for (const auto& operation : operations_) {
    if (!operation->failure().empty()) throw Error(operation->failure());
  }
  for (const auto& operation : operations_) {
    if (operation.use_count() == 1 && operation->test()) {
      operation->reset(label);
      return operation;
    }
  }
  operations_.push_back(std::make_shared<MpiOperation>(progress_));
  operations_.back()->reset(label);
  return operations_.back();
}

Event MpiCommunicator::all_reduce(const Tensor& data, ReduceOp op, const char* label) {
  check_all_reduce(data, label);
  const auto operation = start(label);
  const MPI_Datatype type = mpi_number_type(data.dtype, label);
  const std::int64_t most = INT_MAX / 2;  // elements of one call, whose count is an int
  for (std::int64_t begin = 0; begin < data.elements(); begin += most) {
    const Tensor part = data.flat(begin, std::min(begin + most, data.elements()));
    check_mpi(MPI_Iallreduce(MPI_IN_PLACE, part.data, static_cast<int>(part.elements()), type,
                             op == ReduceOp::Sum ? MPI_SUM : MPI_MAX, comm_, operation->add_request()),
              "all_reduce ", label);
  }
  return Event(operation);
}

Event MpiCommunicator::reduce_scatter(const Tensor& input, const Tensor& output, const char* label) {
  check_reduce_scatter(input, output, size_, label);
  return reductions_->start(input, output, label);
}

Event MpiCommunicator::all_gather(const Tensor& input, const Tensor& output, const char* label) {
  check_all_gather(input, output, size_, label);
  const auto operation = start(label);
  if (input.bytes() == 0) return Event(operation);
  const MpiBytes part(input.bytes());
  const bool in_place = input.data == static_cast<char*>(output.data) + rank_ * input.bytes();
  check_mpi(MPI_Iallgather(in_place ? MPI_IN_PLACE : input.data, part.count(), part.type(), output.data,
                           part.count(), part.type(), comm_, operation->add_request()),
            "all_gather ", label);
  return Event(operation);
}

Event MpiCommunicator::broadcast(const Tensor& data, int root, const char* label) {
  check_broadcast(data, root, size_, label);
  const auto operation = start(label);
  if (data.bytes() == 0) return Event(operation);
  const MpiBytes all(data.bytes());
  check_mpi(MPI_Ibcast(data.data, all.count(), all.type(), root, comm_, operation->add_request()),
            "broadcast ", label);
  return Event(operation);
}

// Posts one message per rank that gets or gives rows; the own rows are copied by the caller.
void MpiCommunicator::send_or_receive(MpiOperation& operation, const Tensor& rows,
                                      const std::vector<std::int64_t>& counts, bool sending) {
  const std::int64_t row_bytes = rows.rows() == 0 ? 0 : rows.bytes() / rows.rows();
  char* place = static_cast<char*>(rows.data);
  for (int peer = 0; peer < size_; ++peer) {
    const std::int64_t bytes = counts[peer] * row_bytes;
    if (peer != rank_ && bytes > 0) {
      const MpiBytes message(bytes);
      if (sending) {
        check_mpi(
            MPI_Isend(place, message.count(), message.type(), peer, kRowsTag, comm_, operation.add_request()),
            "all_to_all_rows ", operation.label());
      } else {
        check_mpi(MPI_Irecv(place, message.count(), message.type(), peer, kRowsTag, comm_,
                            operation.add_receive(peer, bytes)),
                  "all_to_all_rows ", operation.label());
      }
    }
    place += bytes;
  }
}

Event MpiCommunicator::all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows,
                                       const Tensor& recv, const std::vector<std::int64_t>& recv_rows,
                                       const char* label) {
  check_all_to_all_rows(send, send_rows, recv, recv_rows, rank_, size_, label);
  const std::int64_t own_send =
      std::accumulate(send_rows.begin(), send_rows.begin() + rank_, std::int64_t{0});
  const std::int64_t own_recv =
      std::accumulate(recv_rows.begin(), recv_rows.begin() + rank_, std::int64_t{0});
  const auto operation = start(label);
  send_or_receive(*operation, recv, recv_rows, false);
  send_or_receive(*operation, send, send_rows, true);
  const Tensor own = send.rows(own_send, own_send + send_rows[rank_]);
  if (own.bytes() > 0) {
    std::memcpy(recv.rows(own_recv, own_recv + recv_rows[rank_]).data, own.data, own.bytes());
  }
  return Event(operation);
}

void MpiCommunicator::barrier(const char* label) {
  const auto operation = start(label);
  check_mpi(MPI_Ibarrier(comm_, operation->add_request()), "barrier ", label);
  operation->wait();
}

// MPI moves the messages of all communicators of the process whenever it waits for any, and it does when it
// is asked for a message that has not come. Operations cannot be asked: this group's may all be done.
void MpiCommunicator::progress() {
  int arrived = 0;
  MPI_Iprobe(rank_, kNoTag, comm_, &arrived, MPI_STATUS_IGNORE);
  progress_->advance();
}

std::vector<std::string> MpiCommunicator::gather_strings(const std::string& mine, const char* label) {
  const std::int64_t length = std::ssize(mine);
  std::vector<std::int64_t> lengths(size_);
  auto operation = start(label);
  check_mpi(MPI_Iallgather(&length, 1, MPI_INT64_T, lengths.data(), 1, MPI_INT64_T, comm_,
                           operation->add_request()),
            label);
  operation->wait();
  std::vector<int> counts(size_), offsets(size_);
  std::int64_t total = 0;
  for (int r = 0; r < size_; ++r) {
    counts[r] = static_cast<int>(lengths[r]);
    offsets[r] = static_cast<int>(total);
    total += lengths[r];
    require(total <= INT_MAX, label, ": the ranks' texts together exceed ", INT_MAX, " bytes");
  }
  std::string all(total, '\0');
  operation->reset(label);
  check_mpi(MPI_Iallgatherv(mine.data(), counts[rank_], MPI_BYTE, all.data(), counts.data(), offsets.data(),
                            MPI_BYTE, comm_, operation->add_request()),
            label);
  operation->wait();
  std::vector<std::string> texts;
  for (int r = 0; r < size_; ++r) texts.push_back(all.substr(offsets[r], counts[r]));
  return texts;
}

}  // namespace

std::shared_ptr<MpiProgress> make_mpi_progress() { return std::make_shared<MpiProgress>(); }

std::unique_ptr<Communicator> make_mpi_communicator(MPI_Comm group, std::shared_ptr<MpiProgress> progress) {
  return std::make_unique<MpiCommunicator>(group, std::move(progress));
}

}  // namespace hybridmoe
