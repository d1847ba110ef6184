// Generation computes what training computes: the cached path, whatever the chunks, gives the training
// forward's distribution of every next token; and tokens are drawn with the probabilities that the rule
// gives.
#include "moe/generator.h"

#include <cmath>
#include <gtest/gtest.h>
#include <numeric>

#include "tests/moe/model_harness.h"

namespace hybridmoe::testing {
namespace {

constexpr int kPositions = 12;

std::string small_model(const std::string& more) {
  return cat("layers: 2 d_model: 16 heads: 4 sequence_length: ", kPositions, " vocabulary: 23 ", more);
}

const std::string kGeneratedMoe = "moe { experts: 4 top_k: 2 expert_hidden: 8 } ";

// Weights far from their initial values, gains included, so that nothing that is left out goes unseen.
void scatter_weights(ParameterStore& parameters) {
  for (ParameterStore::Id id = 0; id < parameters.size(); ++id) {
    const Tensor weight = parameters.weight(id);
    const Random random(7, parameters.spec(id).name);
    const double centre = parameters.spec(id).init_std == 0 ? 1 : 0;
    for (std::int64_t i = 0; i < weight.elements(); ++i)
      weight.ptr<double>()[i] = centre + 0.3 * random.normal(static_cast<std::uint64_t>(i));
  }
}

struct CachedModel {
  CachedModel(const Config& config, std::int64_t chunk)
      : backend(make_reference_backend()), world(make_local_communicator()) {
    const ModelConfig& model = config.model();
    if (model.has_moe()) {
      exchange = make_local_row_exchange(*backend, *world, model.moe().experts(), model.moe().top_k(),
                                         {.factor = 0});
    }
    transformer = std::make_unique<Transformer>(model, config.optimizer(), *backend, one_rank_groups(*world),
                                                exchange.get(), parameters);
    size = {.length = chunk, .training = false, .cache_positions = kPositions};
    parameters.plan(memory, DType::F64, DType::F64, 1 << 16, OptimizerState::None);
    transformer->plan(memory, size);
    memory.commit(*backend);
    transformer->prepare();
    scatter_weights(parameters);
  }
  // -log p(target) behind what was evaluated last.
  static double loss(const Tensor& logits, std::int32_t target) {
    const std::vector<double> values = values_of(logits);
    double sum = 0;
    for (const double value : values) sum += std::exp(value);
    return std::log(sum) - values[target];
  }

