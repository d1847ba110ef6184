// A whole block against numbers computed independently in double precision: the specification of
// docs/model.md.
#include <gtest/gtest.h>

#include "moe/block.h"
#include "tests/moe/model_harness.h"

namespace hybridmoe {
namespace {

using testing::norm_of;
using testing::values_of;

// g(n,s,c)[i] = c·(((7i² + (37+3s)i + 11s) mod 101) − 50)/50.
std::vector<double> g(std::int64_t n, std::int64_t s, double c, double offset = 0) {
  std::vector<double> values(n);
  for (std::int64_t i = 0; i < n; ++i) {
    values[i] = offset + c * (static_cast<double>((7 * i * i + (37 + 3 * s) * i + 11 * s) % 101) - 50) / 50;
  }
  return values;
}

struct Expected {
  double loss, lb, z, dx, dwqkv, dwo, dgq, dgk, dgv, dgf, dga, dwr, dw1, dv1, dw2, out[3];
};

class BlockNumbers : public ::testing::Test {
 protected:
  static constexpr int T = 4, d = 8, H = 2, dk = 4, E = 4, k = 2, F = 3;

  void set_weights() {
    set("layers.0.qkv.weight", g(192, 2, .5));
    set("layers.0.q_norm.gain", g(4, 3, .2, 1));
    set("layers.0.k_norm.gain", g(4, 4, .2, 1));
    set("layers.0.v_norm.gain", g(4, 5, .2, 1));
    set("layers.0.attn_out.weight", transposed(g(64, 6, .5), d, H * dk));
    set("layers.0.ffn_norm.gain", g(8, 7, .2, 1));
    set("layers.0.attn_norm.gain", g(8, 13, .2, 1));
    set("layers.0.router.weight", g(32, 84, 1));
    set("layers.0.experts.gate_up.weight", interleaved(g(96, 9, .6), g(96, 10, .6)));
    set("layers.0.experts.down.weight", g(96, 11, .6));
  }

  void run(const std::string& placement, const Expected& want) {
    Config config = parse_config_text(
        "model { layers: 1 d_model: 8 heads: 2 sequence_length: 4 vocabulary: 16 placement: " + placement +
            " moe { experts: 4 top_k: 2 expert_hidden: 3 balance_loss: 0.01 z_loss: 0.001 z_loss_over_top_k: "
            "true } }",
        "test");
    complete(config.mutable_model(), 0);
    const ModelConfig& model = config.model();
    auto backend = make_reference_backend();
    auto world = make_local_communicator();
    Machine machine{*backend, testing::one_rank_groups(*world)};
    auto exchange = make_local_row_exchange(*backend, *world, E, k, {});
    MemoryPlan memory;
    const ParameterRules rules(model, config.optimizer());
    Tensor cosines, sines, x, out, dy;
    Block block(model, resolve_layers(model)[0], 0, rules, machine, exchange.get(), store, cosines, sines);
    memory.add(&cosines, "cos", {T, dk / 2}, DType::F64, "t");
    memory.add(&sines, "sin", {T, dk / 2}, DType::F64, "t");
    memory.add(&x, "x", {T, d}, DType::F64, "t");
    memory.add(&out, "out", {T, d}, DType::F64, "t");
    memory.add(&dy, "dy", {T, d}, DType::F64, "t");
    block.plan(memory, 1, T, true, true, 0);
    store.plan(memory, DType::F64, DType::F64, 1 << 20, OptimizerState::Masters);
    memory.commit(*backend);
    for (int p = 0; p < T; ++p) {
      for (int i = 0; i < dk / 2; ++i) {
        cosines.ptr<double>()[p * dk / 2 + i] = std::cos(p * std::pow(1e4, -2.0 * i / dk));
        sines.ptr<double>()[p * dk / 2 + i] = std::sin(p * std::pow(1e4, -2.0 * i / dk));
      }
    }
    set_weights();
    const std::vector<double> X = g(32, 1, 1), G = g(32, 12, 1);
    std::copy(X.begin(), X.end(), x.ptr<double>());
    std::copy(G.begin(), G.end(), dy.ptr<double>());

    Pass pass;
    pass.queries = T;
    pass.statistics = true;
    block.forward(pass, x, out);
    pass.statistics = false;
    LossScale scale;
    scale.global_tokens = T;
    block.backward(pass, scale, x, dy);
    compare(want, block.moe()->router_statistics(), out, dy, G);
  }

