// A trainer on one rank: the steps are what they claim to be, and nothing else changes state.
#include <cstring>
#include <gtest/gtest.h>
#include <malloc.h>
#include <numbers>
#include <numeric>

#include "launcher/checkpoint.h"
#include "tests/launcher/trainer_harness.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

using testing::relative_difference;
using testing::TrainerHarness;
using testing::TrainerState;

constexpr int kTrainerVocabulary = 37;
const std::string kTrainerModel =
    "layers: 2 d_model: 16 heads: 4 sequence_length: 12 moe { experts: 4 top_k: 2 expert_hidden: 8 ";
const char kRun[] = "parallel { bucket_bytes: 4096 } schedule { shape: CONSTANT } ";
const char kTwoParts[] = "batch { sequences: 4 micro_batch_sequences: 2 } ";

std::string model(const std::string& rest_of_moe) {
  return cat("model { ", kTrainerModel, rest_of_moe, " } } ");
}

class TrainerTest : public ::testing::Test {
 protected:
  TrainerTest()
      : corpus_(testing::write_documents(directory_.file("corpus"),
                                         testing::random_documents(300, 9, kTrainerVocabulary),
                                         kTrainerVocabulary)) {}
  std::unique_ptr<TrainerHarness> make(const std::string& text, Precision precision = F64,
                                       const std::string& optimizer = "") const {
    return std::make_unique<TrainerHarness>(cat(text, " ", kRun, "optimizer { learning_rate: 3e-3 ",
                                                optimizer, "} precision: ", Precision_Name(precision)),
                                            corpus_);
  }
  TemporaryDirectory directory_;
  std::string corpus_;
};

void expect_near(const TrainerState& a, const TrainerState& b, double bound) {
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [name, expected] : b) {
    const testing::ParameterState& actual = a.at(name);
    EXPECT_LE(relative_difference(actual.gradient, expected.gradient), bound) << "gradient of " << name;
    EXPECT_LE(relative_difference(actual.master, expected.master), bound) << "master of " << name;
    EXPECT_LE(relative_difference(actual.m, expected.m), bound) << "first moment of " << name;
    EXPECT_LE(relative_difference(actual.v, expected.v), bound) << "second moment of " << name;
  }
}

// Everything that a skipped step must leave alone.
void expect_same_but_gradients(const TrainerState& a, const TrainerState& b) {
  for (const auto& [name, expected] : b) {
    const testing::ParameterState& actual = a.at(name);
    EXPECT_EQ(actual.master, expected.master) << name;
    EXPECT_EQ(actual.m, expected.m) << name;
    EXPECT_EQ(actual.v, expected.v) << name;
  }
}

class TrainerInEveryType : public TrainerTest, public ::testing::WithParamInterface<Precision> {};
INSTANTIATE_TEST_SUITE_P(Types, TrainerInEveryType, ::testing::Values(F64, F32, BF16),
                         [](const auto& each) { return Precision_Name(each.param); });

TEST_P(TrainerInEveryType, ContinuesFromACheckpointToTheBit) {
  const std::string text =
      model("router { scores: SIGMOID bias_update: 0.01 }") + kTwoParts + "data { document_mask: true } ";
  const auto through = make(text, GetParam()), before = make(text, GetParam()),
             after = make(text, GetParam());
  std::vector<StepResult> steps;
  for (int step = 0; step < 6; ++step) steps.push_back((*through)->step(false));
  for (int step = 0; step < 3; ++step) (*before)->step(false);
  const SaveResult saved = save_checkpoint(directory_.file("run"), {}, before->world(), **before);
  ASSERT_TRUE(saved.saved) << saved.error;
  restore_checkpoint(saved.path, read_manifest(saved.path), after->world(), **after);
  EXPECT_EQ(after->weights(), before->weights());
  for (int step = 3; step < 6; ++step) {
    const StepResult result = (*after)->step(false);
    EXPECT_EQ(result.loss, steps[step].loss);
    EXPECT_EQ(result.grad_norm, steps[step].grad_norm);
    EXPECT_EQ(result.samples_begin, steps[step].samples_begin);
  }
  EXPECT_TRUE(after->state() == through->state());
  EXPECT_EQ(after->weights(), through->weights());
  EXPECT_EQ(after->biases(), through->biases());
  EXPECT_EQ((*after)->progress().step, 6);
  EXPECT_EQ((*after)->progress().applied_steps, 6);
  EXPECT_EQ((*after)->progress().samples_consumed, 24);
}

