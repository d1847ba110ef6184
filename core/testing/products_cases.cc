// Products with weights, plain and grouped, in both layouts.
#include <cmath>
#include <limits>
#include <numeric>

#include "core/testing/families.h"

namespace hybridmoe::testing {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct LinearShape {
  std::string name;
  std::int64_t n, in, out;
  WeightLayout layout = WeightLayout::OutputMajor;
  bool accumulate = false;
  std::int64_t gap = 0;                   // between the rows of x, y and their gradients
  std::vector<std::int64_t> groups = {};  // rows of each expert; their sum may be less than n

  bool grouped() const { return !groups.empty(); }
  std::int64_t used_rows() const {
    return grouped() ? std::accumulate(groups.begin(), groups.end(), std::int64_t{0}) : n;
  }
  Shape weight() const {
    const std::int64_t rows = layout == WeightLayout::OutputMajor ? out : in;
    const std::int64_t columns = layout == WeightLayout::OutputMajor ? in : out;
    if (grouped()) return {static_cast<std::int64_t>(groups.size()), rows, columns};
    return {rows, columns};
  }
  double flops() const { return 2.0 * used_rows() * in * out; }
};

// Random rows; those behind the last group hold NaN, which no product may read.
Fill rows_of(const LinearShape& s, std::int64_t width) {
  return [limit = s.used_rows() * width](const Random& random, std::int64_t i) {
    return i < limit ? random.normal(i) : kNaN;
  };
}

void add_offsets(const LinearShape& s, OperatorCase& c) {
  if (!s.grouped()) return;
  std::vector<double> offsets{0};
  for (const std::int64_t rows : s.groups) offsets.push_back(offsets.back() + rows);
  c.input("offsets", kI64, {static_cast<std::int64_t>(offsets.size())}, values(offsets));
}

LinearForward forward_of(const LinearShape& s, const TensorSet& t, bool accumulate) {
  return {.x = t["x"],
          .weight = t["weight"],
          .y = t["y"],
          .layout = s.layout,
          .accumulate = accumulate,
          .offsets = t["offsets"]};
}

// y after a forward pass from x and weight, and its projection on dy: the function that the gradients belong
// to.
void add_linear_loss(const LinearShape& s, OperatorCase& c) {
  c.scratch("y", kC, {s.n, s.out});
  c.prepare = [s](Backend& b, const TensorSet& t) {
    b.linear_forward(forward_of(s, t, false), b.main_stream());
  };
  c.loss = [s](const TensorSet& t) { return projection(t, "dy", "y", s.used_rows() * s.out); };
}

OperatorCase linear_forward(const LinearShape& s) {
  OperatorCase c("linear_forward/" + s.name);
  c.input("x", kC, {s.n, s.in}, rows_of(s, s.in)).gap(s.gap);
  c.input("weight", kC, s.weight(), normal(1 / std::sqrt(s.in)));
  add_offsets(s, c);
  Operand& y = s.accumulate ? c.accumulate("y", kC, {s.n, s.out}) : c.output("y", kC, {s.n, s.out});
  y.gap(s.gap).error(static_cast<double>(s.in));
  c.run = [s](Backend& b, const TensorSet& t) {
    b.linear_forward(forward_of(s, t, s.accumulate), b.main_stream());
  };
  c.flops = s.flops();
  return c;
}

// Partial logits: operands in the compute type, the sum in the statistics type.
OperatorCase linear_logits(const LinearShape& s) {
  OperatorCase c = linear_forward(s);
  c.name = "linear_forward/" + s.name;
  c.operands.back().type = kS;
  return c;
}

OperatorCase linear_backward_input(const LinearShape& s) {
  OperatorCase c("linear_backward_input/" + s.name);
  c.input("dy", kC, {s.n, s.out}, rows_of(s, s.out)).gap(s.gap);
  c.input("weight", kC, s.weight(), normal(1 / std::sqrt(s.in)));
  c.input("x", kC, {s.n, s.in}, rows_of(s, s.in)).touch(0);
  add_offsets(s, c);
  Operand& dx = s.accumulate ? c.accumulate("dx", kC, {s.n, s.in}) : c.output("dx", kC, {s.n, s.in});
  dx.gap(s.gap).error(static_cast<double>(s.out));
  c.run = [s](Backend& b, const TensorSet& t) {
    b.linear_backward_input({.dy = t["dy"],
                             .weight = t["weight"],
                             .dx = t["dx"],
                             .layout = s.layout,
                             .accumulate = s.accumulate,
                             .offsets = t["offsets"]},
                            b.main_stream());
  };
  c.flops = s.flops();
  add_linear_loss(s, c);
  if (s.used_rows() == s.n) c.gradients = {{"x", "dx"}};
  return c;
}

OperatorCase linear_backward_weight(const LinearShape& s) {
  OperatorCase c("linear_backward_weight/" + s.name);
  c.input("x", kC, {s.n, s.in}, rows_of(s, s.in)).gap(s.gap);
  c.input("dy", kC, {s.n, s.out}, rows_of(s, s.out)).gap(s.gap);
  c.input("weight", kC, s.weight(), normal(1 / std::sqrt(s.in))).touch(0);
  add_offsets(s, c);
  c.accumulate("dweight", kS, s.weight()).error(static_cast<double>(s.used_rows() + 1));
  c.run = [s](Backend& b, const TensorSet& t) {
    b.linear_backward_weight(
        {.x = t["x"], .dy = t["dy"], .dweight = t["dweight"], .layout = s.layout, .offsets = t["offsets"]},
        b.main_stream());
  };
  c.flops = s.flops();
  add_linear_loss(s, c);
  c.gradients = {{"weight", "dweight"}};
  return c;
}

void add_linear(const LinearShape& s, Cases& cases) {
  cases.push_back(linear_forward(s));
  cases.push_back(linear_backward_input(s));
  if (!s.accumulate) cases.push_back(linear_backward_weight(s));  // always accumulates
}

OperatorCase add_case(const std::string& name, std::int64_t n, std::int64_t d, const std::string& alias) {
  OperatorCase c("add/" + name);
  c.input("a", kC, {n, d}, normal());
  c.input("b", kC, {n, d}, normal());
  c.output("y", kC, {n, d}).alias_of(alias);
  c.run = [](Backend& b, const TensorSet& t) { b.add(t["a"], t["b"], t["y"], b.main_stream()); };
  c.flops = static_cast<double>(n * d);
  return c;
}

OperatorCase convert_case(const std::string& name, ElementType from, ElementType to, std::int64_t gap) {
  OperatorCase c("convert/" + name);
  c.input("source", from, {13, 37}, normal()).gap(gap);
  c.output("target", to, {13, 37}).gap(gap);
  c.run = [](Backend& b, const TensorSet& t) { b.convert(t["source"], t["target"], b.main_stream()); };
  return c;
}

OperatorCase zero_case(const std::string& name, ElementType type, const Shape& shape, std::int64_t gap) {
  OperatorCase c("zero/" + name);
  c.output("target", type, shape).gap(gap);
  c.run = [](Backend& b, const TensorSet& t) { b.zero(t["target"], b.main_stream()); };
  return c;
}

}  // namespace

