// A dispatch worked out by hand: what the reference computes, which the other backends are measured against.
#include <gtest/gtest.h>

#include "core/backend.h"
#include "tests/core/views.h"

namespace hybridmoe {
namespace {

using Integers = std::vector<std::int32_t>;
using Longs = std::vector<std::int64_t>;

Tensor integers(Integers& values, const Shape& shape) { return {values.data(), DType::I32, shape}; }
Tensor longs(Longs& values, const Shape& shape) { return {values.data(), DType::I64, shape}; }

TEST(Dispatch, OfFourTokensByTheSecondOfFourRanks) {
  const auto backend = make_reference_backend();
  const ExchangePlace place{.ranks = 4, .rank = 1, .local_experts = 2, .top_k = 2, .chunks = 2};
  ASSERT_EQ(place.most_ranks(), 2);
  ASSERT_EQ(place.keys(), 12);
  // Rank 1 has experts 2 and 3; the first two tokens are chunk 1.
  Integers topk = {7, 2, 0, 1, 6, -1, 3, 4}, keys(8), own(8), source(8), token_rows(8);
  const Tensor choices = integers(topk, {4, 2});
  backend->dispatch_keys(
      {.place = place, .topk = choices, .keys = integers(keys, {4, 2}), .own = integers(own, {4, 2})},
      nullptr);
  EXPECT_EQ(keys, (Integers{1, 7, 4, -1, 11, -1, 1, 10}));
  EXPECT_EQ(own, (Integers{-1, 0, -1, -1, -1, -1, 1, -1}));

  Longs offsets(13), counts(24);
  backend->sort_slots(
      {integers(keys, {4, 2}), longs(offsets, {13}), integers(source, {8}), integers(token_rows, {4, 2})},
      nullptr);
  source.resize(6);
  EXPECT_EQ(source, (Integers{0, 6, 2, 1, 7, 4})) << "two that stay, then by chunk, rank, token";
  backend->count_dispatch({.place = place,
                           .topk = choices,
                           .offsets = longs(offsets, {13}),
                           .slot_source = integers(source, {6}),
                           .counts = longs(counts, {4, 6})},
                          nullptr);
  EXPECT_EQ(counts, (Longs{0, 0, 1, 2, 0, 0,     // to rank 0: rows and slots of chunks 0, 1, 2
                           2, 2, 0, 0, 0, 0,     // itself
                           0, 0, 0, 0, 1, 1,     //
                           0, 0, 1, 1, 1, 1}));  // to rank 3

  Vector weights = {1, 2, 3, 4, 5, 6, 7, 8}, sent_weights(8);
  Integers sent(8);
  backend->pack_choices({.place = place,
                         .topk = choices,
                         .weights = view(weights, {4, 2}),
                         .keys = integers(keys, {4, 2}),
                         .offsets = longs(offsets, {13}),
                         .token_slots = integers(token_rows, {4, 2}),
                         .sent_topk = integers(sent, {4, 2}),
                         .sent_weights = view(sent_weights, {4, 2}),
                         .token_rows = integers(token_rows, {4, 2})},
                        nullptr);
  EXPECT_EQ(sent, (Integers{0, 1, 1, -1, 0, -1, 0, -1}));
  EXPECT_EQ(sent_weights, (Vector{3, 4, 1, 0, 8, 0, 5, 0}));
  EXPECT_EQ(token_rows, (Integers{0, 5, 4, -1, 7, -1, 3, 6}));

  Vector scalars(16), returned(8);  // row r has 10 r and 10 r + 1
  for (int i = 0; i < 16; ++i) scalars[i] = 10 * (i / 2) + i % 2;
  backend->combine_scalars({.place = place,
                            .topk = choices,
                            .token_rows = integers(token_rows, {4, 2}),
                            .scalars = view(scalars, {8, 2}),
                            .target = view(returned, {4, 2})},
                           nullptr);
  EXPECT_EQ(returned, (Vector{50, 1, 40, 41, 70, 0, 30, 60}));
}

// Both ranks hold shards of every expert: each choice goes to both, and their scalars add up.
TEST(Dispatch, ToShardsOfTheSameExperts) {
  const auto backend = make_reference_backend();
  const ExchangePlace place{.ranks = 2, .rank = 1, .shards = 2, .local_experts = 4, .top_k = 2, .chunks = 1};
  Integers topk = {3, 0, -1, 2}, keys(4), own(4);
  backend->dispatch_keys({.place = place,
                          .topk = integers(topk, {2, 2}),
                          .keys = integers(keys, {2, 2}),
                          .own = integers(own, {2, 2})},
                         nullptr);
  EXPECT_EQ(keys, (Integers{2, 1, 2, 1}));
  EXPECT_EQ(own, topk);
  Integers token_rows = {2, 0, 3, 1};                         // rank 0 first
  Vector scalars = {1, 2, 3, 4, 10, 20, 30, 0}, returned(4);  // the own rank's by choice, rank 0's in order
  backend->combine_scalars({.place = place,
                            .topk = integers(topk, {2, 2}),
                            .token_rows = integers(token_rows, {2, 2}),
                            .scalars = view(scalars, {4, 2}),
                            .target = view(returned, {2, 2})},
                           nullptr);
  EXPECT_EQ(returned, (Vector{11, 22, 0, 34}));
}

}  // namespace
}  // namespace hybridmoe