  void compare(const Expected& want, const RouterStatistics& router, const Tensor& out, const Tensor& dx,
               const std::vector<double>& G) {
    double lb = 0;
    for (int e = 0; e < E; ++e) {
      lb += 0.01 * E / (T * k) * router.counts.ptr<double>()[e] * router.prob_sum.ptr<double>()[e] / T;
    }
    const double z = 0.001 / (T * k) * router.sums.ptr<double>()[kRouterLseSquares];
    double loss = lb + z;
    for (int i = 0; i < T * d; ++i) loss += G[i] * out.ptr<double>()[i];
    EXPECT_EQ(values_of(router.counts), (std::vector<double>{1, 2, 4, 1}));
    near(loss, want.loss, "loss");
    near(lb, want.lb, "lb");
    near(z, want.z, "z");
    near(norm_of(values_of(dx)), want.dx, "dX");
    near(gradient("layers.0.qkv.weight"), want.dwqkv, "dWqkv");
    near(gradient("layers.0.attn_out.weight"), want.dwo, "dWo");
    near(gradient("layers.0.q_norm.gain"), want.dgq, "dgq");
    near(gradient("layers.0.k_norm.gain"), want.dgk, "dgk");
    near(gradient("layers.0.v_norm.gain"), want.dgv, "dgv");
    near(gradient("layers.0.ffn_norm.gain"), want.dgf, "dgF");
    near(gradient("layers.0.attn_norm.gain"), want.dga, "dgA");
    near(gradient("layers.0.router.weight"), want.dwr, "dWr");
    near(gradient("layers.0.experts.down.weight"), want.dw2, "dW2");
    const std::vector<double> dgu = values_of(store.gradient(store.find("layers.0.experts.gate_up.weight")));
    double gate = 0, up = 0;
    for (int i = 0; i < 2 * 96; ++i) (i % (2 * F * d) < F * d ? gate : up) += dgu[i] * dgu[i];
    near(std::sqrt(gate), want.dw1, "dW1");
    near(std::sqrt(up), want.dv1, "dV1");
    for (int i = 0; i < 3; ++i) near(out.ptr<double>()[3 * d + i], want.out[i], "out[3]");
  }

  // The numbers have 9 significant digits.
  static void near(double got, double want, const char* what) {
    EXPECT_NEAR(got, want, std::max(2e-9, 6e-9 * std::abs(want))) << what;
  }
  void set(const std::string& name, const std::vector<double>& values) {
    const ParameterStore::Id id = store.find(name);
    if (id < 0) return;  // not every placement has every norm
    ASSERT_EQ(store.weight(id).elements(), static_cast<std::int64_t>(values.size())) << name;
    std::copy(values.begin(), values.end(), store.weight(id).ptr<double>());
  }
  double gradient(const std::string& name) {
    const ParameterStore::Id id = store.find(name);
    return id < 0 ? 0 : norm_of(values_of(store.gradient(id)));
  }
  // [rows, cols] -> [cols, rows]: the numbers were made with an output-major W_o.
  static std::vector<double> transposed(const std::vector<double>& a, int rows, int cols) {
    std::vector<double> b(a.size());
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < cols; ++j) b[j * rows + i] = a[i * cols + j];
    }
    return b;
  }
  static std::vector<double> interleaved(const std::vector<double>& gate, const std::vector<double>& up) {
    std::vector<double> both;
    for (int e = 0; e < E; ++e) {
      both.insert(both.end(), gate.begin() + e * F * d, gate.begin() + (e + 1) * F * d);
      both.insert(both.end(), up.begin() + e * F * d, up.begin() + (e + 1) * F * d);
    }
    return both;
  }

  ParameterStore store;
};

TEST_F(BlockNumbers, Hybrid) {
  run("HYBRID", {0.896229229229,
                 .011060584018,
                 .001141238418,
                 4.31748329,
                 9.56079213,
                 5.28633134,
                 .499044244,
                 .519947785,
                 .632852083,
                 2.50442274,
                 0,
                 .759852512,
                 1.17760487,
                 1.3058724,
                 .909979978,
                 {1.427176290, 1.070667606, -1.132586705}});
}

TEST_F(BlockNumbers, HybridStarFirstBlock) {
  run("HYBRID_STAR", {-0.087896382256,
                      .011892104999,
                      .001182327034,
                      4.92016472,
                      12.9650952,
                      6.67135636,
                      .400128278,
                      .336783206,
                      1.09016739,
                      1.01263503,
                      2.74187487,
                      .791354488,
                      1.17194748,
                      1.22759284,
                      1.10941763,
                      {.879712731, 1.063377767, -1.150746275}});
}

TEST_F(BlockNumbers, Pre) {
  run("PRE", {0.666750579174,
              .012826469164,
              .001457737913,
              3.57955772,
              4.05647427,
              4.01652726,
              0,
              0,
              0,
              1.29522033,
              1.06814594,
              .532476518,
              .896601152,
              1.93700583,
              .949813939,
              {.817903519, .468646337, -.699806202}});
}

}  // namespace
}  // namespace hybridmoe
