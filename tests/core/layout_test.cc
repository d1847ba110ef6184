#include "core/layout.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace hybridmoe {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

std::size_t legal_layouts(int world, const LayoutDemands& demands) {
  return nearest_layouts({.world = world}, demands, 1000).size();
}

// Every size up to 8 divides what these split.
const LayoutDemands kEverythingDivides{.heads = 8,
                                       .kv_heads = 8,
                                       .sequence_length = 64,
                                       .dense_hidden = 64,
                                       .shared_hidden = 64,
                                       .experts = 8,
                                       .expert_hidden = 64,
                                       .micro_batch_sequences = 8};

// (divisors of W) x (pairs E, ET whose product divides W): 1, 2 x 3, 3 x 6 and 4 x 10, together 65.
TEST(Layout, ThereAre65OfWorlds1248WhenTheModelAllowsAll) {
  std::size_t all = 0;
  for (const auto& [world, count] :
       {std::pair{1, 1u}, std::pair{2, 6u}, std::pair{4, 18u}, std::pair{8, 40u}}) {
    EXPECT_EQ(legal_layouts(world, {}), count) << world;
    EXPECT_EQ(legal_layouts(world, kEverythingDivides), count) << world;
    all += count;
  }
  EXPECT_EQ(all, 65u);
}

// What a smaller model leaves of the 40 layouts of 8 ranks.
TEST(Layout, TheModelLimitsTheLayouts) {
  LayoutDemands model = kEverythingDivides;
  model.heads = 4;  // T 1, 2, 4
  EXPECT_EQ(legal_layouts(8, model), 30u);
  model.kv_heads = 2;  // T 4 holds each of them twice
  EXPECT_EQ(legal_layouts(8, model), 30u);
  model.micro_batch_sequences = 2;  // T 4
  EXPECT_EQ(legal_layouts(8, model), 10u);
  model.experts = 6;  // (E, ET) without (4, 1), (4, 2), (8, 1)
  EXPECT_EQ(legal_layouts(8, model), 7u);
  model.expert_hidden = 14;  // nor (1, 4), (1, 8), (2, 4)
  EXPECT_EQ(legal_layouts(8, model), 4u);
}

TEST(Layout, IllegalOnesGiveEveryReason) {
  const LayoutDemands model{.heads = 6,
                            .kv_heads = 6,
                            .sequence_length = 30,
                            .dense_hidden = 10,
                            .shared_hidden = 14,
                            .experts = 9,
                            .expert_hidden = 7,
                            .micro_batch_sequences = 3};
  EXPECT_THAT(
      layout_violations({.world = 8, .tensor = 4, .expert = 2, .expert_tensor = 2}, model),
      ElementsAre("tensor size 4 must divide the heads 6",
                  "tensor size 4 must divide the key/value heads 6 or be a multiple of them",
                  "tensor size 4 must divide the sequence length 30",
                  "tensor size 4 must divide the dense hidden size 10",
                  "tensor size 4 must divide the shared experts' hidden size 14",
                  "expert-tensor size 2 must divide the expert hidden size 7",
                  "expert size 2 must divide the number of experts 9",
                  "the number of data-parallel ranks 2 must divide the sequences of a micro-batch 3"));
  EXPECT_THAT(layout_violations({.world = 6, .tensor = 4, .expert = 2, .expert_tensor = 2}),
              ElementsAre("tensor size 4 must divide the number of ranks 6",
                          "expert size times expert-tensor size 4 must divide the number of ranks 6"));
  EXPECT_THAT(layout_violations({.world = -1, .tensor = -1}),
              ElementsAre("the world of -1 must be at least 0", "tensor size -1 must be at least 1"));
  EXPECT_THAT(
      layout_violations({.world = 4}, model),
      ElementsAre("the number of data-parallel ranks 4 must divide the sequences of a micro-batch 3"));
  EXPECT_THAT(layout_violations({.world = 3}, model), IsEmpty());
}

TEST(Layout, AnUnknownWorldLeavesOutWhatNeedsIt) {
  const LayoutDemands model{.heads = 6, .experts = 8, .micro_batch_sequences = 5};
  EXPECT_THAT(layout_violations({.world = 0, .tensor = 2, .expert = 4, .expert_tensor = 3}, model),
              IsEmpty());
  EXPECT_THAT(layout_violations({.world = 0, .tensor = 4, .expert = 3}, model),
              ElementsAre("tensor size 4 must divide the heads 6",
                          "expert size 3 must divide the number of experts 8"));
}

TEST(Layout, NearestFirst) {
  const LayoutDemands model{.heads = 4, .kv_heads = 4, .sequence_length = 64, .experts = 8};
  // By the factor, then by the number of changes, then by the tensor size, then by the expert-tensor size.
  EXPECT_THAT(nearest_layouts({.world = 8, .tensor = 8, .expert = 2}, model, 4),
              ElementsAre(Layout{8, 4, 2, 1}, Layout{8, 2, 2, 1}, Layout{8, 4, 1, 1}, Layout{8, 4, 4, 1}));
  EXPECT_THAT(nearest_layouts({.world = 8, .tensor = 3, .expert = 8, .expert_tensor = 2}, model, 2),
              ElementsAre(Layout{8, 4, 8, 1}, Layout{8, 4, 4, 2}));
  // A legal layout is its own nearest one.
  EXPECT_THAT(nearest_layouts({.world = 4, .tensor = 2}, model, 1), ElementsAre(Layout{4, 2, 1, 1}));
  EXPECT_THAT(nearest_layouts({.world = 0, .tensor = 3}, model, 2),
              ElementsAre(Layout{0, 4, 1, 1}, Layout{0, 2, 1, 1}));
  EXPECT_THAT(nearest_layouts({.world = 7}, {.micro_batch_sequences = 3}, 3),
              ElementsAre(Layout{7, 7, 1, 1}, Layout{7, 7, 7, 1}, Layout{7, 7, 1, 7}));
  EXPECT_THAT(nearest_layouts({.world = 7}, {.heads = 2, .micro_batch_sequences = 3}, 3), IsEmpty());
}

TEST(Layout, AsAConfigurationSaysIt) {
  EXPECT_EQ(configuration_text({.world = 8, .tensor = 2, .expert = 4}), "parallel { tensor: 2 expert: 4 }");
  EXPECT_EQ(configuration_text({.world = 8, .expert_tensor = 2}), "parallel { expert_tensor: 2 }");
  EXPECT_EQ(configuration_text({.world = 8}), "parallel {}");
}

}  // namespace
}  // namespace hybridmoe
