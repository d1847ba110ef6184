// The gradient table, the step's scalars and AdamW.
#include <algorithm>
#include <cmath>
#include <memory>

#include "core/testing/families.h"

namespace hybridmoe::testing {
namespace {

using Segments = std::vector<Segment>;

std::int64_t rows_of(const Segments& segments) {
  std::int64_t rows = 0;
  for (const Segment& segment : segments) rows = std::max<std::int64_t>(rows, segment.row + 1);
  return rows;
}

// Some elements belong to no segment; a row may have several, one is empty.
Segments small_segments() {
  return {{0, 5, 1, true}, {5, 40, 0, false}, {44, 44, 2, true}, {50, 97, 1, true}};
}

OperatorCase grad_table(const std::string& name, std::int64_t m, const Segments& list, bool absmax,
                        bool finite) {
  OperatorCase c("grad_table/" + name);
  const auto segments = std::make_shared<const Segments>(list);
  c.input("grad", kS, {m}, [finite](const Random& random, std::int64_t i) -> double {
    if (!finite && i % 11 == 3) return i % 2 == 0 ? INFINITY : NAN;
    return random.normal(i);
  });
  c.accumulate("table", kF64, {rows_of(list), kGradColumns}).error(static_cast<double>(m));
  if (absmax) c.accumulate("absmax", kF64, {rows_of(list)}, constant(0.5));
  c.run = [segments](Backend& b, const TensorSet& t) {
    b.grad_table({.grad = t["grad"], .segments = segments.get(), .table = t["table"], .absmax = t["absmax"]},
                 b.main_stream());
  };
  c.flops = 2.0 * m;
  return c;
}

OperatorCase step_scalars(const std::string& name, double max_norm, std::int64_t applied, double nonfinite) {
  OperatorCase c("step_scalars/" + name);
  c.input("table", kF64, {3, kGradColumns}, [=](const Random& random, std::int64_t i) {
    return i % kGradColumns == kGradSquares ? 1 + random.uniform(i) : (i == kGradNonfinite ? nonfinite : 0.0);
  });
  c.output("scalars", kF64, {kStepScalars});
  c.run = [=](Backend& b, const TensorSet& t) {
    b.step_scalars({.table = t["table"],
                    .max_norm = max_norm,
                    .learning_rate = 0.02,
                    .applied_steps = applied,
                    .scalars = t["scalars"]},
                   b.main_stream());
  };
  return c;
}

OperatorCase adamw(const std::string& name, std::int64_t m, const Segments& list, double skip, bool table) {
  OperatorCase c("adamw/" + name);
  const auto segments = std::make_shared<const Segments>(list);
  // The weight starts as the rounded master, whose memory it shares where the types are equal.
  const Fill start = [](const Random&, std::int64_t i) { return std::sin(static_cast<double>(i)); };
  c.input("grad", kS, {m}, normal(0.1));
  c.input("scalars", kF64, {kStepScalars}, values({2.5, 0.4, skip, 0.05, 0.3, 0.14}));
  c.accumulate("master", kS, {m}, start);
  c.accumulate("weight", kC, {m}, start).alias_of("master").touch(0.5);  // only written
  c.accumulate("m", kS, {m}, normal(0.1));
  c.accumulate("v", kS, {m}, [](const Random& random, std::int64_t i) { return 0.02 * random.uniform(i); });
  if (table) c.accumulate("table", kF64, {rows_of(list), kUpdateColumns}).error(static_cast<double>(m));
  c.run = [segments](Backend& b, const TensorSet& t) {
    b.adamw({.grad = t["grad"],
             .master = t["master"],
             .weight = t["weight"],
             .m = t["m"],
             .v = t["v"],
             .segments = segments.get(),
             .scalars = t["scalars"],
             .table = t["table"]},
            b.main_stream());
  };
  c.flops = 15.0 * m;
  return c;
}

}  // namespace

void add_optimizer(Cases& cases) {
  const Segments small = small_segments();
  cases.push_back(grad_table("segments", 100, small, true, true));
  cases.push_back(grad_table("nonfinite", 100, small, true, false));
  cases.push_back(grad_table("no_absmax", 5000, {{0, 5000, 0, true}}, false, true));
  cases.push_back(grad_table("nothing", 8, {{3, 3, 0, true}}, true, true));
  cases.push_back(step_scalars("clipped", 1.0, 0, 0));
  cases.push_back(step_scalars("not_clipped", 100.0, 7, 0));
  cases.push_back(step_scalars("no_clipping", 0.0, 1000, 0));
  cases.push_back(step_scalars("nonfinite", 1.0, 3, 2));
  cases.push_back(adamw("segments", 100, small, 0, true));
  cases.push_back(adamw("skipped", 100, small, 1, true));
  cases.push_back(adamw("no_table", 3001, {{0, 3001, 0, true}}, 0, false));
}

void add_optimizer(const BenchmarkSize& z, Cases& cases) {
  // The expert weights of one layer, or as many of them as no cache holds.
  const std::int64_t m = std::min<std::int64_t>(z.experts * 3 * z.d * z.hidden, 1 << 22);
  const Segments one{{0, m, 0, true}};
  cases.push_back(grad_table("experts", m, one, true, true));
  cases.push_back(adamw("experts", m, one, 0, true));
}

}  // namespace hybridmoe::testing
