#include "parallel/exchange_room.h"

#include <algorithm>
#include <cmath>

namespace hybridmoe {
namespace {

std::int64_t loads(double factor, std::int64_t balanced) {
  return static_cast<std::int64_t>(std::ceil(factor * static_cast<double>(balanced)));
}

}  // namespace

std::int64_t ExchangeRoom::limited(std::int64_t n, std::int64_t possible) const {
  if (limiter_.limits()) {
    possible = std::min(possible, place_.local_experts * limiter_.room(n * world_.size()));
  }
  if (options_.load_limit > 0) possible = std::min(possible, loads(options_.load_limit, balanced(n)));
  return possible;
}

std::int64_t ExchangeRoom::max_slots(std::int64_t n) const {
  return limited(n, place_.ranks * n * std::min(place_.top_k, place_.local_experts));
}

std::int64_t ExchangeRoom::max_rows(std::int64_t n) const { return limited(n, (place_.ranks - 1) * n); }

std::int64_t ExchangeRoom::expected_slots(std::int64_t n) const {
  return std::min(max_slots(n), loads(options_.expected_load, balanced(n)));
}

std::int64_t ExchangeRoom::expected_rows(std::int64_t n) const {
  const double remote = static_cast<double>(place_.ranks - 1) / place_.ranks;
  return std::min(max_rows(n), loads(options_.expected_load * remote, balanced(n)));
}

void ExchangeRoom::check(const std::string& route, const char* what, std::int64_t come,
                         std::int64_t most) const {
  require(come <= most, route, ": rank ", world_.rank(), " is sent ", come, " ", what,
          ", and its memory may grow to ", most,
          "; raise parallel.load_limit (0: whatever can come), or balance the router (moe.balance_loss, "
          "moe.capacity_factor)");
}

}  // namespace hybridmoe
