// The summary for programs.
#include <nlohmann/json.hpp>

#include "tools/log_summary.h"

namespace hybridmoe {
namespace {

using Json = nlohmann::ordered_json;

Json lost_json(const LostRecords& lost) {
  return {{"steps", lost.steps()},
          {"dense", lost.dense()},
          {"events", lost.events()},
          {"rank_samples", lost.rank_samples()}};
}

Json attempts_json(const RunSummary& summary) {
  Json attempts = Json::array();
  for (const RunLog::Attempt& attempt : summary.all_attempts) {
    attempts.push_back({{"attempt", attempt.header.attempt()},
                        {"started", attempt.header.wall_time()},
                        {"resume_step", attempt.header.resume_step()},
                        {"first_step", attempt.first_step},
                        {"last_step", attempt.last_step},
                        {"steps", attempt.steps},
                        {"superseded", attempt.superseded},
                        {"finished", attempt.finished},
                        {"lost", lost_json(attempt.lost)}});
  }
  return attempts;
}

Json events_json(const RunSummary& summary) {
  Json events = Json::array();
  for (const RunLog::TimedEvent& event : summary.events) {
    Json json = {{"kind", EventRecord::Kind_Name(event.event.kind())},
                 {"step", event.event.step()},
                 {"attempt", event.attempt},
                 {"superseded", event.superseded},
                 {"message", event.event.message()}};
    for (const NamedValue& value : event.event.value()) json["values"][value.name()] = value.value();
    events.push_back(json);
  }
  return events;
}

Json rank_logs_json(const RunSummary& summary) {
  Json logs = Json::array();
  for (const RankLog& log : summary.rank_logs) {
    Json parts = Json::array();
    for (const RankLog::Part& part : log.parts) {
      parts.push_back({{"kind", EventRecord::Kind_Name(part.why.kind())},
                       {"step", part.why.step()},
                       {"message", part.why.message()}});
    }
    logs.push_back({{"attempt", log.attempt},
                    {"rank", log.rank},
                    {"first_step", log.first_step()},
                    {"last_step", log.last_step()},
                    {"parts", parts}});
  }
  return logs;
}

}  // namespace

void print_summary_json(const RunSummary& summary, std::ostream& out) {
  Json json = {{"name", summary.header.config().name()},
               {"run_id", summary.header.run_id()},
               {"code_version", summary.header.code_version()},
               {"world", summary.header.layout().world()},
               {"bytes", summary.bytes},
               {"started", summary.started},
               {"last_record", summary.last_record},
               {"finished", summary.finished},
               {"steps", summary.steps},
               {"last_step", summary.last_step},
               {"planned_steps", summary.header.config().steps()},
               {"tokens", summary.tokens},
               {"training_seconds", summary.training_seconds},
               {"skipped", summary.skipped},
               {"clipped", summary.clipped},
               {"lost", lost_json(summary.lost)},
               {"attempts", attempts_json(summary)},
               {"events", events_json(summary)},
               {"rank_logs", rank_logs_json(summary)},
               {"scalars", Json::object()},
               {"problems", Json::array()}};
  for (const ScalarSummary& row : summary.scalars) {
    json["scalars"][row.name] = {{"unit", row.unit},
                                 {"first", row.first},
                                 {"last", row.last},
                                 {"median", row.median},
                                 {"minimum", row.minimum},
                                 {"maximum", row.maximum},
                                 {"maximum_step", row.maximum_step}};
  }
  if (summary.router.experts > 0) {
    json["router"] = {{"step", summary.router.step},
                      {"worst_max_violation", summary.router.worst_max_violation},
                      {"worst_layer", summary.router.worst_layer},
                      {"dead_experts", summary.router.dead_experts},
                      {"experts", summary.router.experts}};
  }
  for (const LogProblem& problem : summary.problems) json["problems"].push_back(problem.str());
  out << json.dump(2) << '\n';
}

}  // namespace hybridmoe