void add_products(Cases& cases) {
  constexpr WeightLayout kOut = WeightLayout::OutputMajor, kIn = WeightLayout::InputMajor;
  for (const WeightLayout layout : {kOut, kIn}) {
    const std::string major = layout == kOut ? "output_major" : "input_major";
    add_linear({major + "_33x7x5", 33, 7, 5, layout}, cases);
    add_linear({major + "_1x64x17", 1, 64, 17, layout}, cases);
    add_linear({major + "_no_rows", 0, 8, 8, layout}, cases);
    add_linear({major + "_strided", 19, 16, 24, layout, false, 8}, cases);
    add_linear({major + "_accumulate", 9, 31, 33, layout, true, 3}, cases);
    add_linear({major + "_experts", 23, 12, 10, layout, false, 0, {5, 0, 17, 1, 0}}, cases);
    add_linear({major + "_experts_accumulate", 23, 12, 10, layout, true, 0, {5, 0, 17, 1, 0}}, cases);
    add_linear({major + "_experts_spare_rows", 40, 16, 32, layout, false, 0, {0, 9, 16}}, cases);
    add_linear({major + "_across_tiles", 200, 72, 136, layout, false, 8}, cases);
    add_linear({major + "_experts_across_tiles", 200, 72, 136, layout, false, 0, {70, 0, 129}}, cases);
    add_linear({major + "_experts_all_empty", 6, 8, 8, layout, false, 0, {0, 0}}, cases);
  }
  cases.push_back(linear_logits({"logits_accumulate", 11, 40, 6, kOut, true}));
  cases.push_back(linear_forward({"large_130x257x129", 130, 257, 129, kOut}));

  cases.push_back(add_case("13x37", 13, 37, ""));
  cases.push_back(add_case("y_is_a", 13, 37, "a"));
  cases.push_back(add_case("y_is_b", 5, 3, "b"));
  cases.push_back(add_case("no_rows", 0, 4, ""));
  cases.push_back(convert_case("f64_to_compute", kF64, kC, 0));
  cases.push_back(convert_case("compute_to_f64_strided", kC, kF64, 5));
  cases.push_back(convert_case("statistics_to_compute", kS, kC, 0));
  cases.push_back(convert_case("compute_to_statistics_strided", kC, kS, 3));
  cases.push_back(zero_case("compute", kC, {7, 9}, 0));
  cases.push_back(zero_case("strided", kS, {7, 9}, 3));
  cases.push_back(zero_case("f64_vector", kF64, {11}, 0));
  cases.push_back(zero_case("i64_vector", kI64, {5}, 0));
}

