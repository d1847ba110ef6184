#include "parallel/relay_transport.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "parallel/relay_queue.h"

namespace hybridmoe {

namespace {

class RelayTransport : public RowTransport {
 public:
  RelayTransport(Communicator& group, const HostRelays& relays)
      : group_(group), queue_(std::make_shared<RelayQueue>(relays, group.rank())) {
    group_.add_background(queue_);
  }
  ~RelayTransport() override { queue_->abandon(); }

  void declare_shared(MemoryPlan& memory, const ExchangePlace& place, const RowSizes& sizes) override;
  Event exchange_counts(const Tensor& to, const Tensor& from, PairCounts* pairs) override;
  Event move(const RowMovement& movement) override;

 private:
  struct Lane {
    Tensor gathered, crossing;
  };

  Communicator& group_;
  std::shared_ptr<RelayQueue> queue_;
  std::array<Lane, 3> lanes_;  // by RowLane
};

void RelayTransport::declare_shared(MemoryPlan& memory, const ExchangePlace& place, const RowSizes& sizes) {
  const RelayDuties& duties = queue_->duties();
  const std::int64_t a = duties.here().size();
  std::int64_t rows = 0;
  double balanced = 0;
  for (const int host : duties.duties()) {
    const std::int64_t b = duties.ranks_of(host).size();
    rows += sizes.n * std::max(a * std::min(place.most_ranks(), b), b * std::min(place.most_ranks(), a));
    balanced +=
        static_cast<double>(sizes.n * place.top_k * place.shards * a * b) / static_cast<double>(place.ranks);
  }
  const auto expected = std::min(rows, static_cast<std::int64_t>(std::ceil(sizes.expected_load * balanced)));
  const auto add = [&](RowLane lane, const std::string& name, std::int64_t width, DType type) {
    Lane& buffers = lanes_[static_cast<std::size_t>(lane)];
    memory.add_rows(&buffers.gathered, "relayed " + name, {rows, width}, expected, type, "exchange");
    memory.add_rows(&buffers.crossing, "crossing " + name, {rows, width}, expected, type, "exchange");
  };
  add(RowLane::Rows, "rows", sizes.d, sizes.compute);
  add(RowLane::Scalars, "scalars", place.top_k, sizes.statistics);
  add(RowLane::Choices, "choices", place.top_k, DType::I32);
}

Event RelayTransport::exchange_counts(const Tensor& to, const Tensor& from, PairCounts* pairs) {
  const std::int64_t ranks = group_.size(), width = to.shape[1];
  pairs->resize(ranks * ranks * width);
  group_.all_gather(to, Tensor(pairs->data(), DType::I64, {ranks, ranks, width}), "route counts").wait();
  for (std::int64_t source = 0; source < ranks; ++source) {
    std::copy_n(pairs->begin() + (source * ranks + group_.rank()) * width, width,
                from.ptr<std::int64_t>() + source * width);
  }
  return {};
}

Event RelayTransport::move(const RowMovement& m) {
  const Lane& lane = lanes_[static_cast<std::size_t>(m.lane)];
  const std::int64_t ranks = group_.size();
  // A chunk's rows lie behind those of the chunks before it, with room for both directions.
  std::int64_t begin = 0;
  for (int chunk = 1; chunk < m.chunk; ++chunk) {
    begin += queue_->room_for(PairRows(*m.pairs, ranks, chunk, m.back));
  }
  const PairRows rows(*m.pairs, ranks, m.chunk, m.back);
  const std::int64_t end = begin + queue_->room_for(rows);
  require(end <= lane.gathered.rows(), m.labels->crossing, ": ", end,
          " rows are to be relayed, and there is room for ", lane.gathered.rows());
  return queue_->start({.rows = m,
                        .pairs = rows,
                        .gathered = lane.gathered.rows(begin, end),
                        .crossing = lane.crossing.rows(begin, end)});
}

}  // namespace

std::unique_ptr<RowTransport> make_relay_transport(Communicator& group, const HostRelays& relays) {
  return std::make_unique<RelayTransport>(group, relays);
}

}  // namespace hybridmoe
