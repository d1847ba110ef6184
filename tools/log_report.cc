#include "tools/log_report.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <google/protobuf/text_format.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/telemetry/explain.h"
#include "core/telemetry/log_files.h"
#include "tools/log_summary.h"
#include "tools/report_data.h"
#include "tools/report_page.h"

namespace hybridmoe {
namespace {

using ReportJson = nlohmann::ordered_json;

constexpr std::size_t kMostMeans = 4000;
constexpr std::size_t kMostEvents = 2000, kExplained = 5;
static_assert(std::endian::native == std::endian::little, "the page reads little-endian arrays");

template <class T>
std::string base64(const std::vector<T>& values) {
  static const char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  const std::size_t count = values.size() * sizeof(T);
  std::string text;
  text.reserve((count + 2) / 3 * 4);
  for (std::size_t i = 0; i < count; i += 3) {
    const std::uint32_t word =
        bytes[i] << 16 | (i + 1 < count ? bytes[i + 1] << 8 : 0) | (i + 2 < count ? bytes[i + 2] : 0);
    text += kDigits[word >> 18];
    text += kDigits[word >> 12 & 63];
    text += i + 1 < count ? kDigits[word >> 6 & 63] : '=';
    text += i + 2 < count ? kDigits[word & 63] : '=';
  }
  return text;
}

// Magnitudes on a logarithmic scale in 16 bits: 0 is zero, 65535 missing, 65534 not finite; q of 1 to 65000
// is exp(lowest + (q - 1) / 64999 (highest - lowest)). Signs are lost; every dense metric is a norm, a
// maximum or a count.
ReportJson packed(const std::vector<float>& values) {
  double lowest = INFINITY, highest = -INFINITY;
  for (const float value : values) {
    if (!std::isfinite(value) || value == 0) continue;
    lowest = std::min(lowest, std::log(std::fabs(static_cast<double>(value))));
    highest = std::max(highest, std::log(std::fabs(static_cast<double>(value))));
  }
  if (!(lowest <= highest)) lowest = highest = 0;
  const double scale = highest > lowest ? 64999 / (highest - lowest) : 0;
  std::vector<std::uint16_t> codes;
  codes.reserve(values.size());
  for (const float value : values) {
    if (std::isnan(value)) {
      codes.push_back(65535);
    } else if (std::isinf(value)) {
      codes.push_back(65534);
    } else if (value == 0) {
      codes.push_back(0);
    } else {
      codes.push_back(static_cast<std::uint16_t>(
          1.5 + (std::log(std::fabs(static_cast<double>(value))) - lowest) * scale));
    }
  }
  return {{"lowest", lowest}, {"highest", highest}, {"data", base64(codes)}};
}

ReportJson dense_json(const DenseColumns& columns) {
  ReportJson rows = ReportJson::array();
  for (const MetricAxis::Entry& entry : columns.rows)
    rows.push_back({entry.label(), entry.layer(), entry.kind()});
  ReportJson json = {{"rows", rows}, {"columns", columns.columns}, {"values", packed(columns.values)}};
  if (!columns.second.empty()) json["second"] = columns.second;
  return json;
}

// Means of so many neighbours each, of those that are finite.
std::vector<float> means_of(const std::vector<double>& column, std::size_t stride) {
  if (stride == 1) return {column.begin(), column.end()};
  std::vector<float> means;
  for (std::size_t begin = 0; begin < column.size(); begin += stride) {
    double sum = 0;
    int count = 0;
    for (std::size_t i = begin; i < std::min(begin + stride, column.size()); ++i) {
      if (std::isfinite(column[i])) sum += column[i], ++count;
    }
    means.push_back(static_cast<float>(count > 0 ? sum / count : NAN));
  }
  return means;
}

// Times over the ranks: the page draws rank 0's.
bool over_ranks(const std::string& metric) { return metric.find("_seconds_m") != std::string::npos; }

ReportJson scalars_json(const RunLog& log) {
  ReportJson json = ReportJson::object();
  const RunHeader& header = log.newest_header();
  for (const MetricDefinition& metric : header.metric()) {
    if (metric.storage() != MetricDefinition::SCALAR || over_ranks(metric.name())) continue;
    const std::vector<double>& column = log.column(metric.name());
    if (std::none_of(column.begin(), column.end(), [](double value) { return std::isfinite(value); }))
      continue;
    const bool every_step =
        metric.name() == "loss" || metric.name() == "cross_entropy" || metric.name() == "grad_norm";
    const std::size_t stride = every_step ? 1 : (column.size() + kMostMeans - 1) / kMostMeans;
    json[metric.name()] = {{"unit", metric.unit()},
                           {"definition", metric.definition()},
                           {"stride", stride},
                           {"data", base64(means_of(column, stride))}};
  }
  return json;
}

// Of more events than a page should hold, those that report trouble, the newest first, then the newest of the
// rest; in their order. How many there are, only the caller knows.
std::vector<const RunLog::TimedEvent*> chosen_events(const std::vector<RunLog::TimedEvent>& events) {
  const auto is_routine = [](const RunLog::TimedEvent& each) {
    return each.event.kind() == EventRecord::CHECKPOINT_SAVED || each.event.kind() == EventRecord::EVALUATION;
  };
  std::vector<bool> chosen(events.size(), false);
  std::size_t left = kMostEvents;
  for (const bool routine : {false, true}) {
    for (std::size_t i = events.size(); i-- > 0 && left > 0;) {
      if (is_routine(events[i]) != routine) continue;
      chosen[i] = true;
      --left;
    }
  }
  std::vector<const RunLog::TimedEvent*> result;
  for (std::size_t i = 0; i < events.size(); ++i) {
    if (chosen[i]) result.push_back(&events[i]);
  }
  return result;
}

ReportJson events_json(const RunLog& log) {
  ReportJson json = ReportJson::array();
  for (const RunLog::TimedEvent* chosen : chosen_events(log.events())) {
    const RunLog::TimedEvent& each = *chosen;
    json.push_back({{"step", each.event.step()},
                    {"kind", EventRecord::Kind_Name(each.event.kind())},
                    {"message", each.event.message()},
                    {"time", each.event.wall_time()},
                    {"attempt", each.attempt},
                    {"superseded", each.superseded}});
  }
  return json;
}

ReportJson facts_json(const RunLog& log) {
  const RunSummary summary = summarize(log);
  const RunHeader& header = summary.header;
  std::string config;
  google::protobuf::TextFormat::PrintToString(header.config(), &config);
  const LayoutRecord& layout = header.layout();
  ReportJson choices = ReportJson::array(), attempts = ReportJson::array(), libraries = ReportJson::array();
  for (const MeasuredChoice& choice : header.choice())
    choices.push_back({choice.name(), choice.value(), choice.reason()});
  for (const LibraryVersion& library : header.library())
    libraries.push_back(library.name() + " " + library.version());
  for (const RunLog::Attempt& attempt : log.attempts()) {
    attempts.push_back({{"attempt", attempt.header.attempt()},
                        {"resume_step", attempt.header.resume_step()},
                        {"first_step", attempt.first_step},
                        {"last_step", attempt.last_step},
                        {"superseded", attempt.superseded},
                        {"started", attempt.header.wall_time()},
                        {"finished", attempt.finished}});
  }
  return {{"run_id", header.run_id()},
          {"code_version", header.code_version()},
          {"libraries", libraries},
          {"hosts", std::vector<std::string>(header.host().begin(), header.host().end())},
          {"layout",
           {{"world", layout.world()},
            {"data", layout.data()},
            {"tensor", layout.tensor()},
            {"expert", layout.expert()},
            {"expert_tensor", layout.expert_tensor()},
            {"threads", layout.threads()}}},
          {"choices", choices},
          {"attempts", attempts},
          {"planned_steps", header.config().steps()},
          {"tokens", summary.tokens},
          {"seconds", summary.training_seconds},
          {"started", summary.started},
          {"finished", summary.finished},
          {"skipped", summary.skipped},
          {"clipped", summary.clipped},
          {"dead_experts", summary.router.dead_experts},
          {"config", config}};
}

// What went wrong, as `hybridmoe-log why` finds it; explained are the first few, because each is looked up in
// the log. Of too many the newest are listed besides.
ReportJson incidents_json(const std::string& directory, ReadMode mode, const RunLog& log) {
  ReportJson json = ReportJson::array();
  if (log.steps().empty()) return json;
  const Explanation first = explain(directory, mode, 0);
  const auto add = [&json](const Incident& incident, const Attribution* cause) {
    json.push_back({{"step", cause == nullptr ? incident.first_step : cause->step},
                    {"last_step", incident.last_step},
                    {"kind", name_of(incident.kind)},
                    {"metric", incident.metric}});
    if (cause == nullptr) return;
    json.back()["sentence"] = cause->sentence;
    json.back()["layer"] = cause->layer;
  };
  // A router's fault shows in no scalar, and is the first explanation's own.
  if (first.incidents.empty() && first.attribution.cause != Attribution::Cause::None) {
    add(first.attribution.incident, &first.attribution);
  }
  const std::size_t count = first.incidents.size();
  for (std::size_t i = 0; i < count; ++i) {
    if (i >= kExplained && count - i > kMostEvents) continue;
    const Incident& incident = first.incidents[i];
    if (i >= kExplained) {
      add(incident, nullptr);
    } else {
      const Explanation own = i == 0 ? first : explain(directory, mode, incident.first_step);
      add(incident, &own.attribution);
    }
  }
  return json;
}

ReportJson run_json(const std::string& run, ReadMode mode) {
  const std::string directory = find_log_directory(run);
  const ReportData data = gather_report(directory, mode);
  const std::vector<std::int64_t>& steps = data.log.steps();
  ReportJson json = {{"name", run_name(directory)},
                     {"facts", facts_json(data.log)},
                     {"steps", base64(std::vector<double>(steps.begin(), steps.end()))},
                     {"scalars", scalars_json(data.log)},
                     {"events", events_json(data.log)},
                     {"all_events", data.log.events().size()},
                     {"incidents", incidents_json(directory, mode, data.log)}};
  json["column_steps"] = data.column_steps;
  json["coarse_steps"] = data.coarse_steps;
  for (const DenseColumns& columns : data.dense) json["dense"][columns.name] = dense_json(columns);
  for (const DenseColumns& columns : data.coarse) json["dense"][columns.name] = dense_json(columns);
  return json;
}

// Text of a script element must not end it.
std::string for_script(std::string text) {
  for (std::size_t at = text.find("</"); at != std::string::npos; at = text.find("</", at))
    text.replace(at, 2, "<\\/");
  return text;
}

}  // namespace

bool report_is_built() { return std::strlen(kReportDygraphs) > 0; }

void write_report(const std::vector<std::string>& runs, ReadMode mode, std::ostream& out) {
  require(report_is_built(),
          "this build has no charting library for the page: install the package libjs-dygraphs "
          "(tools/install-dependencies) "
          "and configure again");
  require(!runs.empty(), "report: a run directory was expected");
  ReportJson data = {{"runs", ReportJson::array()}};
  for (const std::string& run : runs) data["runs"].push_back(run_json(run, mode));
  std::string page = kReportHtml;
  const auto put = [&page](const std::string& place, const std::string& text) {
    const std::size_t at = page.find(place);
    require(at != std::string::npos, "report page: ", place, " is missing in its template");
    page.replace(at, place.size(), text);
  };
  put("/*STYLE*/", std::string(kReportDygraphsStyle) + kReportStyle);
  put("/*DATA*/", for_script(data.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)));
  put("/*DYGRAPHS*/", kReportDygraphs);
  put("/*SCRIPT*/", kReportScript);
  out << page;
}

}  // namespace hybridmoe
