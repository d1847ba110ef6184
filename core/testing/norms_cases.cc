// RMSNorm on the residual stream and on the heads, with and without RoPE.
#include <cmath>

#include "core/testing/families.h"

namespace hybridmoe::testing {
namespace {

constexpr double kNormEps = 1e-5;

struct NormShape {
  std::string name;
  std::int64_t n, d;
  bool branch = true;      // forward: x + branch; backward: + skip
  std::string alias = {};  // of sum (x) in the forward pass, of dsum (dy or skip) in the backward pass
  double scale = 1;
};

OperatorCase residual_norm_forward(const NormShape& s) {
  OperatorCase c("residual_norm_forward/" + s.name);
  c.input("x", kC, {s.n, s.d}, normal(s.scale));
  if (s.branch) {
    c.input("branch", kC, {s.n, s.d}, normal(s.scale));
    c.output("sum", kC, {s.n, s.d}).alias_of(s.alias);
  }
  c.input("gain", kC, {s.d}, normal(0.3, 1));
  c.output("y", kC, {s.n, s.d}).error(1, s.branch ? 1 : 0);
  c.output("rstd", kS, {s.n}).error(static_cast<double>(s.d), s.branch ? 1 : 0);
  c.run = [](Backend& b, const TensorSet& t) {
    b.residual_norm_forward({.x = t["x"],
                             .branch = t["branch"],
                             .gain = t["gain"],
                             .eps = kNormEps,
                             .sum = t["sum"],
                             .y = t["y"],
                             .rstd = t["rstd"]},
                            b.main_stream());
  };
  c.flops = 4.0 * s.n * s.d;
  return c;
}

OperatorCase residual_norm_backward(const NormShape& s) {
  OperatorCase c("residual_norm_backward/" + s.name);
  c.input("dy", kC, {s.n, s.d}, normal());
  c.input("sum", kC, {s.n, s.d}, normal(s.scale));
  c.input("gain", kC, {s.d}, normal(0.3, 1));
  if (s.branch) c.input("skip", kC, {s.n, s.d}, normal());
  c.derived("rstd", kS, {s.n});
  c.output("dsum", kC, {s.n, s.d}).alias_of(s.alias).error(static_cast<double>(s.d));
  c.accumulate("dgain", kS, {s.d}).error(static_cast<double>(s.n + 1));
  c.scratch("y", kC, {s.n, s.d});
  c.run = [](Backend& b, const TensorSet& t) {
    b.residual_norm_backward({.dy = t["dy"],
                              .sum = t["sum"],
                              .rstd = t["rstd"],
                              .gain = t["gain"],
                              .skip = t["skip"],
                              .dsum = t["dsum"],
                              .dgain = t["dgain"]},
                             b.main_stream());
  };
  c.prepare = [](Backend& b, const TensorSet& t) {
    b.residual_norm_forward(
        {.x = t["sum"], .gain = t["gain"], .eps = kNormEps, .y = t["y"], .rstd = t["rstd"]}, b.main_stream());
  };
  c.loss = [s](const TensorSet& t) {
    const double skipped = s.branch ? projection(t, "skip", "sum", s.n * s.d) : 0;
    return projection(t, "dy", "y", s.n * s.d) + skipped;
  };
  c.gradients = {{"sum", "dsum"}, {"gain", "dgain"}};
  c.flops = 8.0 * s.n * s.d;
  return c;
}

OperatorCase residual_statistics(const std::string& name, std::int64_t n, std::int64_t d, bool absmax,
                                 double scale = 1) {
  OperatorCase c("residual_statistics/" + name);
  c.input("x", kC, {n, d}, normal(scale)).gap(3);
  // A quantity of its own size would not see what small values add.
  c.accumulate("squares", kF64, {1}, constant(scale * scale)).error(static_cast<double>(n * d));
  if (absmax) c.accumulate("absmax", kF64, {1}, constant(scale));
  c.run = [](Backend& b, const TensorSet& t) {
    b.residual_statistics({.x = t["x"], .squares = t["squares"], .absmax = t["absmax"]}, b.main_stream());
  };
  c.flops = 2.0 * n * d;
  return c;
}

struct HeadNormShape {
  std::string name;
  std::int64_t n;
  std::int32_t heads, head_dim;
  HeadNormKind norm = HeadNormKind::PerHead;
  bool rope = true;
  std::int64_t first_position = 0, period = 1;
  std::int64_t gap = 0;
  bool in_place = false;  // forward without a norm: y is x; backward: dx is dy

