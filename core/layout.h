// How many ways each part of a model is split, and which splits are possible: arithmetic on numbers alone.
// Which rank is where is in parallel/mesh.h.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hybridmoe {

struct Layout {
  int world = 1;          // ranks; 0: not known yet
  int tensor = 1;         // T: ranks that split dense matrices, heads and sequences
  int expert = 1;         // E: ranks (or groups of ET ranks) that split the set of experts
  int expert_tensor = 1;  // ET: ranks that split every expert

  bool operator==(const Layout&) const = default;
};

// What a layout splits; 0: the model has none of it.
struct LayoutDemands {
  std::int64_t heads = 0, kv_heads = 0, sequence_length = 0;
  std::int64_t dense_hidden = 0, shared_hidden = 0;  // of all shared experts of a layer together
  std::int64_t experts = 0, expert_hidden = 0;
  std::int64_t micro_batch_sequences = 0;
  std::int64_t padded_vocabulary = 0;  // split over the tensor ranks as evenly as it goes: no rule
};

// Every reason why the layout is impossible, in words with the numbers; empty: legal. A world of 0 leaves out
// the rules that need the number of ranks.
std::vector<std::string> layout_violations(const Layout& layout, const LayoutDemands& demands = {});

// Up to `count` legal layouts of the same world, nearest first. The distance of two layouts is the factor by
// which their sizes differ, the sizes' factors multiplied: max(T/T', T'/T) * max(E/E', E'/E) * max(ET/ET',
// ET'/ET). Of equally near ones the one that changes fewer sizes comes first, then the smaller tensor size,
// then the smaller expert-tensor size. For a world of 0: sizes that divide what they split.
std::vector<Layout> nearest_layouts(const Layout& layout, const LayoutDemands& demands, int count);

// As a configuration says it, sizes of 1 left out: "parallel { tensor: 2 expert: 4 }".
std::string configuration_text(const Layout& layout);

}  // namespace hybridmoe
