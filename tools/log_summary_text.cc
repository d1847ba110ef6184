// The summary for people.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <map>

#include "core/error.h"
#include "tools/log_summary.h"

namespace hybridmoe {
namespace {

template <class... Values>
std::string format(const char* pattern, Values... values) {
  char text[512];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}

std::string utc(double seconds) {
  const auto whole = static_cast<std::time_t>(seconds);
  std::tm parts{};
  gmtime_r(&whole, &parts);
  char text[40];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S UTC", &parts);
  return text;
}

std::string duration(double seconds) {
  const auto whole = static_cast<long>(seconds);
  if (seconds < 120) return format("%.1f s", seconds);
  if (whole < 7200) return format("%ld min %02ld s", whole / 60, whole % 60);
  return format("%ld h %02ld min", whole / 3600, whole / 60 % 60);
}

// 1234567 -> "1.23 M"
std::string short_number(double value) {
  const char* units[] = {"", " k", " M", " G", " T"};
  int unit = 0;
  for (; std::abs(value) >= 1000 && unit < 4; ++unit) value /= 1000;
  return format(unit == 0 ? "%.4g%s" : "%.3g%s", value, units[unit]);
}

std::string plural(std::int64_t count, const std::string& thing) {
  return cat(count, " ", thing, count == 1 ? "" : "s");
}

void line(std::ostream& out, const char* name, const std::string& text) {
  out << format("%-10s ", name) << text << '\n';
}

// The mean of each of `width` runs of values as a bar; x where a value is not finite.
std::string sparkline(const std::vector<double>& values, std::size_t width) {
  static constexpr const char* kBars[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  width = std::min(width, values.size());
  std::vector<double> means;
  for (std::size_t i = 0; i < width; ++i) {
    const std::size_t begin = i * values.size() / width, end = (i + 1) * values.size() / width;
    double sum = 0;
    for (std::size_t j = begin; j < end; ++j) sum += values[j];
    means.push_back(sum / static_cast<double>(end - begin));
  }
  double low = INFINITY, high = -INFINITY;
  for (const double mean : means) {
    if (!std::isfinite(mean)) continue;
    low = std::min(low, mean);
    high = std::max(high, mean);
  }
  std::string text;
  for (const double mean : means) {
    const double share = high > low ? (mean - low) / (high - low) : 0;
    text += std::isfinite(mean) ? kBars[std::min(7, static_cast<int>(share * 8))] : "x";
  }
  return text;
}

std::string model_text(const ModelConfig& model) {
  std::string text =
      cat(Placement_Name(model.placement()), ", ", plural(model.layers(), "layer"), ", d_model ",
          model.d_model(), ", ", plural(model.heads(), "head"), ", sequence ", model.sequence_length());
  if (!model.has_moe()) return text + ", dense";
  return text + cat("; ", plural(model.moe().experts(), "expert"), ", top ", model.moe().top_k(), ", hidden ",
                    model.moe().expert_hidden());
}

std::string machine_text(const RunHeader& header) {
  const LayoutRecord& layout = header.layout();
  std::string text = cat(plural(layout.world(), "rank"), " x ", plural(layout.threads(), "thread"), " (data ",
                         layout.data(), ", tensor ", layout.tensor(), ", expert ", layout.expert(), ")");
  std::map<std::string, int> hosts;
  for (const std::string& host : header.host()) ++hosts[host];
  if (hosts.size() == 1) return text + " on " + hosts.begin()->first;
  return hosts.empty() ? text : text + cat(" on ", hosts.size(), " hosts");
}

std::string code_text(const RunHeader& header) {
  std::string text = header.code_version();
  for (const LibraryVersion& library : header.library())
    text += cat(", ", library.name(), " ", library.version());
  return text;
}

std::string progress_text(const RunSummary& summary) {
  std::string text = cat("step ", summary.last_step);
  const std::int64_t planned = summary.header.config().steps();
  if (planned > 0)
    text += format(" of %lld (%.0f %%)", static_cast<long long>(planned),
                   100.0 * static_cast<double>(summary.last_step) / static_cast<double>(planned));
  text += cat(", ", short_number(summary.tokens), " tokens in ", duration(summary.training_seconds));
  if (summary.finished) return text + ", ended in order";
  return text + cat(", not ended: running or killed (last record ", utc(summary.last_record), ")");
}

void print_scalars(const RunSummary& summary, std::ostream& out) {
  out << format("\n%-22s %11s %11s %11s %11s %11s %9s  %s\n", "", "first", "last", "median", "smallest",
                "largest", "at step", "unit");
  for (const ScalarSummary& row : summary.scalars) {
    if (row.name == "samples_begin" || row.name == "samples_end" || row.name == "skipped") continue;
    if (std::isnan(row.median)) continue;  // never measured
    out << format("%-22s %11.5g %11.5g %11.5g %11.5g %11.5g %9lld  %s\n", row.name.c_str(), row.first,
                  row.last, row.median, row.minimum, row.maximum, static_cast<long long>(row.maximum_step),
                  row.unit.c_str());
  }
}

void print_attempts(const RunSummary& summary, std::ostream& out) {
  if (summary.attempts < 2) return;
  out << format("\n%-8s %-24s %10s %10s %10s  %s\n", "attempt", "started", "from step", "to step", "computed",
                "");
  for (const RunLog::Attempt& attempt : summary.all_attempts) {
    std::string end = attempt.finished ? "ended in order" : "not ended";
    if (attempt.superseded > 0) end += cat(", ", plural(attempt.superseded, "step"), " computed again later");
    out << format("%-8d %-24s %10lld %10lld %10lld  %s\n", attempt.header.attempt(),
                  utc(attempt.header.wall_time()).c_str(), static_cast<long long>(attempt.first_step),
                  static_cast<long long>(attempt.last_step), static_cast<long long>(attempt.steps),
                  end.c_str());
  }
}

std::string values_text(const EventRecord& event) {
  std::string text;
  for (const NamedValue& value : event.value())
    text += format("  %s %.6g", value.name().c_str(), value.value());
  return text;
}

void print_events(const RunSummary& summary, std::ostream& out) {
  constexpr std::size_t kShown = 12;
  std::map<EventRecord::Kind, int> counts;
  for (const auto& event : summary.events) ++counts[event.event.kind()];
  if (counts.empty()) return;
  std::string all;
  for (const auto& [kind, count] : counts)
    all += cat(all.empty() ? "" : ", ", EventRecord::Kind_Name(kind), " ", count);
  out << '\n';
  line(out, "events", all);
  const std::size_t first = summary.events.size() > kShown ? summary.events.size() - kShown : 0;
  if (first > 0) out << format("  the last %zu:\n", kShown);
  for (std::size_t i = first; i < summary.events.size(); ++i) {
    const EventRecord& event = summary.events[i].event;
    out << format("  step %-8lld %-18s", static_cast<long long>(event.step()),
                  EventRecord::Kind_Name(event.kind()).c_str())
        << event.message() << values_text(event)
        << (summary.events[i].superseded ? "  (computed again later)" : "") << '\n';
  }
}

void print_health(const RunSummary& summary, std::ostream& out) {
  out << '\n';
  const double steps = summary.steps > 0 ? static_cast<double>(summary.steps) : 1;
  line(out, "updates",
       format("%lld skipped, %.1f %% clipped", static_cast<long long>(summary.skipped),
              100 * static_cast<double>(summary.clipped) / steps));
  const RouterSummary& router = summary.router;
  if (router.experts > 0) {
    line(out, "router",
         format("step %lld: largest MaxVio %.2f in %s, %d of %d experts without a token",
                static_cast<long long>(router.step), router.worst_max_violation, router.worst_layer.c_str(),
                router.dead_experts, router.experts));
  }
  const LostRecords& lost = summary.lost;
  if (lost.steps() + lost.dense() + lost.events() + lost.rank_samples() > 0) {
    line(out, "LOST",
         cat(plural(lost.steps(), "step"), ", dense arrays of ", plural(lost.dense(), "step"), ", ",
             plural(lost.events(), "event"), ", ", plural(lost.rank_samples(), "rank sample")));
  }
  for (const LogProblem& problem : summary.problems)
    line(out, problem.tail ? "note" : "CORRUPT", problem.str());
}

}  // namespace

void print_summary(const RunSummary& summary, std::ostream& out) {
  const RunHeader& header = summary.header;
  line(out, "run",
       cat(header.config().name(), " (id ", header.run_id(), ", ", plural(summary.attempts, "attempt"),
           ", log ", short_number(static_cast<double>(summary.bytes)), "B)"));
  line(out, "model", model_text(header.config().model()));
  line(out, "machine", machine_text(header));
  line(out, "code", code_text(header));
  line(out, "started", utc(summary.started));
  line(out, "progress", progress_text(summary));
  if (!summary.loss.empty()) line(out, "loss", sparkline(summary.loss, 80));
  print_scalars(summary, out);
  print_attempts(summary, out);
  print_health(summary, out);
  print_events(summary, out);
}

}  // namespace hybridmoe
