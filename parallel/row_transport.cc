#include "parallel/row_transport.h"

namespace hybridmoe {

namespace {

class FlatTransport : public RowTransport {
 public:
  explicit FlatTransport(Communicator& group) : group_(group) {}

  RowCounts exchange_counts(const std::vector<std::int64_t>& to_ranks) override {
    const std::int64_t ranks = group_.size(), chunks = std::ssize(to_ranks) / ranks;
    std::vector<std::int64_t> out = to_ranks;
    RowCounts counts{.received = std::vector<std::int64_t>(to_ranks.size()), .pairs = {}};
    const std::vector<std::int64_t> one_each(ranks, 1);
    const Tensor send(out.data(), DType::I64, {ranks, chunks});
    const Tensor recv(counts.received.data(), DType::I64, {ranks, chunks});
    group_.all_to_all_rows(send, one_each, recv, one_each, "route counts").wait();
    return counts;
  }
  Event move(const RowMovement& m) override {
    return group_.all_to_all_rows(m.send, m.send_rows, m.recv, m.recv_rows, m.labels->direct);
  }

 private:
  Communicator& group_;
};

}  // namespace

std::unique_ptr<RowTransport> make_flat_transport(Communicator& group) {
  return std::make_unique<FlatTransport>(group);
}

}  // namespace hybridmoe
