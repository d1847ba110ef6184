#include "tools/log_tensorboard.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>

#include "core/error.h"
#include "core/files/record_file.h"
#include "core/telemetry/metrics.h"

namespace hybridmoe {
namespace {

// Protobuf's wire format, little endian. Fields: Event wall_time 1, step 2, file_version 3, summary 5;
// Summary value 1; Value tag 1, simple_value 2.
void put_varint(std::uint64_t value, std::string* out) {
  for (; value >= 128; value >>= 7) out->push_back(static_cast<char>(value | 128));
  out->push_back(static_cast<char>(value));
}
void put_bytes(int field, const std::string& bytes, std::string* out) {
  put_varint(static_cast<std::uint64_t>(field) << 3 | 2, out);
  put_varint(bytes.size(), out);
  *out += bytes;
}
template <class Number>
void put_fixed(int field, Number number, std::string* out) {
  put_varint(static_cast<std::uint64_t>(field) << 3 | (sizeof number == 8 ? 1 : 5), out);
  char bytes[sizeof number];
  std::memcpy(bytes, &number, sizeof number);
  out->append(bytes, sizeof number);
}

void put_value(const std::string& tag, double value, std::string* summary) {
  std::string entry;
  put_bytes(1, tag, &entry);
  put_fixed(2, static_cast<float>(value), &entry);
  put_bytes(1, entry, summary);
}

std::string event_bytes(double wall_time, std::int64_t step, const std::string& summary) {
  std::string event;
  put_fixed(1, wall_time, &event);
  put_varint(2 << 3, &event);
  put_varint(static_cast<std::uint64_t>(step), &event);
  put_bytes(5, summary, &event);
  return event;
}

bool is_chosen(const MetricDefinition& metric, const std::vector<std::string>& metrics) {
  if (metrics == std::vector<std::string>{"all"}) return true;
  if (metrics.empty()) return metric.axis_size() <= 1;
  return std::find(metrics.begin(), metrics.end(), metric.name()) != metrics.end();
}

std::string tag_of(const MetricDefinition& metric, const std::string& label) {
  if (metric.storage() != MetricDefinition::SCALAR) return metric.name() + "/" + label;
  return (metric.unit() == "s" ? "time/" : "train/") + metric.name();
}

// What is chosen of an attempt's metrics, with the tags of their elements.
struct TaggedMetrics {
  int attempt = -1;
  std::vector<std::pair<MetricDefinition, std::vector<std::string>>> metrics;
};

TaggedMetrics tagged_metrics(int attempt, const RunHeader& header, const std::vector<std::string>& chosen) {
  TaggedMetrics tagged{attempt, {}};
  for (const MetricDefinition& metric : header.metric()) {
    if (!is_chosen(metric, chosen)) continue;
    std::vector<std::string> tags;
    for (const std::string& label : element_labels(header, metric)) tags.push_back(tag_of(metric, label));
    tagged.metrics.emplace_back(metric, std::move(tags));
  }
  return tagged;
}

// The norm of each layer as a whole, and of what belongs to none.
std::map<std::string, double> layer_norms(const RunHeader& header, const MetricDefinition& metric,
                                          const std::vector<double>& values) {
  std::map<std::string, double> norms;
  const MetricAxis& rows = header.axis(metric.axis(0));
  for (int i = 0; i < rows.entry_size() && i < values.size(); ++i) {
    const std::string& label = rows.entry(i).label();
    double& norm = norms[label.substr(0, label.find('.'))];
    norm = std::hypot(norm, values[i]);
  }
  return norms;
}

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return text;
}

}  // namespace

TensorBoardExport export_tensorboard(const std::string& directory, ReadMode mode,
                                     const std::vector<std::string>& metrics, const std::string& output) {
  RunHeader newest;
  require(read_newest_header(list_log_segments(directory), &newest), directory,
          ": no run header can be read; hybridmoe-log verify says what is wrong");
  for (const std::string& name : metrics) {
    require(name == "all" || find_metric(newest, name) != nullptr, "--metric ", name,
            ": this log has no such metric");
  }
  std::error_code error;
  std::filesystem::create_directories(output, error);
  require(!error, output, ": cannot make this directory: ", error.message());
  TensorBoardExport result;
  result.file = cat(output, "/events.out.tfevents.", std::llround(newest.wall_time()), ".",
                    newest.run_id().empty() ? "run" : newest.run_id());
  require(!std::filesystem::exists(result.file), result.file,
          ": exists already; remove it or name another directory");
  // Aside, and not by a name that TensorBoard takes for an event file.
  const std::string unfinished = output + "/unfinished-export";
  std::filesystem::remove(unfinished, error);  // of an export that was killed
  RecordWriter file(unfinished);
  std::string first;
  put_fixed(1, newest.wall_time(), &first);
  put_bytes(3, "brain.Event:2", &first);
  file.write(first);

  LogReadOptions options;
  options.mode = mode;
  LogReader reader(directory, options);
  TaggedMetrics tagged;
  reader.poll([&](const LogEntry& entry) {
    if (tagged.attempt != entry.segment.attempt)
      tagged = tagged_metrics(entry.segment.attempt, entry.header, metrics);
    std::string summary;
    const auto add = [&](const std::string& tag, double value) {
      put_value(tag, value, &summary);
      ++result.values;
    };
    const std::int64_t until = reader.superseded_from(entry.segment.attempt);
    if (entry.record.has_step()) {
      const StepRecord& step = entry.record.step();
      if (step.step() >= until) return;
      ++result.steps;
      for (const auto& [metric, tags] : tagged.metrics) {
        const std::vector<double> values = metric_elements(entry.header, metric, step);
        if (metric.storage() == MetricDefinition::SCALAR && !values.empty() && !was_measured(values.front()))
          continue;
        for (std::size_t i = 0; i < values.size(); ++i) add(tags[i], values[i]);
        if (metric.name() != "layer_grad_norm" || values.empty()) continue;
        for (const auto& [layer, norm] : layer_norms(entry.header, metric, values))
          add("grad_norm/" + layer, norm);
      }
      file.write(event_bytes(step.wall_time(), step.step(), summary));
    } else if (entry.record.has_event() && entry.record.event().value_size() > 0) {
      const EventRecord& event = entry.record.event();
      if (event.step() >= until) return;
      const std::string group = lower(EventRecord::Kind_Name(event.kind()));
      for (const NamedValue& value : event.value()) add(group + "/" + value.name(), value.value());
      file.write(event_bytes(event.wall_time(), event.step(), summary));
    }
  });
  file.sync();
  file.close();
  std::filesystem::rename(unfinished, result.file, error);
  require(!error, result.file, ": cannot rename the finished file to this: ", error.message());
  return result;
}

}  // namespace hybridmoe
