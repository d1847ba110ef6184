#include "tools/log_check.h"

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "tools/log_text.h"

namespace hybridmoe {
namespace {

using CheckJson = nlohmann::ordered_json;

CheckJson finding_json(int status, const HealthFinding& finding) {
  return {{"severity", status_name(status)}, {"rule", finding.rule},
          {"where", finding.where},          {"step", finding.step},
          {"value", finding.value},          {"limit", finding.limit},
          {"message", finding.message}};
}

}  // namespace

const char* status_name(int status) {
  constexpr const char* kNames[] = {"ok", "warn", "fail", "corrupt"};
  return kNames[status];
}

text::Colour status_colour(int status) {
  if (status == 0) return text::Colour::Green;
  return status == 1 ? text::Colour::Yellow : text::Colour::Red;
}

int CheckResult::status() const { return broken.empty() ? static_cast<int>(health.worst()) : kCheckCorrupt; }

CheckResult judged_run(const RunLog& log, const HealthReport& health) {
  CheckResult result;
  result.health = health;
  result.planned_steps = log.newest_header().config().steps();
  result.last_step = log.steps().empty() ? 0 : log.steps().back();
  result.ended = log.attempts().back().finished;
  return result;
}

CheckResult check_run(const std::string& run, const HealthRules& rules, bool complete) {
  CheckResult result;
  std::vector<std::string> broken;
  try {
    const std::string directory = find_log_directory(run);
    for (const LogProblem& problem : verify_log(directory).problems) broken.push_back(problem.str());
    LogReadOptions read;
    read.scalars_only = true;
    read.mode = ReadMode::SkipCorrupt;
    const RunLog log(directory, read);
    require(!log.attempts().empty(), directory, ": the log holds no whole record");
    result = judged_run(log, check_health(directory, ReadMode::SkipCorrupt, rules));
    if (complete && !result.ended) broken.emplace_back("the run has not ended in order");
    if (complete && result.last_step < result.planned_steps)
      broken.push_back(cat("the run ended at step ", result.last_step, " of ", result.planned_steps));
  } catch (const Error& error) {
    broken.emplace_back(error.what());
  }
  result.broken = std::move(broken);
  return result;
}

void print_check(const CheckResult& result, std::ostream& out) {
  const int status = result.status();
  out << text::coloured(status_name(status), status_colour(status)) << ": step " << result.last_step << " of "
      << result.planned_steps << ", judged from step " << result.health.first_step
      << (result.ended ? ", ended in order" : ", not ended") << '\n';
  for (const std::string& problem : result.broken)
    out << text::coloured("corrupt", text::Colour::Red) << "  " << problem << '\n';
  using Align = text::Table::Align;
  text::Table table(
      {{"", Align::Left}, {"rule", Align::Left}, {"where", Align::Left}, {"step"}, {"", Align::Left}});
  for (const HealthFinding& finding : result.health.findings)
    table.add({status_name(static_cast<int>(finding.severity)), finding.rule, finding.where,
               cat(finding.step), finding.message});
  if (!table.empty()) table.print(out);
  if (result.health.not_judged.empty()) return;
  out << "not judged, because the log lacks their metric or is too short:";
  for (const std::string& rule : result.health.not_judged) out << ' ' << rule;
  out << '\n';
}

void print_check_json(const CheckResult& result, std::ostream& out) {
  CheckJson json = {{"status", status_name(result.status())},
                    {"last_step", result.last_step},
                    {"planned_steps", result.planned_steps},
                    {"ended", result.ended},
                    {"first_step_judged", result.health.first_step},
                    {"corrupt", result.broken},
                    {"findings", CheckJson::array()},
                    {"not_judged", result.health.not_judged}};
  for (const HealthFinding& finding : result.health.findings)
    json["findings"].push_back(finding_json(static_cast<int>(finding.severity), finding));
  out << json.dump(2) << '\n';
}

std::string finding_json_line(int status, const HealthFinding& finding) {
  return finding_json(status, finding).dump();
}

std::string ended_json_line(const CheckResult& result) {
  return CheckJson{{"ended", true}, {"status", status_name(result.status())}, {"last_step", result.last_step}}
      .dump();
}

void print_verification(const LogVerification& result, std::ostream& out) {
  for (const LogProblem& note : result.notes) out << "note: " << note.str() << '\n';
  for (const LogProblem& problem : result.problems) out << "PROBLEM: " << problem.str() << '\n';
  out << result.attempts << " attempts, " << result.segments << " segments, ";
  if (result.rank_logs > 0) out << result.rank_logs << " files of single ranks, ";
  out << result.records << " records, " << result.bytes << " bytes; steps " << result.first_step << " to "
      << result.last_step << '\n';
  if (result.good()) {
    out << "good: checksums match, no step is missing\n";
  } else {
    out << result.problems.size() << " problems; the first: " << result.problems.front().str() << '\n';
  }
}

void print_verification_json(const LogVerification& result, std::ostream& out) {
  const auto list = [](const std::vector<LogProblem>& problems) {
    CheckJson entries = CheckJson::array();
    for (const LogProblem& problem : problems)
      entries.push_back({{"file", problem.path},
                         {"byte", problem.offset < 0 ? CheckJson() : CheckJson(problem.offset)},
                         {"what", problem.what}});
    return entries;
  };
  out << CheckJson{{"good", result.good()},         {"attempts", result.attempts},
                   {"segments", result.segments},   {"rank_logs", result.rank_logs},
                   {"records", result.records},     {"bytes", result.bytes},
                   {"steps", result.steps},         {"first_step", result.first_step},
                   {"last_step", result.last_step}, {"problems", list(result.problems)},
                   {"notes", list(result.notes)}}
             .dump(2)
      << '\n';
}

void print_skip_plan(const SkipPlan& plan, std::ostream& out) {
  out << plan.why.sentence << "\n\n";
  using Cause = Attribution::Cause;
  const Cause cause = plan.why.cause;
  if (cause == Cause::LearningRate || cause == Cause::WeightChange || cause == Cause::Replica)
    out << "Its cause is not in the data (" << name_of(cause) << "): mend that before going on.\n";
  if (plan.checkpoint_step > 0) {
    out << "go back to the checkpoint of step " << plan.checkpoint_step << " ("
        << text::plural(plan.lost_steps, "step") << " will be computed again)\n";
  } else {
    out << "there is no checkpoint before it: start again in another run directory\n";
  }
  out << "leave out the batches of steps " << plan.first_step << " to " << plan.last_step << ": samples "
      << plan.skip_begin << " to " << plan.skip_end - 1 << " of the data order\n\n    " << plan.command
      << '\n';
}

void print_skip_plan_json(const SkipPlan& plan, std::ostream& out) {
  out << CheckJson{{"sentence", plan.why.sentence}, {"first_step", plan.first_step},
                   {"last_step", plan.last_step},   {"checkpoint_step", plan.checkpoint_step},
                   {"skip_begin", plan.skip_begin}, {"skip_end", plan.skip_end},
                   {"lost_steps", plan.lost_steps}, {"command", plan.command}}
             .dump(2)
      << '\n';
}

}  // namespace hybridmoe
