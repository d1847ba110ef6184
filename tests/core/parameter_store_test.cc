// Who owns what, on several ranks, each of which is played by a store of its own.
#include "core/parameter_store.h"

#include <gtest/gtest.h>
#include <map>
#include <memory>
#include <tuple>

#include "core/buffer.h"
#include "core/random.h"
#include "tests/core/fake_communicator.h"

namespace hybridmoe {
namespace {

constexpr int kExperts = 4;
constexpr std::int64_t kHidden = 3, kWidth = 5;  // odd, so that nothing is aligned by luck

// Rank `rank` of `ranks`: replicated parameters over all, experts split over groups of `expert_ranks`
// neighbours and replicated over ranks / expert_ranks.
struct Rank {
  FakeCommunicator data, expert_data;
  std::unique_ptr<Backend> backend = make_reference_backend();
  MemoryPlan memory;
  ParameterStore store;

  Rank(int rank, int ranks, int expert_ranks, std::int64_t bucket_bytes = 600, DType compute = DType::F64,
       DType statistics = DType::F64, OptimizerState state = OptimizerState::Masters)
      : data(rank, ranks), expert_data(rank / expert_ranks, ranks / expert_ranks) {
    add("embedding", {17, kWidth}, TensorKind::Embedding, -1, 3, 0.1);
    for (int l = 0; l < 2; ++l) {
      add(cat("layers.", l, ".qkv"), {3 * kWidth, kWidth}, TensorKind::Qkv, l, 2 - l, 0.2);
      add(cat("layers.", l, ".norm"), {kWidth}, TensorKind::FfnNorm, l, 2 - l, 0);
      add_experts(l, rank % expert_ranks, expert_ranks);
    }
    add("final_norm", {kWidth}, TensorKind::FinalNorm, -1, 0, 0);
    store.plan(memory, compute, statistics, bucket_bytes, state);
    memory.commit(*backend);
    store.initialise(5, *backend);
  }

