#include "tools/log_why.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "tools/log_text.h"

namespace hybridmoe {
namespace {

using WhyJson = nlohmann::ordered_json;

std::string steps_text(std::int64_t first, std::int64_t last) {
  return first == last ? cat(first) : cat(first, "-", last);
}

void print_evidence(const std::vector<Evidence>& evidence, std::ostream& out) {
  using Align = text::Table::Align;
  text::Table table(
      {{"evidence", Align::Left}, {"where", Align::Left}, {"step"}, {"value"}, {"usual"}, {"times"}, {"z"}});
  for (const Evidence& row : evidence) {
    const bool ratio = row.usual > 0 && std::isfinite(row.value);
    table.add({row.what, row.where, cat(row.step), text::number(row.value), text::number(row.usual),
               ratio ? text::format("%.3g", row.value / row.usual) : "-",
               std::isnan(row.score) ? "-" : text::format("%.1f", row.score)});
  }
  if (!table.empty()) table.print(out << '\n');
}

void print_incidents(const Explanation& explanation, std::ostream& out) {
  constexpr std::size_t kShown = 10;
  const std::vector<Incident>& incidents = explanation.incidents;
  out << "\nsteps " << explanation.first_step << " to " << explanation.last_step << ": "
      << text::plural(static_cast<std::int64_t>(incidents.size()), "incident")
      << text::format("; spike scores of the gradient norm: olmo2 %.3g %%, olmo_core %.3g %%\n",
                      100 * explanation.olmo2_score, 100 * explanation.olmo_core_score);
  using Align = text::Table::Align;
  text::Table table(
      {{"  steps", Align::Left}, {"kind", Align::Left}, {"metric", Align::Left}, {"peak"}, {"usual"}});
  for (std::size_t i = 0; i < incidents.size() && i < kShown; ++i) {
    const Incident& incident = incidents[i];
    table.add({"  " + steps_text(incident.first_step, incident.last_step), name_of(incident.kind),
               incident.metric, text::number(incident.peak), text::number(incident.baseline)});
  }
  if (!table.empty()) table.print(out);
  if (incidents.size() > kShown)
    out << "  and " << incidents.size() - kShown << " more (--json names them all; --step N explains one)\n";
}

}  // namespace

void print_explanation(const Explanation& explanation, std::ostream& out) {
  const Attribution& result = explanation.attribution;
  const bool calm = result.cause == Attribution::Cause::None;
  out << text::coloured(result.sentence, calm ? text::Colour::Green : text::Colour::Red) << '\n';
  print_evidence(result.evidence, out);
  if (!result.missing.empty()) {
    out << "\nnot in this log:";
    for (const std::string& name : result.missing) out << ' ' << name;
    out << '\n';
  }
  print_incidents(explanation, out);
}

void print_explanation_json(const Explanation& explanation, std::ostream& out) {
  const Attribution& result = explanation.attribution;
  WhyJson json = {{"sentence", result.sentence},
                  {"cause", name_of(result.cause)},
                  {"incident", name_of(result.incident.kind)},
                  {"step", result.step},
                  {"layer", result.layer},
                  {"layer_label", result.layer_label},
                  {"kind", result.kind},
                  {"expert", result.expert},
                  {"rank", result.rank},
                  {"steps_before_loss", result.lead < 0 ? WhyJson() : WhyJson(result.lead)},
                  {"samples_begin", result.samples_begin},
                  {"samples_end", result.samples_end},
                  {"evidence", WhyJson::array()},
                  {"missing", result.missing},
                  {"olmo2_score", explanation.olmo2_score},
                  {"olmo_core_score", explanation.olmo_core_score},
                  {"incidents", WhyJson::array()}};
  for (const Evidence& row : result.evidence) {
    json["evidence"].push_back({{"what", row.what},
                                {"where", row.where},
                                {"step", row.step},
                                {"value", row.value},
                                {"usual", row.usual},
                                {"z", row.score}});
  }
  for (const Incident& incident : explanation.incidents) {
    json["incidents"].push_back({{"kind", name_of(incident.kind)},
                                 {"first_step", incident.first_step},
                                 {"last_step", incident.last_step},
                                 {"metric", incident.metric},
                                 {"peak", incident.peak},
                                 {"usual", incident.baseline}});
  }
  out << json.dump(2) << '\n';
}

}  // namespace hybridmoe
