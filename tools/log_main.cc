// hybridmoe-log: what the log of a run says. See docs/telemetry.md.
#include <CLI/CLI.hpp>
#include <iostream>

#include "core/error.h"
#include "tools/log_check.h"
#include "tools/log_export.h"
#include "tools/log_figure.h"
#include "tools/log_report.h"
#include "tools/log_summary.h"
#include "tools/log_tables.h"
#include "tools/log_tensorboard.h"
#include "tools/log_watch.h"
#include "tools/log_why.h"
#include "tools/output_file.h"

namespace hybridmoe {
namespace {

constexpr int kCorrupt = 3;  // exit status of verify
constexpr int kFailed = 3;   // of any command that could not do its work; 1 and 2 are verdicts of check

struct Options {
  std::string run, mode = "tolerate-tail", output, tensorboard;
  bool json = false, csv = false;
  std::int64_t step = 0;
  std::int64_t margin = 1;
  bool dead = false, complete = false;
  std::string rules, on = "fail";
  WatchRequest watch;
  std::vector<std::string> runs;
  CompareRequest compare;
  LogExport what;
};

LogReadOptions read_options(const Options& options) {
  LogReadOptions read;
  if (options.mode == "strict") read.mode = ReadMode::Strict;
  if (options.mode == "skip-corrupt") read.mode = ReadMode::SkipCorrupt;
  return read;
}

int summary(const Options& options) {
  LogReadOptions read = read_options(options);
  read.scalars_only = true;
  const RunLog log(find_log_directory(options.run), read);
  require(!log.attempts().empty(), options.run, ": the log holds no whole record yet");
  (options.json ? print_summary_json : print_summary)(summarize(log), std::cout);
  return 0;
}

int export_log(const Options& options) {
  if (!options.tensorboard.empty()) {
    const TensorBoardExport result =
        export_tensorboard(find_log_directory(options.run), read_options(options).mode, options.what.metrics,
                           options.tensorboard);
    std::cout << result.file << ": " << result.steps << " steps, " << result.values << " values\n";
    return 0;
  }
  const auto write = [&options](std::ostream& out) {
    (options.json ? export_json : export_csv)(find_log_directory(options.run), read_options(options),
                                              options.what, out);
  };
  if (options.output.empty()) {
    write(std::cout);
    std::cout.flush();
    require(std::cout.good(), "standard output: writing failed; is the disk full?");
  } else {
    write_output_file(options.output, write);
  }
  return 0;
}

int report(const Options& options) {
  write_output_file(options.output, [&options](std::ostream& out) {
    write_report(options.runs, read_options(options).mode, out);
  });
  std::cout << options.output << ": open it in a browser\n";
  return 0;
}

int verify(const Options& options) {
  const LogVerification result = verify_log(find_log_directory(options.run));
  (options.json ? print_verification_json : print_verification)(result, std::cout);
  return result.good() ? 0 : kCorrupt;
}

int why(const Options& options) {
  const Explanation explanation =
      explain(find_log_directory(options.run), read_options(options).mode, options.step);
  (options.json ? print_explanation_json : print_explanation)(explanation, std::cout);
  return 0;
}

int router(const Options& options) {
  constexpr std::size_t kPoints = 120;  // over time, in JSON
  const RouterReport report =
      report_routers(find_log_directory(options.run), read_options(options).mode, kPoints);
  if (options.json) {
    print_routers_json(report, std::cout);
  } else {
    print_routers(report, options.dead, std::cout);
  }
  return 0;
}

int compare(const Options& options) {
  std::vector<std::string> directories;
  for (const std::string& run : options.runs) directories.push_back(find_log_directory(run));
  const Comparison comparison = compare_runs(directories, read_options(options).mode, options.compare);
  if (!options.output.empty()) {
    write_output_file(options.output, [&](std::ostream& out) { draw_comparison(comparison, out); });
  }
  (options.json ? print_comparison_json : print_comparison)(comparison, std::cout);
  return 0;
}

HealthRules rules_of(const Options& options) {
  return options.rules.empty() ? HealthRules() : read_health_rules(options.rules);
}

int check(const Options& options) {
  const CheckResult result = check_run(options.run, rules_of(options), options.complete);
  (options.json ? print_check_json : print_check)(result, std::cout);
  return result.status();
}

int watch(Options options) {
  options.watch.run = options.run;
  options.watch.rules = rules_of(options);
  options.watch.json = options.json;
  options.watch.on = options.on == "warn" ? 1 : (options.on == "fail" ? 2 : kCheckCorrupt);
  return watch_run(options.watch, std::cout);
}

int skip_plan(const Options& options) {
  const SkipPlan plan = plan_skip(options.run, read_options(options).mode, options.step, options.margin);
  (options.json ? print_skip_plan_json : print_skip_plan)(plan, std::cout);
  return 0;
}

int run(int argc, char** argv) {
  CLI::App app("Reads the telemetry of a training run.");
  app.require_subcommand(1);
  Options options;
  const auto add_run = [&options](CLI::App* command) {
    command->add_option("RUN", options.run, "run directory (or its telemetry directory)")->required();
  };
  const auto add_mode = [&options](CLI::App* command) {
    command->add_option("--read", options.mode, "what to do about corrupt places (default: tolerate-tail)")
        ->check(CLI::IsMember({"strict", "tolerate-tail", "skip-corrupt"}));
  };
  CLI::App* summary_command =
      app.add_subcommand("summary", "What ran, how far it came, how healthy it looks");
  add_run(summary_command);
  add_mode(summary_command);
  summary_command->add_flag("--json", options.json, "for programs");

  CLI::App* export_command = app.add_subcommand("export", "Every step, as a table or as JSON");
  add_run(export_command);
  add_mode(export_command);
  CLI::Option* csv = export_command->add_flag("--csv", options.csv, "a row per step (default)");
  export_command->add_flag("--json", options.json, "one JSON object: header, steps, events")->excludes(csv);
  export_command
      ->add_option(
          "--tensorboard", options.tensorboard,
          "an event file for TensorBoard in this directory (default metrics: all of at most one axis)")
      ->excludes(csv);
  export_command->add_option(
      "--metric", options.what.metrics,
      "which metrics (repeatable; all: every one; default: the scalars, with --json all)");
  export_command->add_flag("--orphans", options.what.orphans,
                           "also steps that a later attempt computed again");
  export_command->add_option("--output", options.output, "file to write (default: standard output)");

  CLI::App* report_command = app.add_subcommand(
      "report", "One page of HTML that explains runs: losses, layers, router, timing, events, configuration");
  report_command->add_option("RUN", options.runs, "run directories; several are overlaid")->required();
  report_command->add_option("--html", options.output, "file to write")->required();
  add_mode(report_command);

  CLI::App* verify_command = app.add_subcommand(
      "verify", "Checks framing, checksums, definitions and that no step is missing; exit status 0 or 3");
  add_run(verify_command);
  verify_command->add_flag("--json", options.json, "for programs");

  CLI::App* why_command = app.add_subcommand(
      "why", "What went wrong: the first sign, its layer, tensor, data, lead over the loss");
  add_run(why_command);
  add_mode(why_command);
  why_command->add_option("--step", options.step, "the incident at or near this step (default: the first)")
      ->check(CLI::PositiveNumber);
  why_command->add_flag("--json", options.json, "for programs");

  CLI::App* router_command =
      app.add_subcommand("router", "Loads of the experts per MoE layer: balance, collapse, dead experts");
  add_run(router_command);
  add_mode(router_command);
  router_command->add_flag("--dead", options.dead, "only the experts that receive no token any more");
  router_command->add_flag("--json", options.json, "for programs");

  CLI::App* compare_command = app.add_subcommand("compare", "A metric of several runs side by side");
  compare_command->add_option("RUN", options.runs, "run directories")->required();
  add_mode(compare_command);
  compare_command->add_option("--metric", options.compare.metric, "which (default: grad_norm)");
  compare_command
      ->add_option("--by", options.compare.by, "what makes a row of a dense metric (default: layer)")
      ->check(CLI::IsMember({"layer", "kind", "element", "total"}));
  compare_command->add_option("--kind", options.compare.kinds, "tensor kinds to take (up,down; default: all)")
      ->delimiter(',');
  options.compare.at = {"1", "last"};
  compare_command->add_option("--at", options.compare.at, "steps, first, last (default: 1,last)")
      ->delimiter(',');
  compare_command->add_flag("--json", options.json, "for programs");
  compare_command->add_option("--svg", options.output, "also a picture, into this file");

  CLI::App* check_command = app.add_subcommand(
      "check", "Judges a run; exit status 0 ok, 1 warn, 2 fail, 3 the log is corrupt or incomplete");
  add_run(check_command);
  const auto add_rules = [&options](CLI::App* command) {
    command->add_option("--rules", options.rules,
                        "limits, protobuf text format (default: docs/telemetry.md)");
  };
  add_rules(check_command);
  check_command->add_flag("--complete", options.complete,
                          "the run must have ended in order, with all its steps");
  check_command->add_flag("--json", options.json, "for programs");

  CLI::App* watch_command =
      app.add_subcommand("watch", "Checks a run while it goes on; ends with it, with the status of check");
  add_run(watch_command);
  add_rules(watch_command);
  watch_command->add_option("--on", options.on, "what to run the command for (default: fail)")
      ->check(CLI::IsMember({"warn", "fail", "corrupt"}));
  watch_command->add_option("--exec", options.watch.command,
                            "shell command; gets HYBRIDMOE_RUN, _STATUS, _STEP and _MESSAGE");
  watch_command->add_option("--every", options.watch.every_seconds, "seconds between looks (default: 10)")
      ->check(CLI::Range(0.01, 86400.0));
  watch_command
      ->add_option("--stall", options.watch.stall_seconds,
                   "seconds without a record that are the finding `stalled` (fail; default: 600; 0: never)")
      ->check(CLI::NonNegativeNumber);
  watch_command
      ->add_option("--wait", options.watch.wait_seconds,
                   "seconds until a missing run or log is an error, status 3 (default: 60)")
      ->check(CLI::NonNegativeNumber);
  watch_command->add_flag("--json", options.json, "one object a line, for programs");

  CLI::App* skip_command =
      app.add_subcommand("skip-plan", "Which checkpoint to go back to, which samples to leave out, and how");
  add_run(skip_command);
  add_mode(skip_command);
  skip_command->add_option("--step", options.step, "the incident at or near this step (default: the first)")
      ->check(CLI::PositiveNumber);
  skip_command->add_option("--margin", options.margin, "steps to leave out on both sides of it (default: 1)")
      ->check(CLI::NonNegativeNumber);
  skip_command->add_flag("--json", options.json, "for programs");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  if (*summary_command) return summary(options);
  if (*export_command) return export_log(options);
  if (*report_command) return report(options);
  if (*why_command) return why(options);
  if (*router_command) return router(options);
  if (*compare_command) return compare(options);
  if (*check_command) return check(options);
  if (*watch_command) return watch(options);
  if (*skip_command) return skip_plan(options);
  return verify(options);
}

}  // namespace
}  // namespace hybridmoe

int main(int argc, char** argv) {
  try {
    return hybridmoe::run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "hybridmoe-log: " << error.what() << '\n';
    return hybridmoe::kFailed;
  }
}
