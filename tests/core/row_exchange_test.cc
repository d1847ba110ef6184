// The exchange of one rank and the capacity rule over several: against the rule read word by word.
#include "core/row_exchange.h"

#include <gtest/gtest.h>
#include <numeric>

#include "core/random.h"
#include "tests/core/fake_communicator.h"
#include "tests/core/views.h"

namespace hybridmoe {
namespace {

struct Factor {  // a rational number, so that the capacity can be had without rounding
  std::int64_t numerator, denominator;
};

struct MicroBatchRoutes {
  static constexpr int kExperts = 4, kChoices = 2;
  std::int64_t tokens;  // of all ranks
  std::vector<std::int32_t> topk;
  Vector weights;

  // Popular low experts; weights from few values, so that there are ties.
  MicroBatchRoutes(std::int64_t n, std::uint64_t seed)
      : tokens(n), topk(n * kChoices), weights(n * kChoices) {
    const Random random(seed, "routes");
    for (std::int64_t t = 0; t < n; ++t) {
      const auto a = static_cast<std::int32_t>(random.below(4 * t, 8) % 5 % 4);
      const auto step = static_cast<std::int32_t>(1 + random.below(4 * t + 1, 3));
      topk[2 * t] = a;
      topk[2 * t + 1] = (a + step) % kExperts;
      weights[2 * t] = 0.25 * static_cast<double>(2 + random.below(4 * t + 2, 3));
      weights[2 * t + 1] = 0.25 * static_cast<double>(1 + random.below(4 * t + 3, 2));
    }
  }

  // Whether slot i stays: fewer than C slots of its expert come before it.
  bool stays(std::int64_t i, const Factor& factor, bool by_position) const {
    const std::int64_t slots = tokens * kChoices, below = factor.denominator * kExperts;
    const std::int64_t room = (factor.numerator * slots + below - 1) / below;
    std::int64_t before = 0;
    for (std::int64_t j = 0; j < slots; ++j) {
      if (j == i || topk[j] != topk[i]) continue;
      const bool wins = weights[j] > weights[i] || (weights[j] == weights[i] && j < i);
      before += by_position ? j < i : wins;
    }
    return before < room;
  }
};

// One rank's exchange over its part of the routes.
struct RankExchange {
  static constexpr int k = MicroBatchRoutes::kChoices, E = MicroBatchRoutes::kExperts;
  std::unique_ptr<Backend> backend = make_reference_backend();
  FakeCommunicator world;
  std::unique_ptr<RowExchange> exchange;
  MemoryPlan memory;
  Route route;
  std::int64_t n;

