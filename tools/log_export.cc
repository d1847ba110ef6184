#include "tools/log_export.h"

#include <cmath>
#include <cstdio>
#include <google/protobuf/text_format.h>
#include <map>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/telemetry/metrics.h"
#include "core/telemetry/rank_log.h"

namespace hybridmoe {
namespace {

using Json = nlohmann::ordered_json;

// The header that the exported metrics are looked up in.
RunHeader newest_header(const std::string& directory) {
  RunHeader header;
  require(read_newest_header(list_log_segments(directory), &header), directory,
          ": no run header can be read");
  return header;
}

std::string known_names(const RunHeader& header) {
  std::string names;
  for (const MetricDefinition& metric : header.metric()) names += " " + metric.name();
  return names;
}

// The metrics to export. Throws Error when one is unknown.
std::vector<MetricDefinition> choose(const RunHeader& header, const LogExport& what, bool dense_by_default) {
  std::vector<MetricDefinition> chosen;
  const bool all =
      what.metrics == std::vector<std::string>{"all"} || (what.metrics.empty() && dense_by_default);
  for (const MetricDefinition& metric : header.metric()) {
    if (all || (what.metrics.empty() && metric.storage() == MetricDefinition::SCALAR))
      chosen.push_back(metric);
  }
  if (all) return chosen;
  for (const std::string& name : what.metrics) {
    const MetricDefinition* metric = find_metric(header, name);
    require(metric != nullptr, "--metric ", name, ": this log has no such metric; it has all,",
            known_names(header));
    chosen.push_back(*metric);
  }
  return chosen;
}

// The elements of the chosen metrics at a step, looked up by name in the header of the step's own attempt. An
// entry is empty when the step does not have the metric in this size.
std::vector<std::vector<double>> elements_of(const LogEntry& entry, const RunHeader& newest,
                                             const std::vector<MetricDefinition>& metrics) {
  std::vector<std::vector<double>> elements;
  for (const MetricDefinition& metric : metrics) {
    const MetricDefinition* own = find_metric(entry.header, metric.name());
    if (own == nullptr || metric_size(entry.header, *own) != metric_size(newest, metric)) {
      elements.emplace_back();
    } else {
      elements.push_back(metric_elements(entry.header, *own, entry.record.step()));
    }
  }
  return elements;
}

bool is_orphan(const LogReader& reader, const LogEntry& entry, std::int64_t step) {
  return step >= reader.superseded_from(entry.segment.attempt);
}

// Enough digits to read the same number back; integers without a fraction.
std::string number(double value) {
  if (std::isnan(value)) return "nan";
  char text[40];
  std::snprintf(text, sizeof text, "%.9g", value);
  if (std::strtod(text, nullptr) != value) std::snprintf(text, sizeof text, "%.17g", value);
  return text;
}

// JSON has no numbers for these.
Json json_number(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  return value;
}

// Of a dense metric every element was measured.
bool is_missing(const MetricDefinition& metric, double value) {
  return metric.storage() == MetricDefinition::SCALAR && !was_measured(value);
}

Json values_json(const google::protobuf::RepeatedPtrField<NamedValue>& values) {
  Json json = Json::object();
  for (const NamedValue& value : values) json[value.name()] = json_number(value.value());
  return json;
}

Json header_json(const RunHeader& header, const std::vector<MetricDefinition>& metrics) {
  std::string config;
  google::protobuf::TextFormat::PrintToString(header.config(), &config);
  Json json = {{"run_id", header.run_id()},
               {"attempt", header.attempt()},
               {"resume_step", header.resume_step()},
               {"wall_time", header.wall_time()},
               {"code_version", header.code_version()},
               {"config", config},
               {"hosts", std::vector<std::string>(header.host().begin(), header.host().end())},
               {"metrics", Json::array()}};
  const LayoutRecord& layout = header.layout();
  json["layout"] = {{"world", layout.world()},
                    {"data", layout.data()},
                    {"tensor", layout.tensor()},
                    {"expert", layout.expert()},
                    {"threads", layout.threads()}};
  for (const MetricDefinition& metric : metrics) {
    Json entry = {{"name", metric.name()},
                  {"unit", metric.unit()},
                  {"definition", metric.definition()},
                  {"reduction", MetricDefinition::Reduction_Name(metric.reduction())}};
    if (metric.storage() != MetricDefinition::SCALAR) entry["elements"] = element_labels(header, metric);
    json["metrics"].push_back(entry);
  }
  return json;
}

Json event_json(int attempt, const EventRecord& event) {
  Json json = {{"kind", EventRecord::Kind_Name(event.kind())},
               {"step", event.step()},
               {"attempt", attempt},
               {"wall_time", event.wall_time()},
               {"message", event.message()}};
  if (event.value_size() > 0) json["values"] = values_json(event.value());
  return json;
}

Json rank_sample_json(const RankSample& sample) {
  Json json = {{"step", sample.step()}, {"wall_time", sample.wall_time()}};
  if (sample.has_unfinished()) json["unfinished"] = sample.unfinished();
  if (sample.value_size() > 0) json["values"] = values_json(sample.value());
  return json;
}

// Damage is an error as the mode says, as in the log itself.
Json rank_log_json(const RankLog& log, ReadMode mode) {
  for (const LogProblem& problem : log.problems) {
    const bool bearable = mode == ReadMode::SkipCorrupt || (mode == ReadMode::TolerateTail && problem.tail);
    require(bearable, problem.str());
  }
  Json json = {{"attempt", log.attempt}, {"rank", log.rank}, {"metrics", Json::array()}};
  for (const MetricDefinition& metric : log.header.metric()) {
    json["metrics"].push_back(
        {{"name", metric.name()}, {"unit", metric.unit()}, {"definition", metric.definition()}});
  }
  json["parts"] = Json::array();
  for (const RankLog::Part& part : log.parts) {
    Json samples = Json::array();
    for (const RankSample& sample : part.samples) samples.push_back(rank_sample_json(sample));
    json["parts"].push_back({{"why", event_json(log.attempt, part.why)}, {"samples", samples}});
  }
  return json;
}

}  // namespace

void export_csv(const std::string& directory, const LogReadOptions& read, const LogExport& what,
                std::ostream& out) {
  LogReader reader(directory, read);
  const RunHeader header = newest_header(directory);
  const std::vector<MetricDefinition> metrics = choose(header, what, false);
  out << "step,attempt,wall_time";
  for (const MetricDefinition& metric : metrics) {
    for (const std::string& label : element_labels(header, metric)) {
      out << ',' << metric.name() << (label.empty() ? "" : "/") << label;
    }
  }
  out << '\n';
  reader.poll([&](const LogEntry& entry) {
    if (!entry.record.has_step()) return;
    const StepRecord& step = entry.record.step();
    if (!what.orphans && is_orphan(reader, entry, step.step())) return;
    char time[40];
    std::snprintf(time, sizeof time, "%.3f", step.wall_time());
    out << step.step() << ',' << entry.segment.attempt << ',' << time;
    const std::vector<std::vector<double>> elements = elements_of(entry, header, metrics);
    for (std::size_t i = 0; i < metrics.size(); ++i) {
      for (const double value : elements[i])
        out << ',' << (is_missing(metrics[i], value) ? std::string() : number(value));
      if (elements[i].empty())
        out << std::string(static_cast<std::size_t>(metric_size(header, metrics[i])), ',');
    }
    out << '\n';
  });
}

void export_json(const std::string& directory, const LogReadOptions& read, const LogExport& what,
                 std::ostream& out) {
  LogReader reader(directory, read);
  const RunHeader header = newest_header(directory);
  const std::vector<MetricDefinition> metrics = choose(header, what, true);
  out << "{\"header\":" << header_json(header, metrics).dump() << ",\n\"steps\":[";
  std::vector<Json> events;
  const char* separator = "\n";
  reader.poll([&](const LogEntry& entry) {
    if (entry.record.has_event()) {
      const EventRecord& event = entry.record.event();
      if (!what.orphans && is_orphan(reader, entry, event.step())) return;
      events.push_back(event_json(entry.segment.attempt, event));
    }
    if (!entry.record.has_step()) return;
    const StepRecord& step = entry.record.step();
    if (!what.orphans && is_orphan(reader, entry, step.step())) return;
    Json json = {{"step", step.step()}, {"attempt", entry.segment.attempt}, {"wall_time", step.wall_time()}};
    const std::vector<std::vector<double>> elements = elements_of(entry, header, metrics);
    for (std::size_t i = 0; i < metrics.size(); ++i) {
      if (elements[i].empty()) continue;
      Json& target = json[metrics[i].name()];
      if (metrics[i].storage() == MetricDefinition::SCALAR) {
        const double value = elements[i].front();
        target = is_missing(metrics[i], value) ? Json() : json_number(value);
      } else {
        for (const double value : elements[i]) target.push_back(json_number(value));
      }
    }
    out << separator << json.dump();
    separator = ",\n";
  });
  out << "],\n\"events\":[";
  separator = "\n";
  for (const Json& event : events) {
    out << separator << event.dump();
    separator = ",\n";
  }
  out << "],\n\"rank_logs\":[";
  separator = "\n";
  for (const RankLog& log : read_rank_logs(directory)) {
    out << separator << rank_log_json(log, read.mode).dump();
    separator = ",\n";
  }
  out << "]}\n";
}

}  // namespace hybridmoe