// One poisoned weight makes gradients NaN or infinite: the step is counted and its samples are consumed, but
// nothing else changes, and the run goes on as if the samples had been left out of the data.
TEST_P(TrainerInEveryType, AStepWithoutFiniteGradientsIsSkipped) {
  const std::string text = model("router { scores: SIGMOID bias_update: 0.01 }") + kTwoParts;
  for (const char* name : {"embedding.weight", "layers.1.router.weight", "final_norm.gain"}) {
    const auto harness = make(text, GetParam());
    const auto without = make(text + "data { skip { begin: 4 end: 8 } } ", GetParam());
    Trainer& trainer = **harness;
    ASSERT_GE(trainer.parameters().find(name), 0) << name;
    trainer.step(false);
    (*without)->step(false);
    const TrainerState state = harness->state();
    const auto weights = harness->weights(), again = without->weights();
    const auto biases = harness->biases();
    EXPECT_NE(biases[0], std::vector<double>(4)) << "the biases are meant to move";

    const Tensor weight = trainer.parameters().weight(trainer.parameters().find(name));
    std::vector<char> bytes(weight.bytes());
    std::memcpy(bytes.data(), weight.data, bytes.size());
    std::memset(weight.data, 0xff, bytes.size());  // NaN in every floating type
    const StepResult poisoned = trainer.step(false);
    std::memcpy(weight.data, bytes.data(), bytes.size());

    EXPECT_TRUE(poisoned.skipped) << name;
    EXPECT_GT(std::accumulate(poisoned.nonfinite.begin(), poisoned.nonfinite.end(), 0.0), 0);
    EXPECT_EQ(trainer.progress().step, 2);
    EXPECT_EQ(trainer.progress().applied_steps, 1);
    EXPECT_EQ(trainer.progress().samples_consumed, 8);
    expect_same_but_gradients(harness->state(), state);
    EXPECT_EQ(harness->weights(), weights);
    EXPECT_EQ(harness->biases(), biases);

    const StepResult next = trainer.step(false), control = (*without)->step(false);
    EXPECT_FALSE(next.skipped);
    EXPECT_EQ(next.loss, control.loss) << name;
    EXPECT_TRUE(harness->state() == without->state()) << name;
  }
}

TEST_P(TrainerInEveryType, EvaluationChangesNothing) {
  const std::string text = model("router { scores: SIGMOID bias_update: 0.01 }") + kTwoParts +
                           "data { held_out: 0.2 } evaluation { sequences: 7 } ";
  const auto with = make(text, GetParam()), without = make(text, GetParam());
  for (int step = 0; step < 3; ++step) {
    const Evaluation first = (*with)->evaluate(), second = (*with)->evaluate();
    EXPECT_EQ(first.loss, second.loss);
    EXPECT_EQ((*with)->step(false).loss, (*without)->step(false).loss);
  }
  EXPECT_TRUE(with->state() == without->state());
  EXPECT_EQ(with->biases(), without->biases());
}