  RankExchange(MicroBatchRoutes& all, int rank, int ranks, const CapacityRule& rule)
      : world(rank, ranks), n(all.tokens / ranks) {
    const std::int64_t slots = all.tokens * k;
    world.gathered["capacity choices"] = Tensor(all.topk.data(), DType::I32, {slots});
    world.gathered["capacity weights"] = view(all.weights, {slots});
    exchange = make_local_row_exchange(*backend, world, E, k, rule);
    exchange->declare(memory, &route, n, "route");
    memory.commit(*backend);
    const Tensor topk(all.topk.data() + rank * n * k, DType::I32, {n, k});
    const Tensor weights(all.weights.data() + rank * n * k, DType::F64, {n, k});
    exchange->plan(topk, weights, &route, nullptr);
  }
  std::int32_t slot_of(std::int64_t i) const { return route.chunks[0].token_slots.ptr<std::int32_t>()[i]; }
};

void check_capacity(const Factor& factor, bool by_position) {
  const CapacityRule rule{
      .factor = static_cast<double>(factor.numerator) / static_cast<double>(factor.denominator),
      .by_position = by_position};
  for (const int ranks : {1, 2, 3}) {
    for (std::uint64_t seed = 0; seed < 5; ++seed) {
      MicroBatchRoutes all(18, seed);
      std::int64_t dropped = 0, expected = 0;
      for (int rank = 0; rank < ranks; ++rank) {
        const RankExchange mine(all, rank, ranks, rule);
        const std::int64_t first = rank * mine.n * RankExchange::k;
        std::int64_t kept = 0;
        for (std::int64_t i = 0; i < mine.n * RankExchange::k; ++i) {
          const bool stays = all.stays(first + i, factor, by_position);
          EXPECT_EQ(mine.slot_of(i) >= 0, stays)
              << ranks << " ranks, seed " << seed << ", slot " << first + i;
          kept += stays;
        }
        EXPECT_EQ(mine.route.slots, kept);
        EXPECT_EQ(mine.route.dropped, mine.n * RankExchange::k - kept);
        dropped += mine.route.dropped;
        expected += mine.n * RankExchange::k - kept;
      }
      EXPECT_EQ(dropped, expected);
    }
  }
}

TEST(Capacity, ByProbabilityKeepsTheLargestWeights) {
  for (const Factor factor : {Factor{1, 2}, {3, 4}, {1, 1}, {5, 4}}) check_capacity(factor, false);
}

TEST(Capacity, ByPositionKeepsTheFirstTokens) {
  for (const Factor factor : {Factor{1, 2}, {3, 4}, {1, 1}, {5, 4}}) check_capacity(factor, true);
}

TEST(Capacity, TheCasesDropSomethingAndNotAll) {
  MicroBatchRoutes all(18, 0);
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < 36; ++i) kept += all.stays(i, {1, 1}, false);
  EXPECT_GT(kept, 18);
  EXPECT_LT(kept, 36);
}

TEST(LocalRowExchange, RowsGoToTheirExpertsAndComeBackWeighted) {
  for (const double factor : {0.0, 0.75}) {
    MicroBatchRoutes all(6, 3);
    RankExchange rank(all, 0, 1, {.factor = factor});
    const Route& route = rank.route;
    const std::int64_t n = 6, k = 2, d = 3, S = route.slots;
    EXPECT_EQ(S + route.dropped, n * k);
    EXPECT_EQ(route.dropped > 0, factor > 0);
    const auto* offsets = route.chunks[0].offsets.ptr<std::int64_t>();
    EXPECT_EQ(offsets[RankExchange::E], S);
    Vector x(n * d), slot_rows(S * d), slot_weights(S), residual(n * d, 10.0), y(n * d), returned(n * k);
    std::iota(x.begin(), x.end(), 1.0);
    rank.exchange->start_dispatch(route, 0, view(x, {n, d}), {}, nullptr);
    rank.exchange->finish_dispatch(route, 0);
    rank.exchange->gather(route, 0, view(x, {n, d}), {}, view(slot_rows, {S, d}), nullptr);
    rank.exchange->gather_weights(route, 0, view(slot_weights, {S}), nullptr);
    Vector want = residual, plain(n * d, 0.0), back(n * k, 0.0);
    for (std::int64_t i = 0; i < n * k; ++i) {
      const std::int64_t slot = rank.slot_of(i), t = i / k;
      if (slot < 0) continue;
      EXPECT_GE(slot, offsets[all.topk[i]]);
      EXPECT_LT(slot, offsets[all.topk[i] + 1]);
      EXPECT_EQ(slot_weights[slot], all.weights[i]);
      back[i] = all.weights[i];
      for (std::int64_t c = 0; c < d; ++c) {
        EXPECT_EQ(slot_rows[slot * d + c], x[t * d + c]);
        want[t * d + c] += all.weights[i] * x[t * d + c];
        plain[t * d + c] += x[t * d + c];
      }
    }
    rank.exchange->start_combine(route, 0, view(slot_rows, {S, d}), true, nullptr);
    rank.exchange->finish_combine(route, view(residual, {n, d}), view(y, {n, d}), nullptr);
    EXPECT_EQ(y, want);
    rank.exchange->start_combine(route, 0, view(slot_rows, {S, d}), false, nullptr);
    rank.exchange->finish_combine(route, {}, view(y, {n, d}), nullptr);
    EXPECT_EQ(y, plain);
    rank.exchange->start_scalars(route, 0, view(slot_weights, {S}), nullptr);
    rank.exchange->finish_scalars(route, view(returned, {n, k}), nullptr);
    EXPECT_EQ(returned, back);
  }
}

}  // namespace
}  // namespace hybridmoe
