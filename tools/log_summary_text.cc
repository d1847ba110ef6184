// The summary for people.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <map>

#include "core/error.h"
#include "parallel/watchdog/report.h"
#include "tools/log_summary.h"
#include "tools/log_text.h"

namespace hybridmoe {
namespace {

void line(std::ostream& out, const char* name, const std::string& text) {
  out << text::format("%-10s ", name) << text << '\n';
}

std::string model_text(const ModelConfig& model) {
  std::string text =
      cat(Placement_Name(model.placement()), ", ", text::plural(model.layers(), "layer"), ", d_model ",
          model.d_model(), ", ", text::plural(model.heads(), "head"), ", sequence ", model.sequence_length());
  if (!model.has_moe()) return text + ", dense";
  return text + cat("; ", text::plural(model.moe().experts(), "expert"), ", top ", model.moe().top_k(),
                    ", hidden ", model.moe().expert_hidden());
}

std::string machine_text(const RunHeader& header) {
  const LayoutRecord& layout = header.layout();
  std::string text =
      cat(text::plural(layout.world(), "rank"), " x ", text::plural(layout.threads(), "thread"), " (data ",
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
    text += text::format(" of %lld (%.0f %%)", static_cast<long long>(planned),
                         100.0 * static_cast<double>(summary.last_step) / static_cast<double>(planned));
  text +=
      cat(", ", text::short_number(summary.tokens), " tokens in ", text::duration(summary.training_seconds));
  if (summary.finished) return text + ", ended in order";
  return text + cat(", not ended: running or killed (last record ", text::utc(summary.last_record), ")");
}

void print_scalars(const RunSummary& summary, std::ostream& out) {
  out << text::format("\n%-22s %11s %11s %11s %11s %11s %9s  %s\n", "", "first", "last", "median", "smallest",
                      "largest", "at step", "unit");
  for (const ScalarSummary& row : summary.scalars) {
    if (row.name == "samples_begin" || row.name == "samples_end" || row.name == "skipped") continue;
    if (std::isnan(row.median)) continue;  // never measured
    out << text::format("%-22s %11.5g %11.5g %11.5g %11.5g %11.5g %9lld  %s\n", row.name.c_str(), row.first,
                        row.last, row.median, row.minimum, row.maximum,
                        static_cast<long long>(row.maximum_step), row.unit.c_str());
  }
}

void print_attempts(const RunSummary& summary, std::ostream& out) {
  if (summary.attempts < 2) return;
  out << text::format("\n%-8s %-24s %10s %10s %10s  %s\n", "attempt", "started", "from step", "to step",
                      "computed", "");
  for (const RunLog::Attempt& attempt : summary.all_attempts) {
    std::string end = attempt.finished ? "ended in order" : "not ended";
    if (attempt.superseded > 0)
      end += cat(", ", text::plural(attempt.superseded, "step"), " computed again later");
    out << text::format("%-8d %-24s %10lld %10lld %10lld  %s\n", attempt.header.attempt(),
                        text::utc(attempt.header.wall_time()).c_str(),
                        static_cast<long long>(attempt.first_step), static_cast<long long>(attempt.last_step),
                        static_cast<long long>(attempt.steps), end.c_str());
  }
}

std::string values_text(const EventRecord& event) {
  std::string text;
  for (const NamedValue& value : event.value())
    text += text::format("  %s %.6g", value.name().c_str(), value.value());
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
  if (first > 0) out << text::format("  the last %zu:\n", kShown);
  for (std::size_t i = first; i < summary.events.size(); ++i) {
    const EventRecord& event = summary.events[i].event;
    out << text::format("  step %-8lld %-18s", static_cast<long long>(event.step()),
                        EventRecord::Kind_Name(event.kind()).c_str())
        << event.message() << values_text(event)
        << (summary.events[i].superseded ? "  (computed again later)" : "") << '\n';
  }
}

// "ranks 0, 2 of attempt 1 left steps 37 to 100: WHY"; ranks that left the same share a line.
void print_rank_logs(const RunSummary& summary, std::ostream& out) {
  std::vector<std::pair<std::string, std::vector<int>>> lines;
  for (const RankLog& log : summary.rank_logs) {
    std::string what = cat(" of attempt ", log.attempt, " left ");
    if (log.last_step() == 0) {
      what += "no step";
    } else {
      what += cat("steps ", log.first_step(), " to ", log.last_step());
    }
    if (log.parts.size() > 1) what += cat(", in ", log.parts.size(), " parts; the last");
    if (!log.parts.empty()) {
      const std::string& why = log.parts.back().why.message();
      what += ": " + why.substr(0, why.find('\n'));
    }
    const auto same =
        std::find_if(lines.begin(), lines.end(), [&](auto& each) { return each.first == what; });
    if (same != lines.end()) {
      same->second.push_back(log.rank);
    } else {
      lines.push_back({what, {log.rank}});
    }
  }
  for (const auto& [what, ranks] : lines) {
    line(out, "own steps", cat(ranks.size() == 1 ? "rank " : "ranks ", watchdog::rank_list(ranks), what));
  }
}

void print_health(const RunSummary& summary, std::ostream& out) {
  out << '\n';
  const double steps = summary.steps > 0 ? static_cast<double>(summary.steps) : 1;
  line(out, "updates",
       text::format("%lld skipped, %.1f %% clipped", static_cast<long long>(summary.skipped),
                    100 * static_cast<double>(summary.clipped) / steps));
  const RouterSummary& router = summary.router;
  if (router.experts > 0) {
    line(out, "router",
         text::format("step %lld: largest MaxVio %.2f in %s, %d of %d experts dead",
                      static_cast<long long>(router.step), router.worst_max_violation,
                      router.worst_layer.c_str(), router.dead_experts, router.experts));
  }
  const LostRecords& lost = summary.lost;
  if (lost.steps() + lost.dense() + lost.events() + lost.rank_samples() > 0) {
    line(out, "LOST",
         cat(text::plural(lost.steps(), "step"), ", dense arrays of ", text::plural(lost.dense(), "step"),
             ", ", text::plural(lost.events(), "event"), ", ",
             text::plural(lost.rank_samples(), "rank sample")));
  }
  print_rank_logs(summary, out);
  for (const LogProblem& problem : summary.problems)
    line(out, problem.tail ? "note" : "CORRUPT", problem.str());
}

}  // namespace

void print_summary(const RunSummary& summary, std::ostream& out) {
  const RunHeader& header = summary.header;
  line(out, "run",
       cat(header.config().name(), " (id ", header.run_id(), ", ", text::plural(summary.attempts, "attempt"),
           ", log ", text::short_number(static_cast<double>(summary.bytes)), "B)"));
  line(out, "model", model_text(header.config().model()));
  line(out, "machine", machine_text(header));
  line(out, "code", code_text(header));
  line(out, "started", text::utc(summary.started));
  line(out, "progress", progress_text(summary));
  if (!summary.loss.empty()) line(out, "loss", text::sparkline(summary.loss, 80));
  print_scalars(summary, out);
  print_attempts(summary, out);
  print_health(summary, out);
  print_events(summary, out);
}

}  // namespace hybridmoe
