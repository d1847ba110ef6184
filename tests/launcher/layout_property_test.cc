// Random models, batches, routers and layouts: what the ranks compute is what one process computes. Ranks are
// threads. A case is a function of its number, which every failure names; HYBRIDMOE_CASE=N runs that one
// alone.
#include <cstdlib>
#include <gtest/gtest.h>
#include <regex>
#include <set>

#include "parallel/thread_communicator.h"
#include "tests/launcher/layout_oracle.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

using testing::Difference;
using testing::OracleRun;
using testing::TrainerHarness;

constexpr int kCases = 240, kCasesPerTest = 20, kPropertySteps = 3;
constexpr double kPropertyBound = 1e-11;

// How the routers are made to send their tokens.
enum class Load { Initial, AllToTheFirst, Skewed };

struct LayoutCase {
  std::string text;
  Layout layout;
  Load load = Load::Initial;
  std::int32_t vocabulary = 20;
  std::string str() const { return cat(configuration_text(layout), " on ", layout.world, " ranks: ", text); }
};

class Draw {
 public:
  explicit Draw(std::uint64_t number) : random_(17, cat("layout case ", number)) {}
  template <class T>
  T of(std::initializer_list<T> values) {
    return values.begin()[random_.below(next_++, values.size())];
  }
  bool yes(int percent) { return random_.below(next_++, 100) < static_cast<std::uint64_t>(percent); }

 private:
  Random random_;
  std::uint64_t next_ = 0;
};

// Weights that are normalised over a single choice are 1 but for rounding: the router's gradient is 0 and a
// choice by weight a tie, neither of which says anything.
std::string drawn_router(Draw& draw, int experts, int top_k) {
  std::string text;
  if (top_k == 1) return "router {} ";
  if (draw.yes(40)) {
    text = "scores: SIGMOID ";
    if (draw.yes(50)) text += "scale: 1.5 ";
    if (draw.yes(50)) text += "bias_update: 0.02 ";
    if (experts % 4 == 0 && draw.yes(50)) text += "groups: 4 top_groups: 3 ";
  } else if (draw.yes(40)) {
    text = "renormalize: true ";
  }
  return "router { " + text + "} ";
}

std::string drawn_moe(Draw& draw, int layers) {
  const int experts = draw.of({4, 6, 8}), top_k = draw.of({1, 2, 2, 3});
  std::string text = cat("moe { experts: ", experts, " top_k: ", top_k, " expert_hidden: ", draw.of({4, 8}),
                         " ", drawn_router(draw, experts, top_k));
  if (layers > 1) text += cat("dense_layers: ", draw.of({0, 1}), " every: ", draw.of({1, 2}), " ");
  if (draw.yes(40))
    text += cat("shared_experts: ", draw.of({1, 2}), " shared_hidden: ", draw.of({4, 8}), " ");
  if (draw.yes(40)) {
    text += cat("capacity_factor: ", draw.of({0.5, 0.8, 1.2}),
                " drop: ", draw.of({"BY_POSITION", "BY_PROBABILITY"}), " ");
  }
  text += cat("balance_loss: ", draw.of({0.0, 0.05}), " z_loss: ", draw.of({0.0, 0.01}), " ");
  if (draw.yes(30)) text += "z_loss_over_top_k: true ";
  return text + "} ";
}

std::string drawn_model(Draw& draw, std::int32_t vocabulary) {
  const int layers = draw.of({1, 2, 3}), heads = draw.of({2, 4, 8});
  const int kv_heads = heads / draw.of({1, 2, heads});
  std::string text =
      cat("model { layers: ", layers, " d_model: ", draw.of({8, 12}), " heads: ", heads,
          " kv_heads: ", kv_heads, " head_dim: ", draw.of({2, 4}), " sequence_length: ", draw.of({8, 16}),
          " dense_hidden: ", draw.of({8, 16}), " padded_vocabulary: ", vocabulary + draw.of({0, 3, 12}),
          " placement: ", draw.of({"HYBRID", "HYBRID_STAR", "POST", "PRE", "PRE_QK_NORM", "MIX_LN"}), " ");
  if (draw.yes(30)) text += "head_norms { q: true k: true v: true c: true } ";
  if (draw.yes(40)) text += "head_norm_scope: FULL_WIDTH ";
  if (draw.yes(30)) text += "tied_head: true ";
  if (draw.yes(40)) text += "recompute: true ";
  return text + (draw.yes(90) ? drawn_moe(draw, layers) : "") + "} ";
}

std::string replaced(const std::string& text, const char* pattern, const char* by) {
  return std::regex_replace(text, std::regex(pattern), by);
}