  std::int64_t width() const { return std::int64_t{heads} * head_dim; }
  std::int64_t positions() const { return first_position + period; }
};

// Everything of the forward call but y.
void add_head_norm_inputs(const HeadNormShape& s, OperatorCase& c) {
  c.input("x", kC, {s.n, s.width()}, normal()).gap(s.gap);
  if (s.norm == HeadNormKind::PerHead) c.input("gain", kC, {s.head_dim}, normal(0.3, 1));
  if (s.norm == HeadNormKind::FullWidth) {
    c.input("gain", kC, {s.width()}, normal(0.3, 1));
    c.derived("sumsq", kS, {s.n});
  }
  if (!s.rope) return;
  const auto table = [half = s.head_dim / 2](bool sine) -> Fill {
    return [=](const Random&, std::int64_t i) {
      const double angle =
          static_cast<double>(i / half) * std::pow(1e4, -static_cast<double>(i % half) / half);
      return sine ? std::sin(angle) : std::cos(angle);
    };
  };
  c.input("cos", kS, {s.positions(), s.head_dim / 2}, table(false));
  c.input("sin", kS, {s.positions(), s.head_dim / 2}, table(true));
}

Shape rstd_shape(const HeadNormShape& s) {
  return s.norm == HeadNormKind::FullWidth ? Shape{s.n} : Shape{s.n, s.heads};
}

HeadNormRopeForward forward_of(const HeadNormShape& s, const TensorSet& t) {
  return {.x = t["x"],
          .heads = s.heads,
          .head_dim = s.head_dim,
          .norm = s.norm,
          .gain = t["gain"],
          .eps = kNormEps,
          .sumsq = t["sumsq"],
          .full_width = s.norm == HeadNormKind::FullWidth ? s.width() : 0,
          .rope_cos = t["cos"],
          .rope_sin = t["sin"],
          .first_position = s.first_position,
          .period = s.period,
          .y = t["y"],
          .rstd = t["rstd"]};
}

void sum_squares(Backend& b, const TensorSet& t) {
  if (!t["sumsq"].empty()) b.head_norm_statistics({.x = t["x"], .sumsq = t["sumsq"]}, b.main_stream());
}

OperatorCase head_norm_rope_forward(const HeadNormShape& s) {
  OperatorCase c("head_norm_rope_forward/" + s.name);
  add_head_norm_inputs(s, c);
  c.output("y", kC, {s.n, s.width()}).gap(s.gap).alias_of(s.in_place ? "x" : "");
  if (s.norm != HeadNormKind::None) {
    c.output("rstd", kS, rstd_shape(s)).error(static_cast<double>(s.head_dim));
  }
  c.prepare = sum_squares;
  c.run = [s](Backend& b, const TensorSet& t) {
    b.head_norm_rope_forward(forward_of(s, t), b.main_stream());
  };
  c.flops = 7.0 * s.n * s.width();
  return c;
}

OperatorCase head_norm_statistics(const HeadNormShape& s) {
  OperatorCase c("head_norm_statistics/" + s.name);
  c.input("x", kC, {s.n, s.width()}, normal()).gap(s.gap);
  c.output("sumsq", kS, {s.n}).error(static_cast<double>(s.width()));
  c.run = [](Backend& b, const TensorSet& t) {
    b.head_norm_statistics({.x = t["x"], .sumsq = t["sumsq"]}, b.main_stream());
  };
  c.flops = 2.0 * s.n * s.width();
  return c;
}

// For FullWidth, the statistics and the backward pass that needs them, one after the other.
OperatorCase head_norm_rope_backward(const HeadNormShape& s) {
  OperatorCase c("head_norm_rope_backward/" + s.name);
  const bool full = s.norm == HeadNormKind::FullWidth;
  const auto width = static_cast<double>(full ? s.width() : s.head_dim);
  add_head_norm_inputs(s, c);
  c.input("dy", kC, {s.n, s.width()}, normal()).gap(s.gap);
  if (s.norm != HeadNormKind::None) {
    c.derived("rstd", kS, rstd_shape(s));
    c.accumulate("dgain", kS, {full ? s.width() : s.head_dim}).error(static_cast<double>(s.n * s.heads + 1));
  }
  if (full) c.output("dot", kS, {s.n}).error(width);
  c.output("dx", kC, {s.n, s.width()}).gap(s.gap).alias_of(s.in_place ? "dy" : "").error(width);
  c.scratch("y", kC, {s.n, s.width()});
  c.prepare = [s](Backend& b, const TensorSet& t) {
    sum_squares(b, t);
    b.head_norm_rope_forward(forward_of(s, t), b.main_stream());
  };
  c.run = [s](Backend& b, const TensorSet& t) {
    HeadNormRopeForward forward = forward_of(s, t);
    forward.y = {};  // is not kept
    if (!t["dot"].empty()) {
      b.head_norm_backward_statistics({.forward = forward, .dy = t["dy"], .dot = t["dot"]}, b.main_stream());
    }
    b.head_norm_rope_backward(
        {.forward = forward, .dy = t["dy"], .dot = t["dot"], .dx = t["dx"], .dgain = t["dgain"]},
        b.main_stream());
  };
  c.loss = [s](const TensorSet& t) { return projection(t, "dy", "y", s.n * s.width()); };
  c.gradients = {{"x", "dx"}};
  if (s.norm != HeadNormKind::None) c.gradients.push_back({"gain", "dgain"});
  c.flops = 12.0 * s.n * s.width();
  return c;
}

void add_heads(const HeadNormShape& s, Cases& cases) {
  cases.push_back(head_norm_rope_forward(s));
  cases.push_back(head_norm_rope_backward(s));
  if (s.norm == HeadNormKind::FullWidth) cases.push_back(head_norm_statistics(s));
}

}  // namespace

void add_norms(Cases& cases) {
  cases.push_back(residual_norm_forward({"13x37", 13, 37}));
  cases.push_back(residual_norm_forward({"one_row", 1, 64}));
  cases.push_back(residual_norm_forward({"no_rows", 0, 16}));
  cases.push_back(residual_norm_forward({"no_branch", 5, 48, false}));
  cases.push_back(residual_norm_forward({"sum_is_x", 17, 130, true, "x"}));
  cases.push_back(residual_norm_forward({"small_values", 4, 32, true, "", 1e-3}));
  cases.push_back(residual_norm_backward({"13x37", 13, 37}));
  cases.push_back(residual_norm_backward({"one_row", 1, 64}));
  cases.push_back(residual_norm_backward({"no_rows", 0, 16}));
  cases.push_back(residual_norm_backward({"no_skip", 5, 48, false}));
  cases.push_back(residual_norm_backward({"dsum_is_dy", 17, 130, true, "dy"}));
  cases.push_back(residual_norm_backward({"dsum_is_skip", 300, 24, true, "skip"}));
  cases.push_back(residual_norm_backward({"small_values", 4, 32, true, "", 1e-3}));

  cases.push_back(residual_statistics("13x37", 13, 37, true));
  cases.push_back(residual_statistics("many_rows", 700, 40, true));
  cases.push_back(residual_statistics("no_absmax", 5, 16, false));
  cases.push_back(residual_statistics("no_rows", 0, 8, true));
  cases.push_back(residual_statistics("squares_below_fp32", 40, 24, true, 1e-25));

  constexpr HeadNormKind kNone = HeadNormKind::None, kPerHead = HeadNormKind::PerHead,
                         kFull = HeadNormKind::FullWidth;
  add_heads({"per_head_rope", 10, 3, 8, kPerHead, true, 0, 5}, cases);
  add_heads({"per_head_strided", 7, 2, 16, kPerHead, true, 0, 7, 32}, cases);
  add_heads({"per_head_no_rope", 9, 2, 6, kPerHead, false}, cases);
  add_heads({"per_head_generating", 2, 4, 32, kPerHead, true, 11, 1}, cases);
  add_heads({"per_head_many_tokens", 150, 6, 64, kPerHead, true, 0, 50}, cases);
  add_heads({"per_head_of_odd_halves", 70, 2, 70, kPerHead, true, 0, 35}, cases);
  add_heads({"full_width_of_odd_halves", 21, 6, 70, kFull, true, 0, 7}, cases);
  add_heads({"full_width_rope", 8, 3, 10, kFull, true, 0, 4}, cases);
  add_heads({"full_width_strided", 5, 2, 16, kFull, true, 2, 5, 16}, cases);
  add_heads({"full_width_no_rope", 3, 5, 4, kFull, false}, cases);
  add_heads({"rope_only", 8, 2, 12, kNone, true, 0, 8}, cases);
  add_heads({"rope_only_in_place_strided", 6, 3, 8, kNone, true, 1, 3, 40, true}, cases);
  add_heads({"nothing", 4, 2, 8, kNone, false, 0, 1, 4}, cases);
  add_heads({"no_rows", 0, 2, 8, kPerHead, true, 0, 4}, cases);
  HeadNormShape in_place{"per_head_dx_is_dy", 6, 2, 64, kPerHead, true, 0, 3, 64, true};
  cases.push_back(head_norm_rope_backward(in_place));
  in_place.name = "full_width_dx_is_dy", in_place.norm = kFull;
  cases.push_back(head_norm_rope_backward(in_place));
}

void add_norms(const BenchmarkSize& z, Cases& cases) {
  cases.push_back(residual_norm_forward({"residual", z.tokens(), z.d}));
  cases.push_back(residual_norm_backward({"residual", z.tokens(), z.d}));
  cases.push_back(residual_statistics("stream", z.tokens(), z.d, true));
  const std::int64_t gap = 2 * z.kv_heads * z.head_dim;  // q within rows of qkv
  add_heads({"q_per_head_rope", z.tokens(), z.heads, z.head_dim, HeadNormKind::PerHead, true, 0,
             z.sequence_length, gap},
            cases);
}

}  // namespace hybridmoe::testing
