#include "parallel/relay_queue.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <numeric>
#include <utility>
#include <vector>

namespace hybridmoe {

namespace {

using Range = RelayDuties::Range;
using Counts = std::vector<std::int64_t>;

Range only(int rank) { return {rank, rank + 1}; }

std::int64_t sum_of(const Counts& counts, const Range& ranks) {
  return std::accumulate(counts.begin() + ranks.begin, counts.begin() + ranks.end, std::int64_t{0});
}

// The rows of some neighbouring ranks in a tensor in rank order.
Tensor part(const Tensor& rows, const Counts& counts, const Range& ranks) {
  const std::int64_t begin = sum_of(counts, {0, ranks.begin});
  return rows.rows(begin, begin + sum_of(counts, ranks));
}

}  // namespace

std::int64_t PairRows::operator()(int source, int destination) const {
  if (back_) std::swap(source, destination);
  const std::int64_t width = std::ssize(*counts_) / (ranks_ * ranks_);
  return (*counts_)[(source * ranks_ + destination) * width + std::int64_t{2} * chunk_];
}

std::int64_t PairRows::sum(const Range& sources, const Range& destinations) const {
  std::int64_t total = 0;
  for (int s = sources.begin; s < sources.end; ++s) {
    for (int d = destinations.begin; d < destinations.end; ++d) total += (*this)(s, d);
  }
  return total;
}

class RelayQueue::Transfer : public Event::State {
 public:
  enum class Phase { Gather, Cross, Scatter, Done };

  Transfer(std::shared_ptr<RelayQueue> queue, const RelayMovement& movement)
      : queue_(std::move(queue)),
        relays_(queue_->relays_),
        duties_(queue_->duties_),
        rows_(movement.rows),
        pairs_(movement.pairs),
        gathered_(movement.gathered),
        crossing_(movement.crossing) {
    gather();
  }

  bool test() override {
    queue_->advance();
    return phase_ == Phase::Done;
  }
  void wait() override {
    while (!test()) queue_->unfinished_before(*this).wait();
    if (failure_ != nullptr) std::rethrow_exception(failure_);
  }

  Phase phase() const { return phase_; }
  // Of the calls of this phase.
  Event unfinished() const;
  // Goes on to phases no later than `limit`; the last one needs no call and knows no limit.
  void advance(Phase limit) {
    while (phase_ != Phase::Done && (phase_ == Phase::Scatter || phase_ < limit) && finished()) next();
  }

 private:
  bool finished() const {
    return std::all_of(calls_.begin(), calls_.end(), [](const Event& call) { return call.test(); });
  }
  void next();
  void gather();
  void order_by_destination();
  void cross();
  void scatter();
  // This rank's number, or a relay's, on this host.
  int local(int rank) const { return rank - duties_.here().begin; }
  Range ranks_of(const Range& hosts) const {
    return {duties_.ranks_of(hosts.begin).begin, duties_.ranks_of(hosts.end - 1).end};
  }
  // What each rank of this host relays of rows that are counted by rank of the group.
  Counts by_relay(const Counts& counts, const Range& round) const;