LayoutCase drawn_case(std::uint64_t number) {
  Draw draw(number);
  LayoutCase result;
  result.vocabulary = draw.of({20, 27, 33});
  result.text = drawn_model(draw, result.vocabulary);
  if (result.text.find("BY_PROBABILITY") != std::string::npos) {
    // Tokens that repeat have weights which are equal but for rounding, and rounding then decides who is
    // dropped: a capacity by weight is compared on tokens that seldom repeat, and without repeated sequences.
    result.vocabulary = 600;
    result.text = replaced(result.text, "padded_vocabulary: [0-9]+", "padded_vocabulary: 603");
  }
  result.text +=
      draw.yes(50) ? "batch { sequences: 8 } " : "batch { sequences: 16 micro_batch_sequences: 8 } ";
  result.text += cat("data { held_out: 0.1 document_mask: ", draw.of({"true", "false"}), " } ");
  result.text += cat("optimizer { learning_rate: 3e-3 clip_norm: ", draw.of({0.0, 0.4}),
                     " decay_gains: ", draw.of({"true", "false"}), " } ");
  result.load = draw.of({Load::Initial, Load::Initial, Load::AllToTheFirst, Load::Skewed});
  const int world = draw.of({2, 4, 4, 8});
  result.text +=
      cat("evaluation { sequences: ", result.vocabulary == 600 ? 8 : 9,
          " } schedule { warmup_steps: 2 } steps: 30 precision: F64 seed: ", number + 1,
          " parallel { bucket_bytes: ", draw.of({1024, 4096, 1 << 20}),
          " exchange_chunks: ", draw.of({1, 2, 3}), " exchange_overlap: ", draw.of({"true", "false"}), " } ",
          "telemetry { expert_every: 1 check_every: 2 } ");
  Config config = parse_config_text(result.text, "drawn case");
  complete(&config, result.vocabulary);
  std::vector<Layout> layouts = testing::legal_layouts(world, layout_demands(config));
  // Data parallelism alone has tests of its own.
  std::erase_if(layouts, [](const Layout& l) { return l.tensor * l.expert * l.expert_tensor == 1; });
  if (layouts.empty()) layouts.push_back({.world = world});
  result.layout = layouts[Random(18, cat("layout ", number)).below(0, layouts.size())];
  return result;
}

void set_load(TrainerHarness& harness, Load load) {
  if (load == Load::Initial) return;
  ParameterStore& parameters = harness->parameters();
  for (ParameterStore::Id id = 0; id < parameters.size(); ++id) {
    if (!parameters.spec(id).name.ends_with("router.weight")) continue;
    const Tensor weight = parameters.weight(id);
    // All logits equal: ties go to the first experts, the others get no token. Or large logits.
    for (std::int64_t i = 0; i < weight.elements(); ++i) {
      weight.ptr<double>()[i] *= load == Load::AllToTheFirst ? 0 : 40;
    }
  }
}

class LayoutProperty : public ::testing::TestWithParam<int> {
 protected:
  static std::string run(const LayoutCase& drawn) {
    const TemporaryDirectory directory;
    testing::Documents documents = testing::random_documents(500, 7, drawn.vocabulary, 5);
    for (int i = 0; i < 60; ++i) documents.push_back({i % drawn.vocabulary});  // targets that are all masked
    const std::string corpus =
        testing::write_documents(directory.file("corpus"), documents, drawn.vocabulary);
    const auto alone = make_local_communicator();
    TrainerHarness one(drawn.text, corpus);
    set_load(one, drawn.load);
    const OracleRun oracle = testing::record_run(one, data_parallel_groups(*alone, *alone), kPropertySteps);
    std::vector<std::string> differences(drawn.layout.world);
    run_ranks(drawn.layout.world, [&](ThreadWorld::Rank& rank) {
      const Mesh mesh(drawn.layout, one.config().model().kv_heads());
      const MeshCommunicators communicators(mesh, rank.world(), rank.make_groups());
      const Groups groups = communicators.groups();
      TrainerHarness many(drawn.text, corpus, &groups);
      set_load(many, drawn.load);
      differences[rank.world().rank()] =
          testing::compare_with_oracle(many, groups, oracle, kPropertyBound).what();
    });
    for (const std::string& difference : differences) {
      if (!difference.empty()) return difference;
    }
    return {};
  }
};

TEST_P(LayoutProperty, RanksComputeWhatOneProcessComputes) {
  const char* const chosen = std::getenv("HYBRIDMOE_CASE");
  for (int i = 0; i < kCasesPerTest; ++i) {
    const std::uint64_t number = GetParam() * kCasesPerTest + i;
    if (chosen != nullptr && std::strtoull(chosen, nullptr, 10) != number) continue;
    const LayoutCase drawn = drawn_case(number);
    std::string difference;
    try {
      difference = run(drawn);
    } catch (const std::exception& error) {
      difference = error.what();
    }
    EXPECT_EQ(difference, "") << "case " << number << " (HYBRIDMOE_CASE=" << number << "), " << drawn.str();
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, LayoutProperty, ::testing::Range(0, kCases / kCasesPerTest));

// The cases are worth something only if they reach what they are meant to reach.
TEST(LayoutProperty, TheCasesCoverTensorAndExpertLayouts) {
  std::set<std::string> layouts;
  int tensor = 0, expert = 0, shards = 0, both = 0, drops = 0, first = 0, eight = 0;
  for (int number = 0; number < kCases; ++number) {
    const LayoutCase drawn = drawn_case(number);
    const Layout& l = drawn.layout;
    layouts.insert(cat(l.world, configuration_text(l)));
    tensor += l.tensor > 1;
    expert += l.expert > 1;
    shards += l.expert_tensor > 1;
    both += l.tensor > 1 && l.expert > 1;
    eight += l.world == 8;
    drops += drawn.text.find("capacity_factor") != std::string::npos;
    first += drawn.load == Load::AllToTheFirst;
  }
  EXPECT_GE(layouts.size(), 30u);
  for (const int count : {tensor, expert, shards, both, drops, first, eight}) EXPECT_GE(count, 30);
}

}  // namespace
}  // namespace hybridmoe
