// How many rows and slots can come to a rank, and how many are expected: the router decides, but memory is
// planned before it does.
#pragma once

#include <cstdint>
#include <string>

#include "core/communicator.h"
#include "core/operators/experts.h"
#include "core/row_exchange.h"
#include "parallel/row_exchange.h"

namespace hybridmoe {

class ExchangeRoom {
 public:
  // All outlive it.
  ExchangeRoom(const ExchangePlace& place, const ExchangeOptions& options, const CapacityLimiter& limiter,
               Communicator& world)
      : place_(place), options_(options), limiter_(limiter), world_(world) {}

  // For n tokens on every rank, as RowExchange has them.
  std::int64_t max_slots(std::int64_t n) const;
  std::int64_t max_rows(std::int64_t n) const;
  std::int64_t expected_slots(std::int64_t n) const;
  std::int64_t expected_rows(std::int64_t n) const;
  // Throws Error naming the route, this rank and what to do when more of `what` come than fit.
  void check(const std::string& route, const char* what, std::int64_t come, std::int64_t most) const;

 private:
  std::int64_t balanced(std::int64_t n) const { return n * place_.top_k * place_.shards; }
  std::int64_t limited(std::int64_t n, std::int64_t possible) const;

  const ExchangePlace& place_;
  const ExchangeOptions& options_;
  const CapacityLimiter& limiter_;
  Communicator& world_;
};

}  // namespace hybridmoe
