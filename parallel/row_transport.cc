#include "parallel/row_transport.h"

namespace hybridmoe {

namespace {

class FlatTransport : public RowTransport {
 public:
  explicit FlatTransport(Communicator& group) : group_(group) {}

  Event exchange_counts(const Tensor& to, const Tensor& from, PairCounts*) override {
    const std::vector<std::int64_t> one_each(group_.size(), 1);
    return group_.all_to_all_rows(to, one_each, from, one_each, "route counts");
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