// Σ of the tokens' own losses, and the bytes counted by hand. 7 sequences are no whole number of
// micro-batches.
TEST_F(TrainerTest, EvaluationIsTheMeanOverTheHeldOutTargets) {
  const auto harness =
      make(model("") + kTwoParts + "data { held_out: 0.2 document_mask: true } evaluation { sequences: 7 } ");
  Trainer& trainer = **harness;
  trainer.step(false);
  const Evaluation evaluation = trainer.evaluate();
  const std::int64_t n = 2 * 12;
  std::vector<std::int32_t> tokens(n), targets(n), starts(n);
  std::vector<double> losses(n);
  MicroBatch batch;
  batch.tokens = Tensor(tokens.data(), DType::I32, {n});
  batch.targets = Tensor(targets.data(), DType::I32, {n});
  batch.doc_start = Tensor(starts.data(), DType::I32, {n});
  batch.sequences = 2;
  batch.length = 12;
  double sum = 0, bytes = 0;
  std::int64_t count = 0;
  for (int sample = 0; sample < 7; ++sample) {
    for (const int place : {0, 12}) {
      harness->data().held_out_sample(sample, &tokens[place], &targets[place], &starts[place]);
    }
    ModelStatistics ignored;
    trainer.model().evaluate(batch, &ignored, Tensor(losses.data(), DType::F64, {n}));
    for (int i = 0; i < 12; ++i) {
      if (targets[i] < 0) {
        EXPECT_EQ(losses[i], 0);
        continue;
      }
      sum += losses[i];
      ++count;
      bytes += targets[i] == kTrainerVocabulary - 1 ? 0 : testing::kBytesPerToken;
    }
  }
  EXPECT_EQ(evaluation.sequences, 7);
  EXPECT_EQ(evaluation.tokens, count);
  EXPECT_LT(count, 7 * 12) << "some targets are meant to be masked";
  EXPECT_NEAR(evaluation.loss, sum / static_cast<double>(count), 1e-12);
  EXPECT_NEAR(evaluation.bits_per_byte, sum / std::numbers::ln2 / bytes, 1e-12);
  EXPECT_EQ(evaluation.step, 1);
}

// The mean runs over the targets of the whole step, of which documents mask different numbers in each part.
TEST_F(TrainerTest, AccumulationChangesNothingWithoutRouterLosses) {
  const std::string text = model("balance_loss: 0 z_loss: 0") + "data { document_mask: true } ";
  const auto whole = make(text + "batch { sequences: 4 } "), parts = make(text + kTwoParts);
  for (int step = 0; step < 3; ++step) {
    const StepResult a = (*parts)->step(false), b = (*whole)->step(false);
    EXPECT_LE(relative_difference({a.loss}, {b.loss}), 1e-11);
    EXPECT_LE(relative_difference({a.grad_norm}, {b.grad_norm}), 1e-11);
    expect_near(parts->state(), whole->state(), 1e-11);
  }
}

// Router losses are means over the micro-batches: so are loss and gradient of a step over those of its parts
// alone (which have the same number of targets).
TEST_F(TrainerTest, AccumulationAveragesTheRouterLosses) {
  const std::string text = model("balance_loss: 0.3 z_loss: 0.2");
  const auto both = make(text + kTwoParts), first = make(text + "batch { sequences: 2 } "),
             second = make(text + "batch { sequences: 2 } data { skip { begin: 0 end: 2 } } ");
  const StepResult sum = (*both)->step(false), a = (*first)->step(false), b = (*second)->step(false);
  EXPECT_GT(a.balance_loss, 0.29);  // 0.3 and more when the counts follow the probabilities
  EXPECT_NE(a.balance_loss, b.balance_loss);
  EXPECT_NEAR(sum.balance_loss, (a.balance_loss + b.balance_loss) / 2, 1e-13);
  EXPECT_NEAR(sum.z_loss, (a.z_loss + b.z_loss) / 2, 1e-13);
  EXPECT_NEAR(sum.loss, (a.loss + b.loss) / 2, 1e-12);
  const TrainerState state = both->state(), one = first->state(), two = second->state();
  for (const auto& [name, parameter] : state) {
    std::vector<double> mean = one.at(name).gradient;
    for (std::size_t i = 0; i < mean.size(); ++i) mean[i] = (mean[i] + two.at(name).gradient[i]) / 2;
    EXPECT_LE(relative_difference(parameter.gradient, mean), 1e-11) << name;
  }
}

TEST_F(TrainerTest, ClipsByTheNormOfAllGradients) {
  const auto harness = make(model("shared_experts: 1") + kTwoParts, F64, "clip_norm: 0.1 ");
  const StepResult result = (*harness)->step(false);
  const TrainerState state = harness->state();
  double squares = 0, table = 0;
  for (const auto& [name, parameter] : state) {
    for (const double g : parameter.gradient) squares += g * g;
  }
  for (const double value : result.grad_squares) table += value;
  EXPECT_LE(relative_difference({result.grad_norm}, {std::sqrt(squares)}), 1e-13);
  EXPECT_LE(relative_difference({table}, {squares}), 1e-13);
  ASSERT_LT(result.clip_factor, 1);
  EXPECT_LE(relative_difference({result.clip_factor}, {0.1 / (std::sqrt(squares) + 1e-6)}), 1e-13);
  for (const auto& [name, parameter] : state) {
    std::vector<double> m, v;
    for (const double gradient : parameter.gradient) {
      const double g = result.clip_factor * gradient;
      m.push_back((1 - 0.9) * g);
      v.push_back((1 - 0.95) * g * g);
    }
    EXPECT_LE(relative_difference(parameter.m, m), 1e-13) << name;
    EXPECT_LE(relative_difference(parameter.v, v), 1e-13) << name;
  }
}

