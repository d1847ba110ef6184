// A step of M micro-batches: total = Σ CE / N_valid + (1/M) Σ (balance + z), put together from micro-batches
// that were computed alone.
#include <gtest/gtest.h>
#include <map>

#include "tests/moe/model_harness.h"

namespace hybridmoe {
namespace {

using testing::ModelHarness;
using testing::values_of;

const std::string kMicroBatchModel =
    "layers: 2 d_model: 8 heads: 2 sequence_length: 5 vocabulary: 11 moe { experts: 4 top_k: 2 "
    "expert_hidden: 3 ";

struct Result {
  double cross_entropy = 0, balance = 0, z = 0;
  std::map<std::string, std::vector<double>> gradients;
};

// Micro-batches `first` .. `last` in one accumulation with the scale of a step of `parts`, N_valid = targets.
Result run(const std::string& losses, int first, int last, int parts, double targets) {
  ModelHarness model(kMicroBatchModel + losses + "}", F64, 2);
  LossScale scale;
  scale.cross_entropy = 1 / targets;
  scale.global_tokens = model.batch.tokens.elements();
  scale.micro_batches = parts;
  scale.moe_layers = 2;
  model.zero_gradients();
  for (int part = first; part <= last; ++part) {
    model.fill_batch(100 + part);
    // Different numbers of unmasked targets.
    for (int i = 0; i <= part; ++i) model.batch.targets.ptr<std::int32_t>()[i] = -1;
    model.transformer->forward_backward(model.batch, scale, &model.statistics, nullptr);
  }
  Result result{model.statistics.cross_entropy, model.statistics.balance_loss, model.statistics.z_loss, {}};
  for (ParameterStore::Id id = 0; id < model.parameters.size(); ++id) {
    result.gradients[model.parameters.spec(id).name] = values_of(model.parameters.gradient(id));
  }
  return result;
}

TEST(MicroBatches, LossesAndGradientsAddUp) {
  const std::string with = "balance_loss: 0.3 z_loss: 0.2 ", without = "balance_loss: 0 z_loss: 0 ";
  constexpr int kParts = 3;
  const double targets = 3 * 10 - (1 + 2 + 3);
  const Result step = run(with, 0, kParts - 1, kParts, targets);
  Result sum;
  for (int part = 0; part < kParts; ++part) {
    const Result both = run(with, part, part, 1, targets), alone = run(without, part, part, 1, targets);
    EXPECT_GT(both.balance, 0);
    sum.cross_entropy += both.cross_entropy;
    sum.balance += both.balance / kParts;
    sum.z += both.z / kParts;
    for (const auto& [name, gradient] : both.gradients) {
      const std::vector<double>& of_cross_entropy = alone.gradients.at(name);
      std::vector<double>& total = sum.gradients[name];
      total.resize(gradient.size());
      for (std::size_t i = 0; i < gradient.size(); ++i) {
        total[i] += of_cross_entropy[i] + (gradient[i] - of_cross_entropy[i]) / kParts;
      }
    }
  }
  EXPECT_NEAR(step.cross_entropy, sum.cross_entropy, 1e-12);
  EXPECT_NEAR(step.balance, sum.balance, 1e-14);
  EXPECT_NEAR(step.z, sum.z, 1e-14);
  for (const auto& [name, gradient] : step.gradients) {
    for (std::size_t i = 0; i < gradient.size(); ++i) {
      ASSERT_NEAR(gradient[i], sum.gradients[name][i], 1e-13) << name << " " << i;
    }
  }
}

}  // namespace
}  // namespace hybridmoe
