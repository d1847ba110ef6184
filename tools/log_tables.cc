#include "tools/log_tables.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/telemetry/log_files.h"
#include "tools/log_text.h"

namespace hybridmoe {
namespace {

using TableJson = nlohmann::ordered_json;
using TextAlign = text::Table::Align;

void print_dead(const RouterReport& report, std::ostream& out) {
  text::Table table({{"layer", TextAlign::Left}, {"expert"}, {"no token since step"}, {"steps"}});
  for (const RouterReport::Layer& layer : report.layers) {
    for (const RouterReport::DeadExpert& dead : layer.dead)
      table.add({layer.label, cat(dead.expert), cat(dead.since), cat(report.newest_step - dead.since + 1)});
  }
  if (table.empty()) {
    out << "no dead expert: none was without a token for the last " << kDeadExpertSteps << " steps\n";
  } else {
    table.print(out);
  }
}

TableJson state_json(const RouterState& state) {
  return {{"tokens", state.tokens},
          {"max_violation", state.max_violation},
          {"entropy_share", state.entropy_share},
          {"gini", state.gini},
          {"idle_experts", state.idle},
          {"busiest_expert", state.busiest}};
}

}  // namespace

void print_routers(const RouterReport& report, bool only_dead, std::ostream& out) {
  if (report.layers.empty() || report.steps == 0) {
    out << "no router: this log has no expert loads\n";
    return;
  }
  if (only_dead) return print_dead(report, out);
  out << text::plural(static_cast<std::int64_t>(report.layers.size()), "MoE layer") << " of "
      << text::plural(report.experts, "expert") << ", " << text::plural(report.steps, "step") << ", newest "
      << report.newest_step << "\n\n";
  text::Table table({{"layer", TextAlign::Left},
                     {"MaxVio"},
                     {"largest"},
                     {"at step"},
                     {"entropy/ln E"},
                     {"Gini"},
                     {"idle"},
                     {"dead"},
                     {"dropped"},
                     {"MaxVio over time", TextAlign::Left}});
  for (const RouterReport::Layer& layer : report.layers) {
    table.add({layer.label, text::format("%.3f", layer.newest.max_violation),
               text::format("%.3f", layer.largest_violation), cat(layer.largest_step),
               text::format("%.4f", layer.newest.entropy_share), text::format("%.3f", layer.newest.gini),
               cat(layer.newest.idle), cat(layer.dead.size()), text::number(layer.dropped),
               text::sparkline(layer.violation, 40)});
  }
  table.print(out);
  for (const RouterReport::Layer& layer : report.layers) {
    if (layer.collapsed_since > 0)
      out << text::coloured(cat(layer.label, " has collapsed: load entropy below ", kLeastLoadEntropy,
                                " ln E since step ", layer.collapsed_since, "\n"),
                            text::Colour::Red);
  }
  out << '\n';
  print_dead(report, out);
}

void print_routers_json(const RouterReport& report, std::ostream& out) {
  TableJson json = {{"steps", report.steps},
                    {"newest_step", report.newest_step},
                    {"experts", report.experts},
                    {"layers", TableJson::array()}};
  for (const RouterReport::Layer& layer : report.layers) {
    TableJson entry = {
        {"label", layer.label},
        {"layer", layer.layer},
        {"newest", state_json(layer.newest)},
        {"total", state_json(layer.total)},
        {"largest_max_violation", layer.largest_violation},
        {"largest_step", layer.largest_step},
        {"dropped", layer.dropped},
        {"collapsed_since", layer.collapsed_since > 0 ? TableJson(layer.collapsed_since) : TableJson()},
        {"dead", TableJson::array()},
        {"max_violation_over_time", layer.violation},
        {"entropy_share_over_time", layer.entropy_share}};
    for (const RouterReport::DeadExpert& dead : layer.dead)
      entry["dead"].push_back({{"expert", dead.expert}, {"since", dead.since}});
    json["layers"].push_back(entry);
  }
  out << json.dump(2) << '\n';
}

void print_comparison(const Comparison& comparison, std::ostream& out) {
  out << comparison.metric << (comparison.unit.empty() ? "" : " [" + comparison.unit + "]") << ": "
      << comparison.definition << "\n\n";
  std::vector<text::Table::Column> columns = {{"", TextAlign::Left}};
  for (const Comparison::Column& column : comparison.columns)
    columns.push_back({cat(run_name(column.run), "@", column.step)});
  text::Table table(columns);
  for (std::size_t row = 0; row < comparison.rows.size(); ++row) {
    std::vector<std::string> cells = {comparison.rows[row]};
    for (const Comparison::Column& column : comparison.columns)
      cells.push_back(text::number(column.values[row]));
    table.add(cells);
  }
  if (comparison.rows.size() > 2) {
    std::vector<std::string> cells = {"shape"};
    for (const Comparison::Column& column : comparison.columns)
      cells.push_back(text::sparkline(column.values, 16));
    table.add(cells);
  }
  table.print(out);
}

void print_comparison_json(const Comparison& comparison, std::ostream& out) {
  TableJson json = {{"metric", comparison.metric},
                    {"unit", comparison.unit},
                    {"definition", comparison.definition},
                    {"rows", comparison.rows},
                    {"columns", TableJson::array()}};
  for (const Comparison::Column& column : comparison.columns)
    json["columns"].push_back({{"run", column.run}, {"step", column.step}, {"values", column.values}});
  out << json.dump(2) << '\n';
}

}  // namespace hybridmoe
