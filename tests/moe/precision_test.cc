// Whole models on the cpu backend against the same model, with the same weights, in double precision.
#include <gtest/gtest.h>

#include "tests/moe/model_harness.h"

namespace hybridmoe {
namespace {

using testing::ModelHarness;
using testing::values_of;

struct PrecisionCase {
  const char* name;
  std::string text;
};
void PrintTo(const PrecisionCase& c, std::ostream* out) { *out << c.name; }

const std::string kPrecisionModel =
    "layers: 2 d_model: 32 heads: 4 sequence_length: 48 vocabulary: 61 dense_hidden: 40 ";
const std::string kPrecisionMoe = "moe { experts: 4 top_k: 2 expert_hidden: 24 ";

std::vector<std::vector<double>> counts_of(const ModelHarness& model) {
  std::vector<std::vector<double>> counts;
  for (const auto& layer : model.statistics.moe) counts.push_back(layer.counts);
  return counts;
}

class CpuModel : public ::testing::TestWithParam<std::tuple<Precision, PrecisionCase>> {};

// Rounding: the residual stream, every branch and every gradient on the way back are rounded to the compute
// type, about 15 times a block and pass, independently; unit roundoff is 2^-24 in fp32 and 2^-9 in bf16. That
// makes √(2 · 2 · 15) ≈ 8 unit roundoffs; gradients that cancel (gains, routers) have up to 30. The loss, a
// mean over tokens, has less than one.
TEST_P(CpuModel, AgreesWithDouble) {
  const auto& [precision, c] = GetParam();
  const double unit = precision == BF16 ? std::ldexp(1, -9) : std::ldexp(1, -24);
  const double bound = 64 * unit;
  // A token between two experts may go to either of them; such a seed compares nothing and is redrawn.
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    ModelHarness exact(kPrecisionModel + c.text, F64, 2, seed),
        rounded(kPrecisionModel + c.text, precision, 2, seed);
    for (ParameterStore::Id id = 0; id < exact.parameters.size(); ++id) {
      const std::vector<double> weight = values_of(rounded.parameters.weight(id));
      std::copy(weight.begin(), weight.end(), exact.parameters.weight(id).ptr<double>());
    }
    const double expected = exact.forward_backward(), loss = rounded.forward_backward();
    if (counts_of(rounded) != counts_of(exact)) continue;
    EXPECT_NEAR(loss, expected, 2 * unit * expected);
    for (ParameterStore::Id id = 0; id < exact.parameters.size(); ++id) {
      const std::vector<double> a = values_of(rounded.parameters.gradient(id)),
                                b = values_of(exact.parameters.gradient(id));
      std::vector<double> difference(a.size());
      for (std::size_t i = 0; i < a.size(); ++i) difference[i] = a[i] - b[i];
      EXPECT_LE(testing::norm_of(difference), bound * testing::norm_of(b)) << exact.parameters.spec(id).name;
    }
    return;
  }
  FAIL() << "tokens go to other experts with every seed";
}

INSTANTIATE_TEST_SUITE_P(
    All, CpuModel,
    ::testing::Combine(
        ::testing::Values(F32, BF16),
        ::testing::Values(
            PrecisionCase{"hybrid_moe", kPrecisionMoe + "}"}, PrecisionCase{"hybrid_dense", ""},
            PrecisionCase{"pre_grouped_tied",
                          "placement: PRE kv_heads: 2 tied_head: true " + kPrecisionMoe + "}"},
            PrecisionCase{"post_full_width",
                          "placement: POST head_norm_scope: FULL_WIDTH head_norms { q: true k: true } " +
                              kPrecisionMoe + "}"},
            PrecisionCase{"hybrid_star_shared_capacity", "placement: HYBRID_STAR " + kPrecisionMoe +
                                                             "shared_experts: 1 capacity_factor: 2 }"},
            PrecisionCase{"sigmoid",
                          kPrecisionMoe + "router { scores: SIGMOID renormalize: true scale: 1.5 } }"})),
    [](const auto& each) {
      return cat(Precision_Name(std::get<0>(each.param)), "_", std::get<1>(each.param).name);
    });

}  // namespace
}  // namespace hybridmoe
