// What a token's loss may depend on: earlier tokens of its own sequence and, with a document mask, of its own
// document.
#include <gtest/gtest.h>

#include "tests/moe/model_harness.h"

namespace hybridmoe {
namespace {

using testing::ModelHarness;

// Longer than a tile of the attention operators.
constexpr std::int64_t kLength = 70, kTokens = 2 * kLength;
const char kVisibilityModel[] =
    "layers: 2 d_model: 16 heads: 2 kv_heads: 1 sequence_length: 70 vocabulary: 32 initialisation: NORMAL "
    "init_std: 0.3 moe { experts: 4 top_k: 2 expert_hidden: 8 }";

class Visibility : public ::testing::TestWithParam<Precision> {
 protected:
  ModelHarness model{kVisibilityModel, GetParam(), 2};

  std::vector<double> losses() {
    std::vector<double> wide(kTokens);
    std::vector<float> narrow(kTokens);
    ModelStatistics statistics;
    if (GetParam() == F64) {
      model.transformer->evaluate(model.batch, &statistics, Tensor(wide.data(), DType::F64, {kTokens}));
    } else {
      model.transformer->evaluate(model.batch, &statistics, Tensor(narrow.data(), DType::F32, {kTokens}));
      std::copy(narrow.begin(), narrow.end(), wide.begin());
    }
    return wide;
  }
  void change_token(std::int64_t i) {
    std::int32_t& token = model.batch.tokens.ptr<std::int32_t>()[i];
    token = (token + 1) % 32;
  }
  // Documents begin at tokens 0 and `second` of each sequence.
  void mask_documents(std::int64_t second) {
    for (std::int64_t i = 0; i < kTokens; ++i) {
      model.doc_start.ptr<std::int32_t>()[i] = i % kLength >= second ? static_cast<std::int32_t>(second) : 0;
    }
    model.batch.doc_start = model.doc_start;
  }
  // Losses of some tokens do not change, up to the order of sums, when token `changed` does.
  template <class F>
  void expect_unseen(std::int64_t changed, const F& unseen) {
    const double rounding = GetParam() == F64 ? 1e-12 : 1e-5;
    const std::vector<double> before = losses();
    change_token(changed);
    const std::vector<double> after = losses();
    for (std::int64_t i = 0; i < kTokens; ++i) {
      if (!unseen(i)) continue;
      EXPECT_NEAR(after[i], before[i], rounding) << "token " << i << " sees " << changed;
    }
    EXPECT_GT(std::abs(after[changed] - before[changed]), 100 * rounding);
  }
};

TEST_P(Visibility, NoTokenSeesALaterOneOrAnotherSequence) {
  for (const std::int64_t changed : {1, 37, 64, 69}) {
    expect_unseen(changed, [&](std::int64_t i) { return i < changed || i >= kLength; });
  }
}

TEST_P(Visibility, NoTokenSeesAnotherDocument) {
  mask_documents(33);
  for (const std::int64_t changed : {0, 20, 32}) {
    expect_unseen(changed, [&](std::int64_t i) { return i < changed || i >= 33; });
  }
}

TEST_P(Visibility, EarlierTokensOfTheDocumentAreSeen) {
  mask_documents(33);
  const std::vector<double> before = losses();
  change_token(35);
  EXPECT_GT(std::abs(losses()[60] - before[60]), GetParam() == F64 ? 1e-10 : 1e-4);
}

// Training's forward pass sees what evaluation's sees, with and without documents.
TEST_P(Visibility, TrainingAndEvaluationAgree) {
  for (const bool documents : {false, true}) {
    if (documents) mask_documents(33);
    double sum = 0;
    for (const double loss : losses()) sum += loss;
    model.forward_backward();
    EXPECT_NEAR(model.statistics.cross_entropy, sum, sum * (GetParam() == F64 ? 1e-13 : 1e-6)) << documents;
  }
}

INSTANTIATE_TEST_SUITE_P(All, Visibility, ::testing::Values(F64, F32),
                         [](const auto& each) { return Precision_Name(each.param); });

}  // namespace
}  // namespace hybridmoe
