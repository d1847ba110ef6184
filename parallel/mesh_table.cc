#include "parallel/mesh_table.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "core/error.h"

namespace hybridmoe {
namespace {

constexpr int kMostRows = 16, kFirstRows = 8;

struct Column {
  std::string title;
  std::function<std::string(int rank)> cell;
};

// Part `part` of `total` things split into so many parts: "4-7", or "4" when it is one thing.
std::string range_text(std::int64_t part, std::int64_t parts, std::int64_t total) {
  const std::int64_t begin = part * total / parts, end = (part + 1) * total / parts;
  if (begin == end) return "none";
  return end - begin == 1 ? cat(begin) : cat(begin, "-", end - 1);
}

// More tensor ranks than key/value heads: several hold the same head.
std::string key_value_text(std::int64_t t, std::int64_t tensor, std::int64_t heads) {
  return heads < tensor ? cat(t * heads / tensor) : range_text(t, tensor, heads);
}

std::vector<Column> columns_of(const Mesh& mesh, const LayoutDemands& demands, const Hosts& hosts) {
  const auto [world, tensor, expert, expert_tensor] = mesh.layout();
  std::vector<Column> columns = {{"rank", [](int r) { return cat(r); }},
                                 {"host", [&](int r) { return hosts.name_of(r); }},
                                 {"tensor", [&](int r) { return cat(mesh.tensor_rank(r)); }}};
  const auto split = [&](const char* title, std::int64_t total, int parts, auto part_of) {
    if (total == 0) return;
    columns.push_back({title, [=](int r) { return range_text(part_of(r), parts, total); }});
  };
  const auto tensor_rank = [&mesh](int r) { return mesh.tensor_rank(r); };
  split("heads", demands.heads, tensor, tensor_rank);
  if (demands.kv_heads > 0) {
    columns.push_back({"kv heads", [&mesh, t = tensor, heads = demands.kv_heads](int r) {
                         return key_value_text(mesh.tensor_rank(r), t, heads);
                       }});
  }
  split("vocabulary", demands.padded_vocabulary, tensor, tensor_rank);
  split("dense hidden", demands.dense_hidden, tensor, tensor_rank);
  split("shared hidden", demands.shared_hidden, tensor, tensor_rank);
  columns.push_back({"data", [&mesh](int r) { return cat(mesh.data_rank(r)); }});
  split("sequences", demands.micro_batch_sequences, world / tensor,
        [&mesh](int r) { return mesh.data_rank(r); });
  split("experts", demands.experts, expert, [&mesh](int r) { return mesh.expert_rank(r); });
  split("expert hidden", demands.expert_hidden, expert_tensor,
        [&mesh](int r) { return mesh.expert_tensor_rank(r); });
  return columns;
}

std::string summary(const Mesh& mesh, const Hosts& hosts) {
  const auto [world, tensor, expert, expert_tensor] = mesh.layout();
  const auto many = [](int count, const char* what) { return cat(count, " ", what, count == 1 ? "" : "s"); };
  return cat(many(world, "rank"), " on ", many(hosts.count(), "host"), ": tensor ", tensor, " x data ",
             world / tensor, "; expert ", expert, " x expert-tensor ", expert_tensor, " x replicas ",
             world / (expert * expert_tensor), "\n");
}

}  // namespace

std::string describe(const Mesh& mesh, const LayoutDemands& demands, const Hosts& hosts) {
  const int world = mesh.layout().world, rows = world > kMostRows ? kFirstRows : world;
  const std::vector<Column> columns = columns_of(mesh, demands, hosts);
  std::vector<std::string> lines(rows + 1);
  for (std::size_t c = 0; c < columns.size(); ++c) {
    std::vector<std::string> cells = {columns[c].title};
    for (int r = 0; r < rows; ++r) cells.push_back(columns[c].cell(r));
    std::size_t width = 0;
    for (const std::string& cell : cells) width = std::max(width, cell.size());
    for (int i = 0; i <= rows; ++i) {
      if (c > 0) lines[i] += "  ";
      lines[i] += cells[i];
      if (c + 1 < columns.size()) lines[i].append(width - cells[i].size(), ' ');
    }
  }
  std::string table = summary(mesh, hosts);
  for (const std::string& line : lines) table += line + "\n";
  if (rows < world) table += cat("... and ", world - rows, " more ranks\n");
  return table;
}

}  // namespace hybridmoe
