#include "core/telemetry/health.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "core/error.h"
#include "core/telemetry/attribution.h"
#include "core/telemetry/incidents.h"
#include "core/telemetry/router_state.h"
#include "core/telemetry/trend.h"

namespace hybridmoe {
namespace {

constexpr std::size_t kRecent = 16;         // steps that "now" is the median of
constexpr std::int64_t kCollapsed = 32;     // steps in a row below the entropy limit
constexpr std::int64_t kWarmUpSteps = 128;  // whose clipping says nothing yet

double median_of(std::vector<double> values) {
  RollingMedian median(std::max<std::size_t>(values.size(), 1));
  for (const double value : values) {
    if (std::isfinite(value)) median.add(value);
  }
  return median.median();
}

constexpr int kExplained = 8;  // incidents: more of them in one window have one cause

std::string number_text(double value) { return short_text(value, 4); }

class Examination {
 public:
  Examination(const RunLog& log, const RunWindow& window, const HealthRules& rules)
      : log_(log), scalars_(scalar_series(log)), window_(window), rules_(rules) {
    report_.last_step = scalars_.steps.empty() ? 0 : scalars_.steps.back();
    begin_ = scalars_.steps.size() > static_cast<std::size_t>(rules.window())
                 ? scalars_.steps.size() - static_cast<std::size_t>(rules.window())
                 : 0;
    report_.first_step = scalars_.steps.empty() ? 0 : scalars_.steps[begin_];
  }

  HealthReport run() {
    incidents();
    events();
    attention_logits();
    adam();
    updates();
    trends();
    embedding();
    clipping();
    experts();
    lost();
    std::stable_sort(report_.findings.begin(), report_.findings.end(),
                     [](const HealthFinding& a, const HealthFinding& b) { return a.severity > b.severity; });
    return report_;
  }

 private:
  void find(Severity severity, const char* rule, const std::string& where, std::int64_t step, double value,
            double limit, const std::string& message) {
    find_as(where, severity, rule, where, step, value, limit, message);
  }
  void find_as(const std::string& identity, Severity severity, const char* rule, const std::string& where,
               std::int64_t step, double value, double limit, const std::string& message) {
    report_.findings.push_back({severity, rule, where, step, value, limit, message, identity});
  }
  // Null when the metric is missing; the rule is then listed as not judged.
  const DenseSeries* dense(const char* metric, const char* rule) {
    const DenseSeries* series = window_.find(metric);
    if (series == nullptr) report_.not_judged.push_back(rule);
    return series;
  }
  // The values of one element in the window.
  static std::vector<double> element_values(const DenseSeries& series, std::size_t element) {
    std::vector<double> values;
    for (const std::vector<double>& row : series.rows)
      values.push_back(row.empty() ? std::numeric_limits<double>::quiet_NaN() : row[element]);
    return values;
  }
  std::vector<double> recent(const std::string& name) const {
    const std::vector<double>& values = scalars_.column(name);
    return values.empty()
               ? values
               : std::vector<double>(values.begin() + static_cast<std::ptrdiff_t>(begin_), values.end());
  }
  std::vector<std::int64_t> recent_steps() const {
    return {scalars_.steps.begin() + static_cast<std::ptrdiff_t>(begin_), scalars_.steps.end()};
  }

  Attribution explained(const Incident& incident);
  void incidents();
  void events();
  void attention_logits();
  void adam();
  void updates();
  void trends();
  void embedding();
  void clipping();
  void experts();
  void lost();

