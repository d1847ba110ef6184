#include "parallel/counting_communicator.h"

namespace hybridmoe {

void CountingCommunicator::count(const char* label, std::int64_t bytes) {
  Traffic& traffic = log_[label];
  ++traffic.calls;
  traffic.bytes += bytes;
}

Event CountingCommunicator::all_reduce(const Tensor& data, ReduceOp op, const char* label) {
  const std::int64_t elements = data.elements(), others = size() - 1;
  const std::int64_t own = (rank() + 1) * elements / size() - rank() * elements / size();
  count(label, (elements - own + others * own) * size_of(data.dtype));
  return ForwardingCommunicator::all_reduce(data, op, label);
}

Event CountingCommunicator::reduce_scatter(const Tensor& input, const Tensor& output, const char* label) {
  count(label, (size() - 1) * output.bytes());
  return ForwardingCommunicator::reduce_scatter(input, output, label);
}

Event CountingCommunicator::all_gather(const Tensor& input, const Tensor& output, const char* label) {
  count(label, (size() - 1) * input.bytes());
  return ForwardingCommunicator::all_gather(input, output, label);
}

Event CountingCommunicator::broadcast(const Tensor& data, int root, const char* label) {
  count(label, rank() == root ? (size() - 1) * data.bytes() : 0);
  return ForwardingCommunicator::broadcast(data, root, label);
}

Event CountingCommunicator::all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows,
                                            const Tensor& recv, const std::vector<std::int64_t>& recv_rows,
                                            const char* label) {
  Traffic& traffic = log_[label];
  const std::size_t ranks = size();
  require(send_rows.size() == ranks && (traffic.rows_to.empty() || traffic.rows_to.size() == ranks), label,
          ": rows of one label are counted over groups of one size, not ", traffic.rows_to.size(), " and ",
          ranks, " ranks");
  traffic.rows_to.resize(ranks);
  traffic.bytes_to.resize(ranks);
  const std::int64_t row_bytes = send.rows() == 0 ? 0 : send.bytes() / send.rows();
  std::int64_t sent = 0;
  for (int r = 0; r < size(); ++r) {
    const std::int64_t bytes = send_rows[r] * row_bytes;
    traffic.rows_to[r] += send_rows[r];
    traffic.bytes_to[r] += bytes;
    if (r == rank() || send_rows[r] == 0) continue;
    sent += bytes;
    ++traffic.messages;
  }
  count(label, sent);
  return ForwardingCommunicator::all_to_all_rows(send, send_rows, recv, recv_rows, label);
}

void CountingCommunicator::barrier(const char* label) {
  count(label, 0);
  ForwardingCommunicator::barrier(label);
}

std::vector<std::string> CountingCommunicator::gather_strings(const std::string& mine, const char* label) {
  count(label, (size() - 1) * std::ssize(mine));
  return ForwardingCommunicator::gather_strings(mine, label);
}

MakeCommunicator counting(MakeCommunicator make, TrafficLog& log) {
  return [make = std::move(make), &log](Group group, const std::vector<int>& members) {
    return std::make_unique<CountingCommunicator>(make(group, members), log);
  };
}

}  // namespace hybridmoe
