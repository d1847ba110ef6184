// The checks of a step: copies of what several ranks hold, weights against their masters, and the gradient
// table.
#include <gtest/gtest.h>

#include "launcher/self_check.h"
#include "tests/launcher/measures_harness.h"

namespace hybridmoe {
namespace {

using testing::measured_run;
using testing::Measures;
using testing::MeasuresInEveryType;
using testing::TrainerHarness;

// One flipped bit in one rank's memory is found where it is, in that step.
TEST_P(MeasuresInEveryType, AFlippedBitOfOneCopyIsNamed) {
  // What was rounded can be told from its master, where that is not half of it.
  const auto run = [&](bool of_owner, bool rounded, const char* optimizer) {
    on_ranks(4, measured_run(GetParam(), "check_every: 2", "batch { sequences: 4 }", optimizer),
             [&](TrainerHarness& harness, const Groups& groups) {
               constexpr int kFlipped = 2;
               const std::string name = "embedding.weight";
               ParameterStore& parameters = harness->parameters();
               const Tensor weight = parameters.weight(parameters.find(name));
               EXPECT_EQ(harness->step(false).measures.replica_mismatches, -1) << "not due";
               harness->wait_weights();
               int flips = 0;
               for (const auto& bucket : parameters.buckets()) {
                 for (const auto& range : bucket.owned) {
                   if (groups.world->rank() != kFlipped || range.parameter != parameters.find(name)) continue;
                   ASSERT_LT(range.length, weight.elements()) << "another rank owns a part of it";
                   const std::int64_t other = range.local_begin == 0 ? weight.elements() - 1 : 0;
                   const std::int64_t element = of_owner ? range.local_begin : other;
                   static_cast<char*>(weight.data)[element * size_of(weight.dtype)] ^= 1;
                   ++flips;
                 }
               }
               EXPECT_EQ(flips, groups.world->rank() == kFlipped ? 1 : 0);
               const StepMeasures m = harness->step(false).measures;
               std::vector<ReplicaMismatch> expected = {
                   {2, -1, name + ": the copy of rank 2 differs from that of ranks 0 1 3"}};
               if (rounded && of_owner) {
                 expected.push_back(
                     {2, -1, name + ": on rank 2, its owner, the weights are not the rounded master copy"});
               }
               EXPECT_TRUE(m.mismatches == expected) << (m.mismatches.empty() ? "" : m.mismatches[0].message);
               EXPECT_EQ(m.replica_mismatches, std::ssize(expected));
             });
  };
  for (const bool of_owner : {false, true}) {
    run(of_owner, std::string(GetParam()) == "BF16", "");
    run(of_owner, false, "master_weights: REMAINDERS");
  }
}

// Of two copies nobody can tell which is wrong, unless one is at odds with its own master.
TEST_F(Measures, AFlippedBitOfOneOfTwoCopies) {
  for (const bool of_owner : {false, true}) {
    on_ranks(2, measured_run("BF16", "check_every: 1", "batch { sequences: 4 }"),
             [&](TrainerHarness& harness, const Groups& groups) {
               EXPECT_EQ(harness->step(false).measures.replica_mismatches, 0);
               harness->wait_weights();
               ParameterStore& parameters = harness->parameters();
               const std::string name = "embedding.weight";
               const Tensor weight = parameters.weight(parameters.find(name));
               for (const auto& bucket : parameters.buckets()) {
                 for (const auto& range : bucket.owned) {
                   if (groups.world->rank() != 0 || range.parameter != parameters.find(name)) continue;
                   ASSERT_LT(range.length, weight.elements()) << "the other rank owns a part of it";
                   const std::int64_t other = range.local_begin == 0 ? weight.elements() - 1 : 0;
                   const std::int64_t element = of_owner ? range.local_begin : other;
                   static_cast<char*>(weight.data)[element * size_of(weight.dtype)] ^= 1;
                 }
               }
               const StepMeasures m = harness->step(false).measures;
               std::vector<ReplicaMismatch> expected = {
                   {-1, -1, name + ": the copies of rank 0 and rank 1 differ, which is right is unknown"}};
               if (of_owner) {
                 expected = {
                     {0, -1, name + ": on rank 0, its owner, the weights are not the rounded master copy"},
                     {0, -1,
                      name + ": the copy of rank 0 differs from that of rank 1 and from its rounded master "
                             "copy"}};
               }
               EXPECT_TRUE(m.mismatches == expected) << (m.mismatches.empty() ? "" : m.mismatches[0].message);
               EXPECT_EQ(m.replica_mismatches, std::ssize(expected));
             });
  }
}

TEST_F(Measures, AFlippedRouterBiasIsNamed) {
  for (const int world : {2, 3}) {
    on_ranks(world, measured_run("F32", "check_every: 1", cat("batch { sequences: ", 2 * world, " }")),
             [&](TrainerHarness& harness, const Groups& groups) {
               EXPECT_EQ(harness->step(false).measures.replica_mismatches, 0);
               if (groups.world->rank() == 1) harness->router_biases()[1].ptr<float>()[3] += 1;
               const StepMeasures m = harness->step(false).measures;
               ASSERT_EQ(m.mismatches.size(), 1);
               EXPECT_EQ(m.mismatches[0].layer, 2);
               EXPECT_EQ(m.mismatches[0].rank, world == 2 ? -1 : 1);
               EXPECT_EQ(m.mismatches[0].message,
                         world == 2
                             ? "layers.2.router_bias: the copies of rank 0 and rank 1 differ, which is "
                               "right is unknown"
                             : "layers.2.router_bias: the copy of rank 1 differs from that of ranks 0 2");
             });
  }
}

TEST_F(Measures, AWrongGradientTableIsNamed) {
  on_ranks(2, measured_run("F32", "check_every: 0", "batch { sequences: 4 }"),
           [&](TrainerHarness& harness, const Groups& groups) {
             std::vector<double> table;
             for (const double squares : harness->step(false).grad_squares) {
               table.insert(table.end(), {squares, 0.0});
             }
             const Tensor view(table.data(), DType::F64, {std::ssize(table) / kGradColumns, kGradColumns});
             EXPECT_EQ(check_gradient_table(harness->parameters(), view, groups, harness->host()), "");
             table[kGradColumns * 1 + kGradSquares] *= 1 + 1e-6;
             const std::string error =
                 check_gradient_table(harness->parameters(), view, groups, harness->host());
             const GradientRow row = harness->parameters().table()[1];
             EXPECT_EQ(error.find(cat(name_of(row.kind), " of layer ", row.layer, ": ")), 0) << error;
           });
}

}  // namespace
}  // namespace hybridmoe
