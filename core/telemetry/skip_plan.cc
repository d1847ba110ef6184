#include "core/telemetry/skip_plan.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/files/checkpoint_directory.h"

namespace hybridmoe {
namespace {

constexpr std::int64_t kSkippedSteps = 32;

// A word for a POSIX shell.
std::string quoted(const std::string& word) {
  if (word.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-") ==
      std::string::npos)
    return word;
  std::string result = "'";
  for (const char c : word) result += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return result + "'";
}

}  // namespace

std::int64_t sample_number(const DataConfig& data, std::int64_t i) {
  std::vector<std::pair<std::int64_t, std::int64_t>> ranges;
  for (const SampleRange& range : data.skip()) ranges.emplace_back(range.begin(), range.end());
  std::sort(ranges.begin(), ranges.end());
  std::int64_t number = i, passed = 0;  // numbers below `passed` are accounted for
  for (const auto& [begin, end] : ranges) {
    if (number < begin) break;
    number += std::max<std::int64_t>(0, end - std::max(begin, passed));
    passed = std::max(passed, end);
  }
  return number;
}

SkipPlan plan_skip(const std::string& run_dir, ReadMode mode, std::int64_t step, std::int64_t margin) {
  const std::string directory = find_log_directory(run_dir);
  SkipPlan plan;
  const Explanation explanation = explain(directory, mode, step);
  plan.why = explanation.attribution;
  const std::int64_t first = plan.why.step;
  const std::int64_t last = std::clamp(plan.why.incident.last_step, first, first + kSkippedSteps - 1);
  for (const CheckpointEntry& checkpoint : list_checkpoints(run_dir)) {
    if (checkpoint.step < first) plan.checkpoint_step = std::max(plan.checkpoint_step, checkpoint.step);
  }
  plan.first_step = std::max({first - margin, plan.checkpoint_step + 1, explanation.first_step});
  plan.last_step = std::min(last + margin, explanation.last_step);
  plan.lost_steps = explanation.last_step - plan.checkpoint_step;

  RunHeader header;
  double begin = -1, end = -1;
  visit_steps(directory, mode, {{plan.first_step, plan.last_step}},
              [&](const RunHeader& own, const StepRecord& record) {
                const MetricDefinition *from = find_metric(own, "samples_begin"),
                                       *to = find_metric(own, "samples_end");
                require(from != nullptr && to != nullptr, directory,
                        ": this log does not say which samples a step used (samples_begin, samples_end)");
                const double first_sample = metric_elements(own, *from, record).at(0);
                begin = begin < 0 ? first_sample : std::min(begin, first_sample);
                end = std::max(end, metric_elements(own, *to, record).at(0));
                header = own;
              });
  require(begin >= 0 && end > begin, directory, ": steps ", plan.first_step, " to ", plan.last_step,
          " have no sample numbers");
  const DataConfig& data = header.config().data();
  plan.skip_begin = sample_number(data, std::llround(begin));
  plan.skip_end = sample_number(data, std::llround(end) - 1) + 1;
  const std::string skip = cat("data.skip+={begin: ", plan.skip_begin, " end: ", plan.skip_end, "}");
  const bool rewinds = plan.checkpoint_step > 0;
  plan.command = cat(
      "tools/train ", std::max(header.layout().world(), 1), " --config ",
      quoted(run_dir + "/config.textproto"), " --run_dir ", quoted(rewinds ? run_dir : run_dir + "-again"),
      rewinds ? cat(" --resume_step ", plan.checkpoint_step) : std::string(), " --set ", quoted(skip));
  return plan;
}

}  // namespace hybridmoe
