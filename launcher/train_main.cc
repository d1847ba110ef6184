// hybridmoe-train: the worker that mpirun starts, once per device. Without mpirun it is a world of one rank.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <glog/logging.h>
#include <sstream>

#include "core/config/load.h"
#include "launcher/worker.h"
#include "parallel/mpi_communicator.h"
#include "parallel/mpi_world.h"
#include "parallel/stop_signal.h"
#include "parallel/watchdog/watchdog.h"
#include "parallel/watched_communicator.h"

namespace {

// Before MPI is started, so that a wrong command line is answered without it: the launchers' own numbering.
bool first_of_job() {
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"}) {
    if (const char* rank = std::getenv(name)) return std::atoi(rank) == 0;
  }
  return true;
}

int parse(int argc, char** argv, hybridmoe::TrainOptions* options) {
  CLI::App app("Trains a mixture-of-experts transformer. Start it with mpirun -np N, or alone as one rank.");
  app.add_option("--config", options->config, "configuration, protobuf text format (configs/)")->required();
  app.add_option("--run_dir", options->run_dir, "directory for checkpoints and telemetry")->required();
  app.add_flag("--resume", options->resume, "continue from the newest checkpoint in --run_dir");
  app.add_option("--resume_step", options->resume_step,
                 "continue from the checkpoint of this step instead; later ones are set aside (renamed)");
  app.add_option("--set", options->overrides, "override a field: PATH=VALUE, repeatable")
      ->allow_extra_args(false)
      ->take_all();
  app.footer("\n" + hybridmoe::override_grammar() +
             "\nSIGUSR1 to mpirun, or SIGTERM or SIGINT to a rank, finish the step, save a checkpoint and "
             "exit with 0.");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    std::ostringstream nowhere;
    return (first_of_job() ? app.exit(error) : app.exit(error, nowhere, nowhere)) == 0 ? -1 : 2;
  }
  options->resume = options->resume || options->resume_step;
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const hybridmoe::StopSignal stop;  // first: a signal before it would end the rank
  FLAGS_logtostderr = true;
  google::InitGoogleLogging(argv[0]);
  hybridmoe::TrainOptions options;
  options.program = argv[0];
  if (const int status = parse(argc, argv, &options); status != 0) return status < 0 ? 0 : status;

  hybridmoe::Activity activity;
  hybridmoe::Watchdog watchdog(activity);
  hybridmoe::MpiEnvironment mpi(&argc, &argv);
  const auto end_job = [&](const std::string& error) {
    std::fprintf(stderr, "hybridmoe-train: rank %d: %s\n", mpi.rank(), error.c_str());
    watchdog.failed(error);
    mpi.abort(1);
  };
  try {
    const hybridmoe::MpiWorld world;
    try {
      return hybridmoe::run_worker(options, world, {activity, watchdog, end_job},
                                   [&] { return stop.name(); });
    } catch (const hybridmoe::SharedError& error) {
      // Every rank has the same message: one of them prints it, and all end in order.
      if (mpi.rank() == 0) std::fprintf(stderr, "hybridmoe-train: %s\n", error.what());
      return 1;
    }
  } catch (const std::exception& error) {
    end_job(error.what());
  }
}