// AdamW written down once more, from arXiv 1711.05101: which parameters decay is known by their names.
class Decay : public TrainerTest, public ::testing::WithParamInterface<bool> {};
INSTANTIATE_TEST_SUITE_P(GainsAndEmbeddings, Decay, ::testing::Bool());

TEST_P(Decay, UpdatesAreAdamW) {
  const bool all = GetParam();
  const double b1 = 0.8, b2 = 0.9, eps = 1e-5, decay = 0.3;
  const auto harness =
      make(model("shared_experts: 1") + kTwoParts, F64,
           cat("beta1: 0.8 beta2: 0.9 eps: 1e-5 weight_decay: 0.3 clip_norm: 0 decay_gains: ", all,
               " decay_embeddings: ", all, " "));
  std::map<std::string, std::vector<double>> weights = harness->weights(), m, v;
  int without = 0;
  for (int t = 1; t <= 3; ++t) {
    const StepResult result = (*harness)->step(false);
    EXPECT_EQ(result.clip_factor, 1);
    for (const auto& [name, parameter] : harness->state()) {
      const bool exempt = name.ends_with(".gain") || name == "embedding.weight";
      without += exempt;
      const double lambda = exempt && !all ? 0 : decay;
      std::vector<double>&w = weights[name], &first = m[name], &second = v[name];
      first.resize(w.size());
      second.resize(w.size());
      for (std::size_t i = 0; i < w.size(); ++i) {
        const double g = parameter.gradient[i];
        first[i] = b1 * first[i] + (1 - b1) * g;
        second[i] = b2 * second[i] + (1 - b2) * g * g;
        const double m_hat = first[i] / (1 - std::pow(b1, t)), v_hat = second[i] / (1 - std::pow(b2, t));
        w[i] -= 3e-3 * (m_hat / (std::sqrt(v_hat) + eps) + lambda * w[i]);
      }
      EXPECT_LE(relative_difference(parameter.master, w), 1e-13) << name << ", step " << t;
      EXPECT_LE(relative_difference(harness->weights().at(name), w), 1e-13) << name << ", step " << t;
    }
  }
  EXPECT_GT(without, 3 * 6);
}

// What is planned is used and what is used is planned: after some steps every page of the
// arena was touched, and further steps take no memory beside it.
TEST_P(TrainerInEveryType, MemoryIsWhatWasPlanned) {
  const std::string text =
      "model { layers: 2 d_model: 64 heads: 4 sequence_length: 64 moe { experts: 4 top_k: 2 "
      "expert_hidden: 64 capacity_factor: 1.5 shared_experts: 1 } } batch { sequences: 4 "
      "micro_batch_sequences: 2 } data { held_out: 0 } ";
  const auto harness = make(text, GetParam());
  // Enough steps for oneDNN to have made the kernels for the row counts that occur.
  for (int step = 0; step < 12; ++step) (*harness)->step(false);
  EXPECT_LE((*harness)->memory().resident_bytes(), (*harness)->memory().bytes());
  EXPECT_GE((*harness)->memory().resident_bytes(), (*harness)->memory().bytes() * 99 / 100);
  const auto before = mallinfo2();
  for (int step = 0; step < 4; ++step) (*harness)->step(false);
  const auto after = mallinfo2();
  EXPECT_LE(static_cast<double>(after.uordblks) + static_cast<double>(after.hblkhd),
            static_cast<double>(before.uordblks) + static_cast<double>(before.hblkhd) + (64 << 10));
  EXPECT_LE(after.arena, before.arena + (1 << 20));
}

}  // namespace
}  // namespace hybridmoe