  std::shared_ptr<RelayQueue> queue_;
  const HostRelays& relays_;
  const RelayDuties& duties_;
  RowMovement rows_;
  PairRows pairs_;
  Tensor gathered_;  // by host, source, destination; then what came, by host, destination, source
  Tensor crossing_;  // by host, destination, source
  Phase phase_ = Phase::Gather;
  std::vector<Event> calls_;  // of this phase
  Event direct_;              // rows that stay on this host
  std::exception_ptr failure_;
};

Event RelayQueue::Transfer::unfinished() const {
  const auto call =
      std::find_if(calls_.begin(), calls_.end(), [](const Event& each) { return !each.test(); });
  return call == calls_.end() ? Event() : *call;
}

void RelayQueue::Transfer::next() {
  try {
    for (const Event& call : calls_) call.wait();  // they are done; this throws what went wrong
    calls_.clear();
    if (phase_ == Phase::Gather) {
      cross();
      phase_ = Phase::Cross;
    } else if (phase_ == Phase::Cross) {
      scatter();
      phase_ = Phase::Scatter;
    } else {
      phase_ = Phase::Done;
    }
  } catch (...) {
    failure_ = std::current_exception();
    calls_.clear();
    phase_ = Phase::Done;
  }
}

Counts RelayQueue::Transfer::by_relay(const Counts& counts, const Range& round) const {
  Counts result(duties_.here().size());
  for (int host = round.begin; host < round.end; ++host) {
    result[local(duties_.relay(duties_.host(), host))] += sum_of(counts, duties_.ranks_of(host));
  }
  return result;
}

void RelayQueue::Transfer::gather() {
  const Range here = duties_.here();
  const Counts& to = rows_.send_rows;
  const Counts& from = rows_.recv_rows;
  direct_ = relays_.gather->all_to_all_rows(
      part(rows_.send, to, here), Counts(to.begin() + here.begin, to.begin() + here.end),
      part(rows_.recv, from, here), Counts(from.begin() + here.begin, from.begin() + here.end),
      rows_.labels->within);
  std::int64_t begin = 0;
  for (const Range& round : duties_.rounds()) {
    Counts come(here.size());
    std::int64_t end = begin;
    if (const int host = duties_.duty_in(round); host >= 0) {
      for (int s = here.begin; s < here.end; ++s) {
        end += come[local(s)] = pairs_.sum(only(s), duties_.ranks_of(host));
      }
    }
    calls_.push_back(relays_.gather->all_to_all_rows(part(rows_.send, to, ranks_of(round)),
                                                     by_relay(to, round), gathered_.rows(begin, end), come,
                                                     rows_.labels->gathered));
    begin = end;
  }
}

// The message to a host brings the rows of a destination together, so that it scatters them as they are.
void RelayQueue::Transfer::order_by_destination() {
  const Range here = duties_.here();
  const std::int64_t row_bytes = gathered_.rows() == 0 ? 0 : gathered_.bytes() / gathered_.rows();
  const char* from = static_cast<const char*>(gathered_.data);
  std::int64_t host_begin = 0;
  for (const int host : duties_.duties()) {
    const Range there = duties_.ranks_of(host);
    for (int s = here.begin; s < here.end; ++s) {
      for (int d = there.begin; d < there.end; ++d) {
        const std::int64_t row =
            host_begin + pairs_.sum(here, {there.begin, d}) + pairs_.sum({here.begin, s}, only(d));
        const std::int64_t bytes = pairs_(s, d) * row_bytes;
        if (bytes > 0) std::memcpy(static_cast<char*>(crossing_.data) + row * row_bytes, from, bytes);
        from += bytes;
      }
    }
    host_begin += pairs_.sum(here, there);
  }
}

void RelayQueue::Transfer::cross() {
  order_by_destination();
  const Range here = duties_.here();
  Counts to(rows_.send_rows.size()), from(to.size());
  for (const int host : duties_.duties()) {
    const int relay = duties_.relay(host, duties_.host());
    to[relay] = pairs_.sum(here, duties_.ranks_of(host));
    from[relay] = pairs_.sum(duties_.ranks_of(host), here);
  }
  const std::int64_t leave = std::accumulate(to.begin(), to.end(), std::int64_t{0});
  const std::int64_t come = std::accumulate(from.begin(), from.end(), std::int64_t{0});
  calls_ = {relays_.cross->all_to_all_rows(crossing_.rows(0, leave), to, gathered_.rows(0, come), from,
                                           rows_.labels->crossing)};
}

void RelayQueue::Transfer::scatter() {
  const Range here = duties_.here();
  std::int64_t begin = 0;
  for (const Range& round : duties_.rounds()) {
    Counts leave(here.size());
    std::int64_t end = begin;
    if (const int host = duties_.duty_in(round); host >= 0) {
      for (int d = here.begin; d < here.end; ++d) {
        end += leave[local(d)] = pairs_.sum(duties_.ranks_of(host), only(d));
      }
    }
    calls_.push_back(relays_.scatter->all_to_all_rows(
        gathered_.rows(begin, end), leave, part(rows_.recv, rows_.recv_rows, ranks_of(round)),
        by_relay(rows_.recv_rows, round), rows_.labels->scattered));
    begin = end;
  }
  calls_.push_back(direct_);
}

std::int64_t RelayQueue::room_for(const PairRows& rows) const {
  std::int64_t leave = 0, come = 0;
  for (const int host : duties_.duties()) {
    leave += rows.sum(duties_.here(), duties_.ranks_of(host));
    come += rows.sum(duties_.ranks_of(host), duties_.here());
  }
  return std::max(leave, come);
}

Event RelayQueue::start(const RelayMovement& movement) {
  const auto transfer = std::make_shared<Transfer>(shared_from_this(), movement);
  transfers_.push_back(transfer);
  advance();
  return Event(transfer);
}

void RelayQueue::advance() {
  if (std::exchange(advancing_, true)) return;  // a call below waits, which it should not
  auto limit = Transfer::Phase::Done;  // nobody overtakes: calls are issued in the order of the movements
  for (const auto& transfer : transfers_) {
    transfer->advance(limit);
    limit = std::min(limit, transfer->phase());
  }
  std::erase_if(transfers_, [](const auto& each) { return each->phase() == Transfer::Phase::Done; });
  advancing_ = false;
}

// What keeps a transfer from going on: a call of its own, or of one before it.
Event RelayQueue::unfinished_before(const Transfer& transfer) const {
  for (const auto& each : transfers_) {
    if (const Event call = each->unfinished(); !call.test()) return call;
    if (each.get() == &transfer) break;
  }
  return {};
}

}  // namespace hybridmoe
