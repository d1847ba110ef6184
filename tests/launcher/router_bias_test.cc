// Balancing biases of sigmoid routers: b += γ · sign(mean load - load) after each step, from the loads of the
// whole step.
#include <gtest/gtest.h>

#include "tests/launcher/trainer_harness.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

TEST(RouterBias, RisesWhereTheLoadIsBelowTheMean) {
  constexpr double kGamma = 0.125;  // sums of it are exact
  const TemporaryDirectory directory;
  const std::string corpus =
      testing::write_documents(directory.file("corpus"), testing::random_documents(200, 9, 37), 37);
  for (const char* precision : {"F64", "F32"}) {
    testing::TrainerHarness trainer(
        cat("model { layers: 2 d_model: 16 heads: 4 sequence_length: 12 moe { experts: 6 top_k: 2 "
            "expert_hidden: 8 router { scores: SIGMOID bias_update: ",
            kGamma, " } } } batch { sequences: 8 micro_batch_sequences: 4 } precision: ", precision),
        corpus);
    std::vector<std::vector<double>> expected(2, std::vector<double>(6, 0.0));
    EXPECT_EQ(trainer.biases(), expected);
    for (int step = 0; step < 3; ++step) {
      const StepResult result = trainer->step(false);
      for (int layer = 0; layer < 2; ++layer) {
        const std::vector<double>& load = result.model.moe[layer].counts;
        double total = 0;
        for (const double count : load) total += count;
        EXPECT_EQ(total, 8 * 12 * 2);
        for (int e = 0; e < 6; ++e) {
          if (load[e] < total / 6) expected[layer][e] += kGamma;
          if (load[e] > total / 6) expected[layer][e] -= kGamma;
        }
      }
      EXPECT_EQ(trainer.biases(), expected) << precision << " step " << step;
    }
  }
}

}  // namespace
}  // namespace hybridmoe
