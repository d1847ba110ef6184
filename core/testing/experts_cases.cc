// Sorting slots by expert, moving rows and scalars between the orders, and SwiGLU.
#include <algorithm>

#include "core/testing/families.h"

namespace hybridmoe::testing {
namespace {

// Choices of n tokens among E experts; some slots are dropped (-1), some experts chosen by nobody.
struct Routing {
  std::string name;
  std::int64_t n, k, experts;
  double dropped = 0;             // share of the slots
  std::int64_t popular = 0;       // only the first `popular` experts are chosen; 0: all
  std::vector<double> topk = {};  // [n · k]
  std::int64_t slots = 0;         // S

  Routing(std::string routing_name, std::int64_t tokens, std::int64_t choices, std::int64_t all_experts,
          double dropped_share = 0, std::int64_t popular_experts = 0)
      : name(std::move(routing_name)),
        n(tokens),
        k(choices),
        experts(all_experts),
        dropped(dropped_share),
        popular(popular_experts > 0 ? popular_experts : all_experts) {
    const Random random(1, "routing/" + name);
    for (std::int64_t i = 0; i < n * k; ++i) {
      const bool keep = random.uniform(2 * i) >= dropped;
      topk.push_back(keep ? static_cast<double>(random.below(2 * i + 1, popular)) : -1.0);
      slots += keep;
    }
  }
};

SortSlots sort_of(const TensorSet& t) {
  return {.topk = t["topk"],
          .offsets = t["offsets"],
          .slot_source = t["slot_source"],
          .token_slots = t["token_slots"]};
}

OperatorCase sort_slots(const Routing& r) {
  OperatorCase c("sort_slots/" + r.name);
  c.input("topk", kI32, {r.n, r.k}, values(r.topk));
  c.output("offsets", kI64, {r.experts + 1});
  c.output("slot_source", kI32, {r.n * r.k}).define_first(r.slots);
  c.output("token_slots", kI32, {r.n, r.k});
  c.run = [](Backend& b, const TensorSet& t) { b.sort_slots(sort_of(t), b.main_stream()); };
  return c;
}

// The sorted routing as inputs of another operator.
void add_routing(const Routing& r, OperatorCase& c) {
  c.input("topk", kI32, {r.n, r.k}, values(r.topk)).touch(0);
  c.scratch("offsets", kI64, {r.experts + 1});
  c.derived("slot_source", kI32, {r.n * r.k});
  c.derived("token_slots", kI32, {r.n, r.k});
  c.prepare = [](Backend& b, const TensorSet& t) { b.sort_slots(sort_of(t), b.main_stream()); };
}

OperatorCase gather_rows(const Routing& r, std::int64_t d, std::int64_t gap = 0) {
  OperatorCase c("gather_rows/" + r.name);
  add_routing(r, c);
  c.input("x", kC, {r.n, d}, normal()).gap(gap);
  c.output("y", kC, {r.slots, d});
  c.run = [r](Backend& b, const TensorSet& t) {
    b.gather_rows({.x = t["x"],
                   .slot_source = t["slot_source"].flat(0, r.slots),
                   .k = static_cast<std::int32_t>(r.k),
                   .y = t["y"]},
                  b.main_stream());
  };
  return c;
}

OperatorCase combine_rows(const Routing& r, std::int64_t d, bool weights, bool residual, bool in_place) {
  OperatorCase c(cat("combine_rows/", r.name, weights ? "_weights" : "", residual ? "_residual" : "",
                     in_place ? "_in_place" : ""));
  add_routing(r, c);
  c.input("rows", kC, {r.slots, d}, normal());
  if (weights) c.input("weights", kS, {r.n, r.k}, normal());
  if (residual) c.input("residual", kC, {r.n, d}, normal());
  c.output("y", kC, {r.n, d}).alias_of(in_place ? "residual" : "").error(static_cast<double>(r.k + 1));
  c.run = [](Backend& b, const TensorSet& t) {
    b.combine_rows({.rows = t["rows"],
                    .token_slots = t["token_slots"],
                    .weights = t["weights"],
                    .residual = t["residual"],
                    .y = t["y"]},
                   b.main_stream());
  };
  c.flops = 2.0 * r.slots * d;
  return c;
}

OperatorCase gather_scalars(const Routing& r) {
  OperatorCase c("gather_scalars/" + r.name);
  add_routing(r, c);
  c.input("source", kS, {r.n, r.k}, normal());
  c.output("target", kS, {r.slots});
  c.run = [r](Backend& b, const TensorSet& t) {
    b.gather_scalars(
        {.source = t["source"], .slot_source = t["slot_source"].flat(0, r.slots), .target = t["target"]},
        b.main_stream());
  };
  return c;
}

OperatorCase scatter_scalars(const Routing& r) {
  OperatorCase c("scatter_scalars/" + r.name);
  add_routing(r, c);
  c.input("source", kS, {r.slots}, normal());
  c.output("target", kS, {r.n, r.k});
  c.run = [](Backend& b, const TensorSet& t) {
    b.scatter_scalars({.source = t["source"], .token_slots = t["token_slots"], .target = t["target"]},
                      b.main_stream());
  };
  return c;
}

struct SwigluShape {
  std::string name;
  std::int64_t n, hidden;
  bool weight = true;
  bool in_place = false;  // dgate_up is gate_up, a is da
  double spread = 1;
};

OperatorCase swiglu_forward(const SwigluShape& s) {
  OperatorCase c("swiglu_forward/" + s.name);
  c.input("gate_up", kC, {s.n, 2 * s.hidden}, normal(s.spread));
  c.output("a", kC, {s.n, s.hidden});
  c.run = [](Backend& b, const TensorSet& t) {
    b.swiglu_forward({.gate_up = t["gate_up"], .a = t["a"]}, b.main_stream());
  };
  c.flops = 5.0 * s.n * s.hidden;
  return c;
}

OperatorCase swiglu_backward(const SwigluShape& s) {
  OperatorCase c("swiglu_backward/" + s.name);
  c.input("gate_up", kC, {s.n, 2 * s.hidden}, normal(s.spread));
  c.input("da", kC, {s.n, s.hidden}, normal());
  c.output("dgate_up", kC, {s.n, 2 * s.hidden}).alias_of(s.in_place ? "gate_up" : "");
  if (s.weight) {
    c.input("weight", kS, {s.n}, normal(0.3, 0.5));
    c.output("dweight", kS, {s.n}).error(static_cast<double>(s.hidden));
    c.output("a", kC, {s.n, s.hidden}).alias_of(s.in_place ? "da" : "");
  }
  c.scratch("activation", kC, {s.n, s.hidden});
  c.prepare = [](Backend& b, const TensorSet& t) {
    b.swiglu_forward({.gate_up = t["gate_up"], .a = t["activation"]}, b.main_stream());
  };
  c.run = [](Backend& b, const TensorSet& t) {
    b.swiglu_backward({.gate_up = t["gate_up"],
                       .da = t["da"],
                       .weight = t["weight"],
                       .dgate_up = t["dgate_up"],
                       .a = t["a"],
                       .dweight = t["dweight"]},
                      b.main_stream());
  };
  c.loss = [s](const TensorSet& t) {
    double loss = 0;
    for (std::int64_t i = 0; i < s.n * s.hidden; ++i) {
      const double weight = s.weight ? t.get("weight", i / s.hidden) : 1.0;
      loss += weight * t.get("da", i) * t.get("activation", i);
    }
    return loss;
  };
  c.gradients = {{"gate_up", "dgate_up"}};
  if (s.weight) c.gradients.push_back({"weight", "dweight"});
  c.flops = 12.0 * s.n * s.hidden;
  return c;
}

}  // namespace

void add_experts(Cases& cases) {
  for (const Routing& r : {Routing("17x2_of_5", 17, 2, 5), Routing("one_token", 1, 3, 4),
                           Routing("no_tokens", 0, 2, 4), Routing("dropped", 33, 3, 7, 0.3),
                           Routing("all_dropped", 6, 2, 3, 1.1), Routing("two_popular", 40, 2, 9, 0, 2)}) {
    cases.push_back(sort_slots(r));
    cases.push_back(gather_rows(r, 13));
    cases.push_back(combine_rows(r, 13, true, true, false));
    cases.push_back(gather_scalars(r));
    cases.push_back(scatter_scalars(r));
  }
  cases.push_back(sort_slots(Routing("700x8_of_64", 700, 8, 64)));
  const Routing r("dropped", 33, 3, 7, 0.3);
  cases.push_back(gather_rows(Routing("strided", 9, 2, 3), 32, 16));
  cases.push_back(combine_rows(r, 40, true, true, true));
  cases.push_back(combine_rows(r, 8, false, true, true));
  cases.push_back(combine_rows(r, 21, false, false, false));
  cases.push_back(combine_rows(r, 64, true, false, false));

  for (const SwigluShape& s :
       {SwigluShape{"13x7", 13, 7}, SwigluShape{"one_row", 1, 48}, SwigluShape{"no_rows", 0, 8},
        SwigluShape{"no_weight", 5, 33, false}, SwigluShape{"extreme_gates", 4, 20, true, false, 60}}) {
    cases.push_back(swiglu_forward(s));
    cases.push_back(swiglu_backward(s));
  }
  cases.push_back(swiglu_backward({"in_place", 11, 96, true, true}));
  cases.push_back(swiglu_backward({"in_place_no_weight", 6, 24, false, true}));
}

void add_experts(const BenchmarkSize& z, Cases& cases) {
  const Routing r("route", z.tokens(), z.top_k, z.experts);
  cases.push_back(sort_slots(r));
  cases.push_back(gather_rows(r, z.d));
  cases.push_back(combine_rows(r, z.d, true, true, false));
  cases.push_back(gather_scalars(r));
  cases.push_back(scatter_scalars(r));
  cases.push_back(swiglu_forward({"experts", r.slots, z.hidden}));
  cases.push_back(swiglu_backward({"experts", r.slots, z.hidden}));
}

}  // namespace hybridmoe::testing