std::vector<OperatorCase> tile_edge_cases() {
  constexpr WeightLayout kOut = WeightLayout::OutputMajor, kIn = WeightLayout::InputMajor;
  Cases cases;
  const std::vector<std::int64_t> groups = {0, 1, 127, 128, 129, 300, 0};
  for (const WeightLayout layout : {kOut, kIn}) {
    const std::string major = layout == kOut ? "output_major" : "input_major";
    // Three rows of no group; n and k of 256 and 64, 8 less and 8 more.
    add_linear({major + "_tiles_72x264", 688, 72, 264, layout, false, 8, groups}, cases);
    add_linear({major + "_tiles_248x56", 685, 248, 56, layout, false, 0, groups}, cases);
    add_linear({major + "_tiles_64x256_accumulate", 688, 64, 256, layout, true, 8, groups}, cases);
    // No vectors of c can be written.
    cases.push_back(linear_forward({major + "_tiles_16x257", 140, 16, 257, layout, false, 0, {3, 130}}));
  }
  cases.push_back(linear_logits({"tiles_logits_accumulate", 70, 72, 265, kOut, true}));
  cases.push_back(linear_logits({"tiles_logits", 130, 200, 264, kOut, false}));
  return cases;
}

void add_products(const BenchmarkSize& z, Cases& cases) {
  constexpr WeightLayout kOut = WeightLayout::OutputMajor, kIn = WeightLayout::InputMajor;
  const std::int64_t qkv = (z.heads + 2 * z.kv_heads) * z.head_dim;
  add_linear({"qkv", z.tokens(), z.d, qkv, kOut}, cases);
  add_linear({"attention_out", z.tokens(), z.heads * z.head_dim, z.d, kIn}, cases);
  // Expert loads between half and one and a half times the mean, as a trained router leaves them.
  const std::int64_t slots = z.tokens() * z.top_k, mean = slots / z.experts;
  std::vector<std::int64_t> groups;
  for (std::int64_t e = 0; e < z.experts; ++e) groups.push_back(mean / 2 + mean * e / z.experts);
  const LinearShape expert{"", slots, z.d, 2 * z.hidden, kOut, false, 0, groups};
  LinearShape up = expert, down = expert;
  up.name = "experts_gate_up";
  down.name = "experts_down", down.in = z.hidden, down.out = z.d, down.layout = kIn;
  add_linear(up, cases);
  add_linear(down, cases);
  cases.push_back(add_case("residual", z.tokens(), z.d, ""));
}

}  // namespace hybridmoe::testing
