// hybridmoe-watchdog: the collector of a job's watchdogs (parallel/watchdog/collector.h). hybridmoe-train
// starts it.
#include <CLI/CLI.hpp>
#include <cstdio>

#include "parallel/watchdog/collector_process.h"

int main(int argc, char** argv) {
  CLI::App app(
      "Watches the ranks of a training job and reports the first failure. hybridmoe-train starts it; there "
      "is "
      "no need to call it.");
  hybridmoe::watchdog::CollectorOptions options;
  app.add_option("--ranks", options.ranks, "of the job")->required()->check(CLI::PositiveNumber);
  app.add_option("--seconds", options.seconds, "longest wait in one collective")
      ->required()
      ->check(CLI::PositiveNumber);
  app.add_option("--run_dir", options.run_dir, "where failure-NNN.txt is written")->required();
  app.add_flag("--loopback_only", options.loopback_only, "all ranks are on this host");
  app.footer(
      "\nStandard output: where it listens, as a serialized CollectorOffer (proto/watchdog.proto). Standard "
      "error: the report.\nExit status 0: every rank ended in order; 1: there was a failure.");
  CLI11_PARSE(app, argc, argv);
  try {
    return hybridmoe::watchdog::collector_main(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "hybridmoe-watchdog: %s\n", error.what());
    return 1;
  }
}