  std::unique_ptr<Backend> backend;
  std::unique_ptr<Communicator> world;
  std::unique_ptr<RowExchange> exchange;
  MemoryPlan memory;
  ParameterStore parameters;
  std::unique_ptr<Transformer> transformer;
  Transformer::Size size;
};

class CachedPathTest : public ::testing::TestWithParam<std::pair<const char*, std::string>> {};

TEST_P(CachedPathTest, GivesTheTrainingForwardsDistributions) {
  ModelHarness training(small_model(GetParam().second), F64, 1);
  scatter_weights(training.parameters);
  std::vector<double> expected(kPositions);
  training.transformer->evaluate(training.batch, &training.statistics,
                                 Tensor(expected.data(), DType::F64, {kPositions}));
  const std::int32_t* tokens = training.batch.tokens.ptr<std::int32_t>();
  const std::int32_t* targets = training.batch.targets.ptr<std::int32_t>();
  // The lengths of the calls; what is longer than a chunk is cut by the generator.
  const std::vector<std::vector<int>> schedules = {
      {12}, {5, 1, 1, 1, 1, 1, 1, 1}, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, {7, 4, 1}};
  for (const std::int64_t chunk : {12, 3, 5}) {
    CachedModel cached(training.config, chunk);
    for (const std::vector<int>& schedule : schedules) {
      Generator generator(*cached.transformer, cached.size, {}, 1);  // again from position 0
      int position = 0;
      for (const int length : schedule) {
        generator.append({tokens + position, static_cast<std::size_t>(length)});
        position += length;
        EXPECT_NEAR(CachedModel::loss(generator.logits(), targets[position - 1]), expected[position - 1],
                    1e-12)
            << "chunk " << chunk << ", position " << position - 1;
      }
      ASSERT_EQ(position, kPositions);
      EXPECT_TRUE(generator.full());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Models, CachedPathTest,
    ::testing::Values(std::pair{"hybrid_moe", "placement: HYBRID " + kGeneratedMoe},
                      std::pair{"hybrid_star_shared",
                                std::string("placement: HYBRID_STAR moe { experts: 4 top_k: 2 expert_hidden: "
                                            "8 shared_experts: 1 } tied_head: true")},
                      std::pair{"pre_grouped_query", "placement: PRE kv_heads: 2 " + kGeneratedMoe},
                      std::pair{"full_width_norms",
                                "placement: HYBRID kv_heads: 2 head_norm_scope: FULL_WIDTH head_norms { q: "
                                "true k: true v: true c: true } " +
                                    kGeneratedMoe},
                      std::pair{"post", "placement: POST " + kGeneratedMoe},
                      std::pair{
                          "mix_ln_sigmoid",
                          std::string("placement: MIX_LN moe { experts: 4 top_k: 2 expert_hidden: 8 router "
                                      "{ scores: SIGMOID renormalize: true } }")},
                      std::pair{"dense", std::string("placement: HYBRID dense_hidden: 24 head_dim: 6")}),
    [](const auto& instance) { return instance.param.first; });

TEST(GeneratorTest, GreedyIsArgmaxAndLowestOfEquals) {
  std::vector<double> logits = {0.5, 2, -1, 2};
  const Tensor tensor(logits.data(), DType::F64, {4});
  EXPECT_EQ(token_probabilities(tensor, {.temperature = 0}), (std::vector<double>{0, 1, 0, 0}));
  EXPECT_EQ(draw_token(token_probabilities(tensor, {.temperature = 0, .top_p = 0.1}), 0.999), 1);
  std::vector<float> single = {0.5f, 2, -1, 3};
  EXPECT_EQ(draw_token(token_probabilities(Tensor(single.data(), DType::F32, {4}), {.temperature = 0}), 0.5),
            3);
}

TEST(GeneratorTest, TemperatureAndNucleusGiveTheDefinedProbabilities) {
  std::vector<double> logits = {std::log(0.1), std::log(0.4), std::log(0.2), std::log(0.3)};
  const Tensor tensor(logits.data(), DType::F64, {4});
  const auto expect = [&](const SamplingRule& rule, const std::vector<double>& expected) {
    const std::vector<double> p = token_probabilities(tensor, rule);
    for (int i = 0; i < 4; ++i) EXPECT_NEAR(p[i], expected[i], 1e-15) << i;
  };
  expect({}, {0.1, 0.4, 0.2, 0.3});
  // Squared and normalised.
  expect({.temperature = 0.5}, {0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3});
  expect({.top_p = 0.3}, {0, 1, 0, 0});  // the first token that reaches top_p is the last one kept
  expect({.top_p = 0.65}, {0, 0.4 / 0.7, 0, 0.3 / 0.7});
  expect({.top_p = 0.85}, {0, 0.4 / 0.9, 0.2 / 0.9, 0.3 / 0.9});
  expect({.top_p = 0.95}, {0.1, 0.4, 0.2, 0.3});
  // The nucleus is that of the tempered probabilities.
  expect({.temperature = 0.5, .top_p = 0.5}, {0, 1, 0, 0});
}

TEST(GeneratorTest, DrawsMatchProbabilities) {
  std::vector<double> logits = {0, 1, -2, 0.5, -0.5};
  const std::vector<double> p =
      token_probabilities(Tensor(logits.data(), DType::F64, {5}), {.temperature = 0.8, .top_p = 0.9});
  EXPECT_NEAR(std::accumulate(p.begin(), p.end(), 0.0), 1, 1e-15);
  EXPECT_EQ(p[2], 0);
  constexpr int kDraws = 100000;
  const Random random(3, "draws");
  std::vector<int> counts(5);
  for (int i = 0; i < kDraws; ++i) ++counts[draw_token(p, random.uniform(i))];
  EXPECT_EQ(counts[2], 0);
  for (int i = 0; i < 5; ++i) {  // five standard deviations of a binomial count
    EXPECT_NEAR(counts[i], kDraws * p[i], 5 * std::sqrt(kDraws * p[i] * (1 - p[i])) + 1e-9) << i;
  }
  EXPECT_EQ(draw_token(std::vector<double>{0.5, 0.4999999, 0}, 1 - 1e-12), 1);  // a sum rounded down
}

TEST(GeneratorTest, SeedDecidesTheText) {
  ModelHarness harness(small_model("placement: HYBRID " + kGeneratedMoe), F64, 1);
  CachedModel cached(harness.config, 4);
  const auto text = [&](std::uint64_t seed, double temperature) {
    Generator generator(*cached.transformer, cached.size, {.temperature = temperature}, seed);
    generator.append(std::vector<std::int32_t>{3, 1});
    std::vector<std::int32_t> tokens;
    while (!generator.full()) tokens.push_back(generator.next());
    return tokens;
  };
  EXPECT_EQ(text(1, 1).size(), kPositions - 2);
  EXPECT_EQ(text(1, 1), text(1, 1));
  EXPECT_NE(text(1, 1), text(2, 1));
  EXPECT_EQ(text(1, 0), text(2, 0));
}

TEST(GeneratorTest, MistakesAreErrors) {
  for (const SamplingRule& rule : {SamplingRule{.temperature = -0.1}, SamplingRule{.temperature = INFINITY},
                                   SamplingRule{.temperature = NAN}, SamplingRule{.top_p = 0},
                                   SamplingRule{.top_p = 1.01}, SamplingRule{.top_p = NAN}}) {
    EXPECT_THROW(check_sampling_rule(rule), Error);
  }
  std::vector<double> logits = {0, NAN};
  EXPECT_THROW(token_probabilities(Tensor(logits.data(), DType::F64, {2}), {}), Error);
  ModelHarness harness(small_model("dense_hidden: 8"), F64, 1);
  CachedModel cached(harness.config, 4);
  Generator generator(*cached.transformer, cached.size, {}, 1);
  EXPECT_THROW(generator.next(), Error);  // no context
  EXPECT_THROW(generator.append(std::vector<std::int32_t>(kPositions + 1, 0)), Error);
  generator.append(std::vector<std::int32_t>(kPositions, 0));
  EXPECT_THROW(generator.next(), Error);  // full
}

}  // namespace
}  // namespace hybridmoe::testing