  void add(const std::string& name, const Shape& shape, TensorKind kind, int layer, int stage, double std) {
    ParameterSpec spec;
    spec.name = name;
    spec.global_shape = spec.local_shape = shape;
    spec.runs = {{0, shape.elements(), kind}};
    spec.layer = layer;
    spec.ready_stage = stage;
    spec.init_std = std;
    spec.decay = std > 0;
    spec.replicas = &data;
    store.add(spec);
  }
  // Gate and up of the experts on this rank: two runs for each.
  void add_experts(int layer, int part, int parts) {
    const int mine = kExperts / parts;
    const std::int64_t half = kHidden * kWidth;
    ParameterSpec spec;
    spec.name = cat("layers.", layer, ".experts");
    spec.global_shape = {kExperts, 2 * kHidden, kWidth};
    spec.local_shape = {mine, 2 * kHidden, kWidth};
    for (int e = part * mine; e < (part + 1) * mine; ++e) {
      spec.runs.push_back({2 * e * half, (2 * e + 1) * half, TensorKind::ExpertGate});
      spec.runs.push_back({(2 * e + 1) * half, (2 * e + 2) * half, TensorKind::ExpertUp});
    }
    spec.layer = layer;
    spec.ready_stage = 2 - layer;
    spec.init_std = 0.3;
    spec.replicas = &expert_data;
    store.add(spec);
  }
};

struct Layout {
  int ranks, expert_ranks;
};
void PrintTo(const Layout& layout, std::ostream* out) { *out << layout.ranks << "_" << layout.expert_ranks; }

class Ownership : public ::testing::TestWithParam<Layout> {
 protected:
  Ownership() {
    for (int r = 0; r < GetParam().ranks; ++r)
      ranks.push_back(std::make_unique<Rank>(r, GetParam().ranks, GetParam().expert_ranks));
  }
  const ParameterSpec& spec(int id) const { return ranks[0]->store.spec(id); }
  std::vector<std::unique_ptr<Rank>> ranks;
};

TEST_P(Ownership, EveryElementOfTheModelHasOneOwner) {
  std::map<int, std::vector<int>> owners;
  for (int id = 0; id < ranks[0]->store.size(); ++id) owners[id].assign(spec(id).global_shape.elements(), 0);
  for (const auto& rank : ranks) {
    for (const auto& bucket : rank->store.buckets()) {
      for (const auto& range : bucket.owned) {
        for (std::int64_t i = 0; i < range.length; ++i) ++owners[range.parameter].at(range.global_begin + i);
      }
    }
  }
  for (const auto& [id, count] : owners) {
    EXPECT_EQ(count, std::vector<int>(count.size(), 1)) << spec(id).name;
  }
}

// Local, global and shard coordinates of an owned range, and its segment, mean the same elements.
TEST_P(Ownership, CoordinatesAgree) {
  for (const auto& rank : ranks) {
    ParameterStore& store = rank->store;
    for (const auto& bucket : store.buckets()) {
      EXPECT_EQ(bucket.elements % (64 * bucket.replicas->size()), 0);
      EXPECT_EQ((bucket.owned_end - bucket.owned_begin) * bucket.replicas->size(), bucket.elements);
      EXPECT_EQ(bucket.owned_begin, bucket.replicas->rank() * (bucket.owned_end - bucket.owned_begin));
      EXPECT_EQ(bucket.m.elements(), bucket.owned_end - bucket.owned_begin);
      ASSERT_EQ(bucket.owned.size(), bucket.segments.size());
      for (std::size_t i = 0; i < bucket.owned.size(); ++i) {
        const auto& range = bucket.owned[i];
        const Segment& segment = bucket.segments[i];
        const ParameterSpec& local = store.spec(range.parameter);
        EXPECT_EQ(store.weight(range.parameter).ptr<double>() + range.local_begin,
                  bucket.owned_weight().ptr<double>() + range.shard_begin);
        EXPECT_EQ(store.gradient(range.parameter).ptr<double>() + range.local_begin,
                  bucket.owned_gradient().ptr<double>() + range.shard_begin);
        EXPECT_EQ(segment.begin, range.shard_begin);
        EXPECT_EQ(segment.end, range.shard_begin + range.length);
        EXPECT_EQ(store.table()[segment.row], (GradientRow{local.layer, range.kind}));
        EXPECT_EQ(segment.decay, local.decay);
        std::int64_t begin = 0;  // of the run in local order
        for (const GlobalRun& run : local.runs) {
          const std::int64_t offset = range.local_begin - begin;
          if (offset >= 0 && offset < run.end - run.begin) {
            EXPECT_EQ(range.global_begin, run.begin + offset);
            EXPECT_LE(offset + range.length, run.end - run.begin);
            EXPECT_EQ(range.kind, run.kind);
          }
          begin += run.end - run.begin;
        }
      }
    }
  }
}

// The gradient table summed over the ranks: the squares of the whole model, replicated elements once. Every
// rank holds the same synchronised gradient; garbage lies in the padding.
TEST_P(Ownership, TheGradientTableCountsEveryElementOnce) {
  std::map<std::pair<int, TensorKind>, double> expected;
  const auto gradient = [](int id, std::int64_t element) { return 1.0 + id + 0.001 * element; };
  const Rank whole(0, 1, 1);
  for (int id = 0; id < whole.store.size(); ++id) {
    for (const GlobalRun& run : whole.store.spec(id).runs) {
      double& squares = expected[{whole.store.spec(id).layer, run.kind}];
      for (std::int64_t i = run.begin; i < run.end; ++i) squares += gradient(id, i) * gradient(id, i);
    }
  }
  const auto rows = static_cast<std::int64_t>(whole.store.table().size());
  std::vector<double> sums(rows * kGradColumns, 0.0);
  for (const auto& rank : ranks) {
    ASSERT_EQ(rank->store.table(), whole.store.table());
    for (auto& bucket : rank->store.buckets()) {
      std::fill_n(bucket.gradient.ptr<double>(), bucket.elements, 1e6);
    }
    for (int id = 0; id < rank->store.size(); ++id) {
      double* target = rank->store.gradient(id).ptr<double>();
      for (const GlobalRun& run : rank->store.spec(id).runs) {
        for (std::int64_t i = run.begin; i < run.end; ++i) *target++ = gradient(id, i);
      }
    }
    for (auto& bucket : rank->store.buckets()) {
      rank->backend->grad_table({.grad = bucket.owned_gradient(),
                                 .segments = &bucket.segments,
                                 .table = Tensor(sums.data(), DType::F64, {rows, kGradColumns})},
                                nullptr);
    }
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    const GradientRow& key = whole.store.table()[row];
    const double want = expected.at({key.layer, key.kind});
    EXPECT_NEAR(sums[row * kGradColumns + kGradSquares], want, 1e-12 * want)
        << name_of(key.kind) << key.layer;
    EXPECT_EQ(sums[row * kGradColumns + kGradNonfinite], 0);
  }
}

TEST_P(Ownership, InitialValuesDoNotDependOnTheLayout) {
  const Rank whole(0, 1, 1);
  for (const auto& rank : ranks) {
    for (int id = 0; id < rank->store.size(); ++id) {
      const double* mine = rank->store.weight(id).ptr<double>();
      const double* all = whole.store.weight(id).ptr<double>();
      for (const GlobalRun& run : rank->store.spec(id).runs) {
        for (std::int64_t i = run.begin; i < run.end; ++i) ASSERT_EQ(*mine++, all[i]) << spec(id).name;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, Ownership,
                         ::testing::Values(Layout{1, 1}, Layout{2, 1}, Layout{2, 2}, Layout{3, 1},
                                           Layout{4, 2}, Layout{4, 4}, Layout{8, 4}),
                         ::testing::PrintToStringParamName());

TEST(ParameterStore, InitialValuesAreTruncatedAndGainsAreOne) {
  const Rank rank(0, 1, 1);
  const ParameterStore& store = rank.store;
  const Tensor qkv = store.weight(store.find("layers.1.qkv")),
               norm = store.weight(store.find("layers.1.norm"));
  const Random random(5, "layers.1.qkv");
  for (std::int64_t i = 0; i < qkv.elements(); ++i) {
    EXPECT_EQ(qkv.ptr<double>()[i], 0.2 * random.truncated_normal(i, 3));
    EXPECT_LE(std::abs(qkv.ptr<double>()[i]), 0.6);
  }
  for (std::int64_t i = 0; i < norm.elements(); ++i) EXPECT_EQ(norm.ptr<double>()[i], 1);
  EXPECT_EQ(store.local_elements(), 17 * 5 + 2 * (75 + 5 + 4 * 30) + 5);
}

// Each group of replicas fills its buckets in the order of the backward pass, whatever others come between;
// buckets end when they are full and are complete in the order in which they lie.
TEST(ParameterStore, BucketsFollowTheBackwardPass) {
  const Rank rank(1, 4, 2, 600);
  const ParameterStore& store = rank.store;
  std::vector<std::string> experts, others;
  int complete = 0;
  for (const auto& bucket : store.buckets()) {
    std::int64_t elements = 0, last = 0;
    int stage = bucket.first_stage;
    EXPECT_EQ(stage, store.spec(bucket.parameters.front()).ready_stage);
    for (const int id : bucket.parameters) {
      const ParameterSpec& spec = store.spec(id);
      (spec.name.ends_with("experts") ? experts : others).push_back(spec.name);
      EXPECT_EQ(spec.replicas, bucket.replicas);
      EXPECT_GE(spec.ready_stage, stage);
      stage = spec.ready_stage;
      EXPECT_LT(elements * 8, 600) << "bucket with " << spec.name << " was full already";
      last = (spec.local_shape.elements() + 63) / 64 * 64;
      elements += last;
    }
    EXPECT_EQ(bucket.ready_stage, stage);
    EXPECT_GE(bucket.ready_stage, complete);
    complete = bucket.ready_stage;
    EXPECT_LT(bucket.elements - elements, 64 * bucket.replicas->size());
    EXPECT_GE(bucket.elements, elements);
  }
  EXPECT_EQ(experts, (std::vector<std::string>{"layers.1.experts", "layers.0.experts"}));
  EXPECT_EQ(others, (std::vector<std::string>{"final_norm", "layers.1.norm", "layers.1.qkv", "layers.0.norm",
                                              "layers.0.qkv", "embedding"}));
  EXPECT_EQ(Rank(0, 2, 1, 1 << 20).store.buckets().size(), 2u);  // the experts have replicas of their own
  EXPECT_GT(Rank(0, 2, 1, 1).store.buckets().size(), 7u);
}

class MastersOf : public ::testing::TestWithParam<OptimizerState> {};

TEST_P(MastersOf, TheyKeepWhatTheWeightRoundsAway) {
  for (const int r : {0, 1}) {
    Rank rank(r, 2, 1, 600, DType::BF16, DType::F32, GetParam());
    const Rank exact(0, 1, 1);
    bool rounded = false;
    for (const auto& bucket : rank.store.buckets()) {
      const std::int64_t owned = bucket.owned_end - bucket.owned_begin;
      std::vector<float> masters(static_cast<std::size_t>(owned), NAN);
      bucket.get_masters(0, Tensor(masters.data(), DType::F32, {owned}), *rank.backend, nullptr);
      for (const auto& range : bucket.owned) {
        const double* all = exact.store.weight(range.parameter).ptr<double>();
        for (std::int64_t i = 0; i < range.length; ++i) {
          const auto want = static_cast<float>(all[range.global_begin + i]);
          const auto weight =
              static_cast<float>(bucket.owned_weight().ptr<BFloat16>()[range.shard_begin + i]);
          EXPECT_EQ(masters[static_cast<std::size_t>(range.shard_begin + i)], want);
          EXPECT_NEAR(weight, want, std::abs(want) / 256);
          rounded = rounded || weight != want;
        }
      }
    }
    EXPECT_TRUE(rounded);
  }
}

INSTANTIATE_TEST_SUITE_P(ParameterStore, MastersOf,
                         ::testing::Values(OptimizerState::Masters, OptimizerState::Remainders));

// In every form: what is set is what is got, and the weights are rounded to it.
TEST(ParameterStore, MastersAreSetAsTheyAreGot) {
  using Form = std::tuple<DType, DType, OptimizerState>;
  for (const auto& [compute, statistics, state] :
       {Form{DType::F64, DType::F64, OptimizerState::Masters},
        Form{DType::F32, DType::F32, OptimizerState::Remainders},
        Form{DType::BF16, DType::F32, OptimizerState::Masters},
        Form{DType::BF16, DType::F32, OptimizerState::Remainders}}) {
    Rank rank(1, 2, 1, 600, compute, statistics, state);
    const auto& bucket = rank.store.buckets().front();
    constexpr std::int64_t kBegin = 3, kCount = 7;
    // 1 + 2^-8 + i 2^-20: the first is half way between two bf16 numbers.
    std::vector<double> given(kCount), got(kCount, NAN), weights(kCount, NAN);
    for (std::int64_t i = 0; i < kCount; ++i) given[i] = 1 + 0x1p-8 + static_cast<double>(i) * 0x1p-20;
    const auto view = [](std::vector<double>& values) { return Tensor(values.data(), DType::F64, {kCount}); };
    const Buffer masters(*rank.backend, statistics, {kCount});
    rank.backend->convert(view(given), masters.tensor(), nullptr);
    bucket.set_masters(kBegin, masters.tensor(), *rank.backend, nullptr);
    rank.backend->zero(masters.tensor(), nullptr);
    bucket.get_masters(kBegin, masters.tensor(), *rank.backend, nullptr);
    rank.backend->convert(masters.tensor(), view(got), nullptr);
    EXPECT_EQ(got, given);
    rank.backend->convert(bucket.owned_weight().flat(kBegin, kBegin + kCount), view(weights), nullptr);
    for (std::int64_t i = 0; i < kCount; ++i)
      EXPECT_EQ(weights[i], compute == DType::BF16 ? 1 + 0x1p-7 : given[i]) << i;
  }
}

TEST(ParameterStore, RowsOfTheTableByLayerThenKindThenTheModel) {
  const Rank rank(0, 1, 1);
  std::vector<GradientRow> want;
  for (const int layer : {0, 1}) {
    for (const TensorKind kind :
         {TensorKind::Qkv, TensorKind::FfnNorm, TensorKind::ExpertGate, TensorKind::ExpertUp})
      want.push_back({layer, kind});
  }
  want.push_back({-1, TensorKind::Embedding});
  want.push_back({-1, TensorKind::FinalNorm});
  EXPECT_EQ(rank.store.table(), want);
}

TEST(ParameterStore, MistakesAreErrors) {
  const auto alone = make_local_communicator();
  ParameterStore store;
  ParameterSpec spec;
  spec.name = "w";
  spec.global_shape = spec.local_shape = {4};
  spec.runs = {{0, 3, TensorKind::Qkv}};
  spec.replicas = alone.get();
  EXPECT_THROW(store.add(spec), Error);  // a run too short
  spec.runs[0].end = 4;
  EXPECT_EQ(store.add(spec), 0);
  EXPECT_THROW(store.add(spec), Error);  // the same name
  EXPECT_EQ(store.find("v"), -1);
  MemoryPlan memory;
  store.plan(memory, DType::F64, DType::F64, 1 << 20, OptimizerState::None);
  EXPECT_EQ(memory.by_component().count("gradients"), 0u);
  spec.name = "v";
  EXPECT_THROW(store.add(spec), Error);  // too late
}

}  // namespace
}  // namespace hybridmoe
