// Every parameter of whole models against central finite differences in double precision, and properties that
// must hold to the bit.
#include <gtest/gtest.h>
#include <map>

#include "tests/moe/model_harness.h"

namespace hybridmoe {
namespace {

using testing::ModelHarness;
using testing::values_of;

const char kSize[] = "d_model: 8 heads: 2 sequence_length: 5 vocabulary: 11 dense_hidden: 6 ";
const std::string kGradientMoe =
    "layers: 2 moe { experts: 4 top_k: 2 expert_hidden: 3 balance_loss: 0.3 z_loss: 0.2 ";

struct GradientCase {
  const char* name;
  std::string text;
  bool documents = false;
};
void PrintTo(const GradientCase& c, std::ostream* out) { *out << c.name; }

class ModelGradient : public ::testing::TestWithParam<GradientCase> {};

void mask_documents(ModelHarness& model) {
  for (std::int64_t i = 0; i < model.doc_start.elements(); ++i) {
    model.doc_start.ptr<std::int32_t>()[i] = i % 5 >= 2 ? 2 : 0;
    if (i % 5 == 1) model.batch.targets.ptr<std::int32_t>()[i] = -1;
  }
  model.batch.doc_start = model.doc_start;
}

// d loss / d parameter along a random direction for each parameter tensor. Central differences with step h
// err by O(h²) and O(1e-16 / h): at h = 1e-6 both are below 1e-9; routing does not change within so small a
// step.
TEST_P(ModelGradient, MatchesFiniteDifferences) {
  ModelHarness model(kSize + GetParam().text, F64, 2);
  if (GetParam().documents) mask_documents(model);
  // Gains away from 1, so that a missing gain shows.
  for (ParameterStore::Id id = 0; id < model.parameters.size(); ++id) {
    if (model.parameters.spec(id).init_std > 0) continue;
    const Random random(7, model.parameters.spec(id).name);
    double* gain = model.parameters.weight(id).ptr<double>();
    for (std::int64_t i = 0; i < model.parameters.weight(id).elements(); ++i)
      gain[i] += 0.3 * random.normal(i);
  }
  model.forward_backward();
  std::map<std::string, std::vector<double>> gradients;
  for (ParameterStore::Id id = 0; id < model.parameters.size(); ++id) {
    gradients[model.parameters.spec(id).name] = values_of(model.parameters.gradient(id));
  }
  const double h = 1e-6;
  for (ParameterStore::Id id = 0; id < model.parameters.size(); ++id) {
    const std::string& name = model.parameters.spec(id).name;
    const Tensor weight = model.parameters.weight(id);
    const Random random(11, name);
    const std::vector<double> before = values_of(weight), &gradient = gradients[name];
    double slope = 0, size = 0, loss[2];
    for (std::int64_t i = 0; i < weight.elements(); ++i) {
      slope += gradient[i] * random.normal(i);
      size += gradient[i] * gradient[i];
    }
    for (const int sign : {0, 1}) {
      for (std::int64_t i = 0; i < weight.elements(); ++i) {
        weight.ptr<double>()[i] = before[i] + (sign ? h : -h) * random.normal(i);
      }
      loss[sign] = model.forward_backward();
    }
    std::copy(before.begin(), before.end(), weight.ptr<double>());
    EXPECT_GT(size, 0) << name << " gets no gradient";
    EXPECT_NEAR((loss[1] - loss[0]) / (2 * h), slope, 1e-7 * (1 + std::sqrt(size))) << name;
  }
}

const std::string kGradientDense = "layers: 2 ";
INSTANTIATE_TEST_SUITE_P(
    All, ModelGradient,
    ::testing::Values(
        GradientCase{"hybrid", "placement: HYBRID " + kGradientMoe + "}"},
        GradientCase{"hybrid_star", "placement: HYBRID_STAR " + kGradientMoe + "}"},
        GradientCase{"post", "placement: POST " + kGradientMoe + "}"},
        GradientCase{"pre", "placement: PRE " + kGradientMoe + "}"},
        GradientCase{"pre_qk_norm", "placement: PRE_QK_NORM " + kGradientMoe + "}"},
        GradientCase{"mix_ln", "layers: 4 placement: MIX_LN moe { experts: 4 top_k: 2 expert_hidden: 3 }"},
        GradientCase{"no_norms",
                     "placement: PRE layer_override { layer: [0, 1] attn_norm: NONE ffn_norm: NONE } " +
                         kGradientMoe + "}"},
        GradientCase{"dense_no_norms",
                     kGradientDense +
                         "placement: PRE layer_override { layer: [0, 1] attn_norm: NONE ffn_norm: NONE }"},
        GradientCase{"dense_hybrid", kGradientDense + "placement: HYBRID"},
        GradientCase{"dense_post", kGradientDense + "placement: POST"},
        GradientCase{"dense_pre", kGradientDense + "placement: PRE"},
        GradientCase{"dense_then_moe", "placement: HYBRID " + kGradientMoe + " dense_layers: 1 }"},
        GradientCase{"shared_experts",
                     "placement: HYBRID " + kGradientMoe + " shared_experts: 2 shared_hidden: 3 }"},
        GradientCase{"shared_pre", "placement: PRE " + kGradientMoe + " shared_experts: 1 }"},
        GradientCase{"full_width", "placement: HYBRID head_norm_scope: FULL_WIDTH " + kGradientMoe + "}"},
        GradientCase{"c_norm", "placement: HYBRID head_norms { q: true k: true v: true c: true } " +
                                   kGradientMoe + "}"},
        GradientCase{"c_norm_full_width",
                     "placement: PRE head_norms { k: true c: true } head_norm_scope: FULL_WIDTH " +
                         kGradientMoe + "}"},
        GradientCase{"grouped_query", "placement: HYBRID kv_heads: 1 head_dim: 6 " + kGradientMoe + "}"},
        GradientCase{"renormalize", "placement: HYBRID " + kGradientMoe + " router { renormalize: true } }"},
        GradientCase{"sigmoid",
                     "placement: HYBRID " + kGradientMoe +
                         " router { scores: SIGMOID groups: 2 top_groups: 1 scale: 1.5 bias_update: 0.1 } }"},
        GradientCase{"capacity_probability",
                     "placement: HYBRID " + kGradientMoe + " capacity_factor: 0.75 }"},
        GradientCase{"capacity_position",
                     "placement: HYBRID " + kGradientMoe + " capacity_factor: 0.75 drop: BY_POSITION }"},
        GradientCase{"z_over_k", "placement: HYBRID " + kGradientMoe + " z_loss_over_top_k: true }"},
        GradientCase{"tied", "placement: HYBRID tied_head: true " + kGradientMoe + "}"},
        GradientCase{"documents", "placement: HYBRID " + kGradientMoe + "}", true},
        GradientCase{"recompute", "placement: HYBRID recompute: true " + kGradientMoe + "}"},
        GradientCase{"recompute_post", "placement: POST recompute: true " + kGradientMoe + "}"}),
    [](const auto& each) { return std::string(each.param.name); });

class Recomputation : public ::testing::TestWithParam<Precision> {};

TEST_P(Recomputation, ChangesNoBit) {
  for (const char* placement : {"HYBRID", "POST", "PRE"}) {
    const std::string text =
        cat(kSize, "placement: ", placement, " ", kGradientMoe, " capacity_factor: 1 shared_experts: 1 } ");
    ModelHarness kept(text, GetParam(), 2), again(text + "recompute: true", GetParam(), 2);
    EXPECT_EQ(kept.forward_backward(), again.forward_backward()) << placement;
    for (ParameterStore::Id id = 0; id < kept.parameters.size(); ++id) {
      EXPECT_EQ(values_of(kept.parameters.gradient(id)), values_of(again.parameters.gradient(id)))
          << placement << " " << kept.parameters.spec(id).name;
    }
    EXPECT_LT(again.memory.bytes(), kept.memory.bytes());
  }
}

TEST_P(Recomputation, TwoRunsGiveTheSameBits) {
  const std::string text = cat(kSize, "placement: HYBRID ", kGradientMoe, "}");
  ModelHarness a(text, GetParam(), 2), b(text, GetParam(), 2);
  EXPECT_EQ(a.forward_backward(), b.forward_backward());
  b.forward_backward();
  for (ParameterStore::Id id = 0; id < a.parameters.size(); ++id) {
    EXPECT_EQ(values_of(a.parameters.gradient(id)), values_of(b.parameters.gradient(id)));
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Recomputation, ::testing::Values(F64, F32, BF16),
                         [](const auto& each) { return Precision_Name(each.param); });

}  // namespace
}  // namespace hybridmoe
