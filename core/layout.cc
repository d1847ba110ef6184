#include "core/layout.h"

#include <algorithm>
#include <tuple>

#include "core/error.h"

namespace hybridmoe {
namespace {

// Ascending; {1} for a `whole` that is not there.
std::vector<int> divisors_of(std::int64_t whole) {
  std::vector<int> small, large;
  whole = std::max<std::int64_t>(whole, 1);
  for (std::int64_t i = 1; i * i <= whole; ++i) {
    if (whole % i != 0) continue;
    small.push_back(static_cast<int>(i));
    if (i != whole / i) large.push_back(static_cast<int>(whole / i));
  }
  small.insert(small.end(), large.rbegin(), large.rend());
  return small;
}

// The factor between the layouts and the number of sizes that differ. Equal quotients of integers are equal
// doubles, so that ties are seen as ties.
std::pair<double, int> distance(const Layout& a, const Layout& b) {
  double above = 1, below = 1;
  int changes = 0;
  for (const auto& [x, y] : {std::pair{a.tensor, b.tensor}, std::pair{a.expert, b.expert},
                             std::pair{a.expert_tensor, b.expert_tensor}}) {
    above *= std::max({x, y, 1});
    below *= std::max(std::min(x, y), 1);
    changes += x != y;
  }
  return {above / below, changes};
}

}  // namespace

std::vector<std::string> layout_violations(const Layout& layout, const LayoutDemands& demands) {
  std::vector<std::string> reasons;
  const auto at_least = [&](int lowest, const char* name, int value) {
    if (value < lowest) reasons.push_back(cat(name, " ", value, " must be at least ", lowest));
  };
  at_least(0, "the world of", layout.world);
  at_least(1, "tensor size", layout.tensor);
  at_least(1, "expert size", layout.expert);
  at_least(1, "expert-tensor size", layout.expert_tensor);
  if (!reasons.empty()) return reasons;  // nothing can be divided

  // 0, for a size that the model or the world does not have, is divided by everything.
  const auto divides = [&](const char* name, std::int64_t divisor, const char* what, std::int64_t value) {
    if (value % divisor != 0) reasons.push_back(cat(name, " ", divisor, " must divide ", what, " ", value));
  };
  const int t = layout.tensor, et = layout.expert_tensor;
  const std::int64_t g = demands.kv_heads, experts_over = std::int64_t{layout.expert} * et;
  divides("tensor size", t, "the number of ranks", layout.world);
  divides("tensor size", t, "the heads", demands.heads);
  if (g > 0 && g % t != 0 && t % g != 0) {
    reasons.push_back(
        cat("tensor size ", t, " must divide the key/value heads ", g, " or be a multiple of them"));
  }
  divides("tensor size", t, "the sequence length", demands.sequence_length);
  divides("tensor size", t, "the dense hidden size", demands.dense_hidden);
  divides("tensor size", t, "the shared experts' hidden size", demands.shared_hidden);
  divides("expert-tensor size", et, "the expert hidden size", demands.expert_hidden);
  divides("expert size times expert-tensor size", experts_over, "the number of ranks", layout.world);
  divides("expert size", layout.expert, "the number of experts", demands.experts);
  if (layout.world > 0 && layout.world % t == 0) {
    divides("the number of data-parallel ranks", layout.world / t, "the sequences of a micro-batch",
            demands.micro_batch_sequences);
  }
  return reasons;
}

std::vector<Layout> nearest_layouts(const Layout& layout, const LayoutDemands& demands, int count) {
  const bool known = layout.world > 0;
  const std::vector<int> tensors = divisors_of(known ? layout.world : demands.heads);
  const std::vector<int> experts = divisors_of(known ? layout.world : demands.experts);
  const std::vector<int> shards = divisors_of(known ? layout.world : demands.expert_hidden);
  using Candidate = std::tuple<std::pair<double, int>, int, int, int>;  // distance, T, ET, E
  std::vector<Candidate> legal;
  for (const int t : tensors) {
    if (!layout_violations({.world = layout.world, .tensor = t}, demands).empty()) continue;
    for (const int e : experts) {
      for (const int et : shards) {
        const Layout other{layout.world, t, e, et};
        if (layout_violations(other, demands).empty()) legal.emplace_back(distance(layout, other), t, et, e);
      }
    }
  }
  std::sort(legal.begin(), legal.end());
  std::vector<Layout> nearest;
  for (const auto& [_, t, et, e] : legal) {
    if (std::ssize(nearest) == count) break;
    nearest.push_back({layout.world, t, e, et});
  }
  return nearest;
}

std::string configuration_text(const Layout& layout) {
  std::string sizes;
  for (const auto& [name, size] : {std::pair{"tensor", layout.tensor}, std::pair{"expert", layout.expert},
                                   std::pair{"expert_tensor", layout.expert_tensor}}) {
    if (size != 1) sizes += cat(name, ": ", size, " ");
  }
  return sizes.empty() ? "parallel {}" : "parallel { " + sizes + "}";
}

}  // namespace hybridmoe
