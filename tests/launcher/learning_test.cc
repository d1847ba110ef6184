// Training learns: whole runs that a wrong gradient, mask or update cannot pass.
#include <gtest/gtest.h>

#include "tests/launcher/trainer_harness.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

using testing::TrainerHarness;

class Memory : public ::testing::TestWithParam<Precision> {};
INSTANTIATE_TEST_SUITE_P(Types, Memory, ::testing::Values(F64, F32, BF16),
                         [](const auto& each) { return Precision_Name(each.param); });

// The corpus is one batch of random tokens, which each step sees again.
TEST_P(Memory, OneBatchIsLearntByHeart) {
  const TemporaryDirectory directory;
  testing::Documents documents(1);
  const Random tokens(1, "batch");
  for (int i = 0; i < 4 * 16 + 1; ++i) {
    documents[0].push_back(static_cast<std::int32_t>(tokens.below(i, 29)));
  }
  const std::string corpus = testing::write_documents(directory.file("corpus"), documents, 30);
  TrainerHarness harness(
      cat("model { layers: 2 d_model: 32 heads: 2 sequence_length: 16 "
          "        moe { experts: 4 top_k: 2 expert_hidden: 32 } } "
          "data { held_out: 0 } batch { sequences: 4 } "
          "optimizer { learning_rate: 1e-2 weight_decay: 0 } schedule { shape: CONSTANT } precision: ",
          Precision_Name(GetParam())),
      corpus);
  EXPECT_GT(harness->step(false).cross_entropy, 3) << "ln 29 = 3.4 for whom knows nothing";
  // The least loss: with this learning rate AdamW leaves the minimum now and then, at a step that rounding
  // decides.
  double least = HUGE_VAL;
  for (int step = 0; step < 60; ++step) least = std::min(least, harness->step(false).cross_entropy);
  EXPECT_LT(least, 0.01);
}

// Documents are random strings, each followed by itself. What comes next in the second half lies 12 tokens
// back: attention can look there, while a shorter context says nothing (ln 16 = 2.77 nats a
// token).
TEST(Copying, TheSecondHalfOfRandomStringsIsPredicted) {
  const TemporaryDirectory directory;
  constexpr int kHalf = 12, kLength = 2 * kHalf, kVocabulary = 17;
  testing::Documents documents(8000);
  for (std::size_t i = 0; i < documents.size(); ++i) {
    const Random tokens(5, cat("string ", i));
    for (int t = 0; t < kLength; ++t) {
      documents[i].push_back(static_cast<std::int32_t>(tokens.below(t % kHalf, kVocabulary - 1)));
    }
  }
  const std::string corpus = testing::write_documents(directory.file("corpus"), documents, kVocabulary);
  TrainerHarness harness(
      "model { layers: 2 d_model: 64 heads: 4 sequence_length: 24 rope_theta: 100 "
      "        moe { experts: 4 top_k: 2 expert_hidden: 64 } } "
      "data { document_mask: true held_out: 0.02 } batch { sequences: 32 } "
      "optimizer { learning_rate: 3e-3 } "
      "schedule { warmup_steps: 20 } steps: 200 precision: F32",
      corpus);
  for (int step = 0; step < 200; ++step) harness->step(false);

  // Windows are documents: 24 inputs; the target of the last one would be in the next document.
  constexpr int kSequences = 32;
  std::vector<std::int32_t> tokens(kSequences * kLength), targets(tokens.size()), starts(tokens.size());
  for (int s = 0; s < kSequences; ++s) {
    harness.data().held_out_sample(s, &tokens[s * kLength], &targets[s * kLength], &starts[s * kLength]);
    ASSERT_EQ(targets[(s + 1) * kLength - 1], -1);
    ASSERT_EQ(tokens[s * kLength], tokens[s * kLength + kHalf]);
  }
  std::vector<float> losses(tokens.size());
  const std::int64_t n = std::ssize(tokens);
  MicroBatch batch;
  batch.tokens = Tensor(tokens.data(), DType::I32, {n});
  batch.targets = Tensor(targets.data(), DType::I32, {n});
  batch.doc_start = Tensor(starts.data(), DType::I32, {n});
  batch.sequences = kSequences;
  batch.length = kLength;
  ModelStatistics ignored;
  harness->model().evaluate(batch, &ignored, Tensor(losses.data(), DType::F32, {n}));
  double first = 0, second = 0;
  for (int s = 0; s < kSequences; ++s) {
    for (int t = 0; t < kHalf - 1; ++t) first += losses[s * kLength + t];
    for (int t = kHalf - 1; t < kLength - 1; ++t) second += losses[s * kLength + t];
  }
  first /= kSequences * (kHalf - 1);
  second /= kSequences * kHalf;
  EXPECT_LT(second, 0.1);
  EXPECT_GT(first, 2.6) << "nothing can predict random strings; ln 16 = 2.77";
}

}  // namespace
}  // namespace hybridmoe