  const RunLog& log_;
  const ScalarSeries scalars_;
  const RunWindow& window_;
  const HealthRules& rules_;
  std::size_t begin_ = 0;  // first step of the window
  int explained_ = 0;      // incidents
  HealthReport report_;
};

// What `why` says of an incident, as far as the window reaches.
Attribution Examination::explained(const Incident& incident) {
  if (incident.first_step < report_.first_step || explained_ == kExplained) return {};
  ++explained_;
  return attribute(incident, scalars_, window_, log_.events());
}

void Examination::incidents() {
  const auto report = [&](const Incident& incident, Severity severity, const char* rule, double limit,
                          const std::string& place, const std::string& message,
                          const std::string& remark = "") {
    const Attribution why = explained(incident);
    const bool known = why.cause != Attribution::Cause::None && why.cause != Attribution::Cause::Unknown;
    std::string where = why.layer_label;
    if (!why.kind.empty()) where += (where.empty() ? "" : ".") + why.kind;
    if (where.empty() && why.rank >= 0) where = cat("rank ", why.rank);
    // What explains an incident goes as the window moves on, and the slowest wait is a state of the machine.
    const std::string identity = incident.kind == Incident::Kind::Straggler
                                     ? std::string()
                                     : cat(incident.metric, " at ", incident.first_step);
    find_as(identity, severity, rule, where.empty() ? place : where, known ? why.step : incident.first_step,
            incident.peak, limit, known ? why.sentence + remark : message + remark);
  };
  const std::vector<Incident> incidents = find_incidents(scalars_);
  const Incident* slowest = nullptr;
  int slow_times = 0;
  for (const Incident& incident : incidents) {
    if (incident.last_step < report_.first_step) continue;
    switch (incident.kind) {
      case Incident::Kind::NonFinite:
        if (rules_.nonfinite())
          report(incident, Severity::Fail, "nonfinite", 0, "",
                 "loss or gradient not finite; hybridmoe-log why names the layer");
        break;
      case Incident::Kind::Spike:
        if (rules_.spikes())
          report(incident, Severity::Warn, "spikes", incident.baseline, incident.metric,
                 cat(incident.metric, " spiked to ", number_text(incident.peak), ", usual ",
                     number_text(incident.baseline)));
        break;
      case Incident::Kind::Replica:
        if (rules_.replica_mismatch())
          report(incident, Severity::Fail, "replica_mismatch", 0, "",
                 "copies of the parameters differ between ranks: go back to a checkpoint before it");
        break;
      case Incident::Kind::Straggler:
        ++slow_times;
        if (slowest == nullptr || incident.peak > slowest->peak) slowest = &incident;
        break;
      default:
        break;
    }
  }
  // Waits of a few steps are common on busy machines: one finding for all.
  if (slowest != nullptr && rules_.straggler_ratio() > 0 && slowest->peak >= rules_.straggler_ratio()) {
    const std::string times =
        slow_times > 1 ? cat(" (this and ", slow_times - 1, " shorter waits)") : std::string();
    report(*slowest, Severity::Warn, "straggler_ratio", rules_.straggler_ratio(), "",
           cat("the slowest rank takes ", number_text(slowest->peak), " times as long as the fastest"),
           times);
  }
  if (scalars_.column("replica_mismatches").empty()) report_.not_judged.push_back("replica_mismatch");
  if (scalars_.column(straggler_metric(scalars_) + "_max").empty())
    report_.not_judged.push_back("straggler_ratio");
}

// What the trainer itself found: copies that differ and skipped updates are among the incidents.
void Examination::events() {
  const EventRecord* wrong = nullptr;
  int wrong_times = 0;
  for (const RunLog::TimedEvent& each : log_.events()) {
    const EventRecord& event = each.event;
    if (each.superseded || event.step() < report_.first_step) continue;
    if (event.kind() == EventRecord::OTHER && event.message().starts_with(kWrongGradientNorms)) {
      if (wrong == nullptr) wrong = &event;
      ++wrong_times;
    }
    if (event.kind() == EventRecord::CHECKPOINT_FAILED && rules_.failed_checkpoint())
      find_as(cat("at ", event.step()), Severity::Warn, "failed_checkpoint", "", event.step(), 1, 0,
              "a checkpoint could not be saved: " + event.message());
  }
  // The same fault is found again at every check.
  if (wrong != nullptr && rules_.wrong_gradient_norms())
    find(Severity::Fail, "wrong_gradient_norms", "", wrong->step(), wrong_times, 0,
         cat(wrong->message(), wrong_times > 1 ? cat(" (the first of ", wrong_times, " checks)") : ""));
}

// Over a limit; and, where the logits grow, when they will be over it.
void Examination::attention_logits() {
  const DenseSeries* series = dense("attn_logit_max", "attn_logit_warn");
  if (series == nullptr) return;
  for (std::size_t i = 0; i < series->elements.size(); ++i) {
    const std::vector<double> values = element_values(*series, i);
    const double now = median_of(
        {values.end() - static_cast<std::ptrdiff_t>(std::min(kRecent, values.size())), values.end()});
    if (!std::isfinite(now)) continue;
    const double fail = rules_.attn_logit_fail(), warn = rules_.attn_logit_warn();
    const std::string& where = series->elements[i].label;
    if (fail > 0 && now > fail) {
      find(Severity::Fail, "attn_logit_fail", where, report_.last_step, now, fail,
           cat("attention logits of ", number_text(now), ": softmax is saturated"));
    } else if (warn > 0 && now > warn) {
      std::vector<double> logarithms;
      for (const double value : values) logarithms.push_back(value > 0 ? std::log(value) : std::nan(""));
      const double slope = theil_sen_slope(window_.steps, logarithms);
      const std::string when = fail > 0 && slope > 0
                                   ? cat(", ", number_text(fail), " in about ",
                                         std::llround(std::log(fail / now) / slope), " steps")
                                   : std::string();
      find(Severity::Warn, "attn_logit_warn", where, report_.last_step, now, warn,
           cat("attention logits of ", number_text(now), when));
    }
  }
}

void Examination::adam() {
  const DenseSeries* series = dense("adam_rms", "adam_rms");
  if (series == nullptr || rules_.adam_rms() <= 0) return;
  for (std::size_t i = 0; i < series->elements.size(); ++i) {
    const std::vector<double> values = element_values(*series, i);
    const double now = median_of(
        {values.end() - static_cast<std::ptrdiff_t>(std::min(kRecent, values.size())), values.end()});
    if (now >= rules_.adam_rms())
      find(Severity::Warn, "adam_rms", series->elements[i].label, report_.last_step, now, rules_.adam_rms(),
           cat("gradients outgrow Adam's second moment: adam_rms ", number_text(now)));
  }
}

// The learning rate's own changes are taken out.
void Examination::updates() {
  const DenseSeries* series = dense("update_norm", "update_growth");
  if (series == nullptr || rules_.update_growth() <= 0 || window_.steps.size() < 4 * kRecent) return;
  const auto split = static_cast<std::ptrdiff_t>(window_.steps.size() - kRecent);
  std::vector<double> rates;
  for (const std::int64_t step : window_.steps) {
    const double rate = scalars_.at("lr", step);
    rates.push_back(rate > 0 ? rate : 1);
  }
  for (std::size_t i = 0; i < series->elements.size(); ++i) {
    std::vector<double> values = element_values(*series, i);
    for (std::size_t t = 0; t < values.size(); ++t) values[t] /= rates[t];
    const double usual = median_of({values.begin(), values.begin() + split});
    const double now = median_of({values.begin() + split, values.end()});
    if (usual > 0 && now >= rules_.update_growth() * usual)
      find(Severity::Warn, "update_growth", series->elements[i].label, report_.last_step, now / usual,
           rules_.update_growth(), cat("updates are ", number_text(now / usual), " times as large as usual"));
  }
}

// Slow changes of the gradient's norm and of the head's log-sum-exp over the window.
void Examination::trends() {
  const std::vector<std::int64_t> steps = recent_steps();
  const double length = steps.empty() ? 0 : static_cast<double>(steps.back() - steps.front());
  std::vector<double> norms = recent("grad_norm");
  for (double& norm : norms) norm = norm > 0 ? std::log(norm) : std::nan("");
  const double growth = std::exp(theil_sen_slope(steps, norms) * length);
  if (rules_.norm_growth() > 0 && growth >= rules_.norm_growth())
    find(Severity::Warn, "norm_growth", "", report_.last_step, growth, rules_.norm_growth(),
         cat("the gradient norm grew by a factor ", number_text(growth), " in ", steps.size(), " steps"));
  const std::vector<double> logz = recent("logz_mean");
  if (logz.empty()) {
    report_.not_judged.push_back("logz_drift");
    return;
  }
  const double drift = theil_sen_slope(steps, logz) * length;
  if (rules_.logz_drift() > 0 && std::abs(drift) >= rules_.logz_drift())
    find(Severity::Warn, "logz_drift", "", report_.last_step, drift, rules_.logz_drift(),
         cat("the head's log-sum-exp drifted by ", number_text(drift), " in ", steps.size(), " steps"));
}

void Examination::embedding() {
  const DenseSeries* series = dense("param_norm", "embedding_shrinkage");
  if (series == nullptr || rules_.embedding_shrinkage() <= 0) return;
  for (std::size_t i = 0; i < series->elements.size(); ++i) {
    if (series->elements[i].kind != "embedding") continue;
    std::vector<double> values = element_values(*series, i);
    std::erase_if(values, [](double value) { return !(value > 0); });  // skipped steps are not measured
    if (values.size() < kLeastTrendPoints) continue;
    const double shrinkage = 1 - values.back() / values.front();
    if (shrinkage >= rules_.embedding_shrinkage())
      find(Severity::Warn, "embedding_shrinkage", series->elements[i].label, report_.last_step, shrinkage,
           rules_.embedding_shrinkage(),
           cat("the embedding lost ", number_text(100 * shrinkage), " % of its norm in ", values.size(),
               " steps"));
  }
}

void Examination::clipping() {
  const std::vector<double> factors = recent("clip_factor");
  const std::vector<std::int64_t> steps = recent_steps();
  double clipped = 0, count = 0;
  for (std::size_t i = 0; i < factors.size(); ++i) {
    if (steps[i] <= kWarmUpSteps || std::isnan(factors[i])) continue;
    ++count;
    clipped += factors[i] < 1;
  }
  if (count < kWarmUpSteps) {
    report_.not_judged.push_back("clip_rate");
  } else if (rules_.clip_rate() > 0 && clipped / count > rules_.clip_rate()) {
    find(Severity::Warn, "clip_rate", "", report_.last_step, clipped / count, rules_.clip_rate(),
         cat(number_text(100 * clipped / count), " % of the updates were clipped"));
  }
}

void Examination::experts() {
  const DenseSeries* series = dense("expert_load", "dead_expert_steps");
  if (series == nullptr) return;
  RouterWatch watch(series->elements);
  const std::size_t layers = watch.layers().size();
  std::vector<std::vector<double>> violation(layers);
  std::vector<std::int64_t> below(layers, 0), steps;  // steps in a row below the rule's entropy
  for (std::size_t t = 0; t < window_.steps.size(); ++t) {
    if (series->rows[t].empty()) continue;
    watch.add(window_.steps[t], series->rows[t]);
    steps.push_back(window_.steps[t]);
    for (std::size_t i = 0; i < layers; ++i) {
      violation[i].push_back(watch.layers()[i].state.max_violation);
      below[i] = watch.layers()[i].state.entropy_share < rules_.load_entropy() ? below[i] + 1 : 0;
    }
  }
  for (std::size_t i = 0; i < layers; ++i) {
    const RouterWatch::Layer& layer = watch.layers()[i];
    if (rules_.dead_expert_steps() > 0) {
      for (const int expert : layer.dead(watch.newest_step(), rules_.dead_expert_steps())) {
        const std::int64_t since = layer.idle_since[static_cast<std::size_t>(expert)];
        find(Severity::Warn, "dead_expert_steps", cat(layer.label, "/", expert), since,
             static_cast<double>(watch.newest_step() - since + 1),
             static_cast<double>(rules_.dead_expert_steps()), "the expert receives no token any more");
      }
    }
    if (below[i] >= kCollapsed)
      find(
          Severity::Warn, "load_entropy", layer.label, steps[steps.size() - below[i]],
          layer.state.entropy_share, rules_.load_entropy(),
          cat("the router has collapsed: load entropy ", number_text(layer.state.entropy_share), " of ln E"));
    const double rise =
        steps.size() < kLeastTrendPoints
            ? 0
            : theil_sen_slope(steps, violation[i]) * static_cast<double>(steps.back() - steps.front());
    if (rules_.max_violation_rise() > 0 && rise >= rules_.max_violation_rise() &&
        layer.state.max_violation > 1)
      find(Severity::Warn, "max_violation_rise", layer.label, watch.newest_step(), rise,
           rules_.max_violation_rise(),
           cat("MaxVio rose by ", number_text(rise), " to ", number_text(layer.state.max_violation)));
  }
}

void Examination::lost() {
  if (!rules_.lost_records()) return;
  for (const RunLog::Attempt& attempt : log_.attempts()) {
    const double count = static_cast<double>(attempt.lost.steps() + attempt.lost.dense() +
                                             attempt.lost.events() + attempt.lost.rank_samples());
    if (count > 0)
      find(Severity::Warn, "lost_records", cat("attempt ", attempt.header.attempt()), attempt.last_step,
           count, 0, "records were lost: the disk was full or too slow");
  }
}

}  // namespace

Severity HealthReport::worst() const {
  Severity worst = Severity::Ok;
  for (const HealthFinding& finding : findings) worst = std::max(worst, finding.severity);
  return worst;
}

std::vector<std::string> health_metrics() {
  std::vector<std::string> metrics = attribution_metrics();
  metrics.emplace_back("attn_logit_max");
  return metrics;
}

HealthReport check_health(const RunLog& log, const RunWindow& window, const HealthRules& rules) {
  return Examination(log, window, rules).run();
}

HealthReport check_health(const std::string& directory, ReadMode mode, const HealthRules& rules) {
  LogReadOptions options;
  options.mode = mode;
  options.scalars_only = true;
  const RunLog log(directory, options);
  RunWindow window;
  if (!log.steps().empty()) {
    const std::size_t count =
        std::min<std::size_t>(log.steps().size(), static_cast<std::size_t>(rules.window()));
    window = read_window(directory, mode, {{log.steps()[log.steps().size() - count], log.steps().back()}},
                         health_metrics());
  }
  return check_health(log, window, rules);
}

}  // namespace hybridmoe
