// hybridmoe-bench: the machine's limits, every operator and a whole training step against them, in one run.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <sstream>
#include <thread>
#include <vector>

#include "core/config/cuda_options.h"
#include "core/config/layers.h"
#include "core/config/load.h"
#include "core/config/validate.h"
#include "core/cuda_plugin.h"
#include "core/limits.h"
#include "parallel/device_groups.h"
#include "parallel/mesh.h"
#include "parallel/mpi_communicator.h"
#include "parallel/mpi_world.h"
#include "tools/exchange_bench.h"
#include "tools/operator_bench.h"
#include "tools/step_bench.h"

namespace hybridmoe {
namespace {

struct Options {
  std::string precision = "auto", size = "all", device = "cpu", filter, config;
  std::vector<std::string> overrides;
  int threads = 0;
  double seconds = 0.2, step_seconds = 5, skew = 1;
  bool no_operators = false, no_step = false, no_flush = false, exchange = false, telemetry = false;
  int hosts = 0, rounds = 15;
};

// 0: go on; else the exit status plus one.
int parse(int argc, char** argv, Options* options) {
  CLI::App app(
      "Measures the limit of matrix products and of copying, then every operator and a whole training step "
      "against "
      "them. Under mpirun all ranks measure at once, and rank 0 prints.");
  app.add_option("--precision", options->precision,
                 "bf16, f32, or auto: bf16 where it is multiplied natively")
      ->check(CLI::IsMember({"auto", "f32", "bf16"}))
      ->capture_default_str();
  app.add_option("--device", options->device, "cpu, or cuda: GPUs, which the ranks of a host take in turns")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--threads", options->threads,
                 "OpenMP threads per rank; 0: OMP_NUM_THREADS, else cores / ranks")
      ->capture_default_str();
  CLI::Option* size =
      app.add_option("--size", options->size,
                     "which built-in model: quickstart, d512, moe-1b-7b (for GPUs), or all of the first two")
          ->check(CLI::IsMember({"quickstart", "d512", "moe-1b-7b", "all"}))
          ->capture_default_str();
  app.add_option("--config", options->config,
                 "a model of your own (its vocabulary must be set); its data is not read")
      ->excludes(size);
  app.add_option("--set", options->overrides, "override a field: PATH=VALUE, repeatable")
      ->allow_extra_args(false)
      ->take_all();
  app.add_option("--filter", options->filter, "only operators whose name contains this");
  app.add_option("--seconds", options->seconds, "spent on each operator")->capture_default_str();
  app.add_option("--step_seconds", options->step_seconds, "spent on the training step")
      ->capture_default_str();
  app.add_option("--skew", options->skew,
                 "of the training step: multiply the routers' weights for a quarter of the experts by this")
      ->capture_default_str();
  app.add_flag("--no_operators", options->no_operators, "skip the operators");
  app.add_flag("--no_step", options->no_step, "skip the training step");
  app.add_flag("--telemetry", options->telemetry,
               "instead of the training step: what measuring and recording adds to it");
  app.add_flag("--exchange", options->exchange,
               "instead: the exchange of rows between ranks that share the experts, against MPI_Alltoallv");
  app.add_option("--rounds", options->rounds, "of the exchange")->capture_default_str();
  app.add_option("--hosts", options->hosts,
                 "take the ranks for so many hosts' (0: as they are), to try the hierarchical exchange")
      ->capture_default_str();
  app.add_flag("--no_flush", options->no_flush, "leave the caches warm between runs of an operator");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 1 : 3;
  }
  return 0;
}

// The models of docs/benchmarks.md: that of configs/quickstart.textproto and that of
// configs/bench-d512.textproto.
constexpr const char* kQuickstart =
    "name: 'quickstart' batch { sequences: 8 } model { layers: 4 d_model: 192 heads: 4 sequence_length: 256 "
    "vocabulary: 257 moe { experts: 8 top_k: 2 expert_hidden: 256 } }";
constexpr const char* kD512 =
    "name: 'd512' batch { sequences: 8 } model { layers: 8 d_model: 512 heads: 8 sequence_length: 512 "
    "vocabulary: 4096 moe { experts: 16 top_k: 2 expert_hidden: 512 } }";

// The shape of OLMoE-1B-7B (arXiv 2409.02060) with one of its layers; --set model.layers for more.
constexpr const char* kMoe1b7b =
    "name: 'moe-1b-7b' batch { sequences: 4 } model { layers: 1 d_model: 2048 heads: 16 sequence_length: "
    "4096 "
    "vocabulary: 50304 moe { experts: 64 top_k: 8 expert_hidden: 1024 } }";

std::vector<Config> models_of(const Options& options) {
  if (!options.config.empty()) return {load_config(options.config, options.overrides)};
  std::vector<Config> models;
  for (const char* text : {kQuickstart, kD512, kMoe1b7b}) {
    const Config model = parse_config_text(text, "built-in model", options.overrides);
    if (options.size == "all" ? text != kMoe1b7b : options.size == model.name()) models.push_back(model);
  }
  return models;
}

// The operators of a model with MoE layers, all sequences of a step in one micro-batch.
testing::BenchmarkSize operators_of(const Config& config) {
  const ModelConfig& model = config.model();
  testing::BenchmarkSize size;
  size.sequences = config.batch().sequences();
  size.sequence_length = model.sequence_length();
  size.d = model.d_model();
  size.heads = model.heads();
  size.kv_heads = kv_heads_of(model);
  size.head_dim = head_dim_of(model);
  size.experts = model.moe().experts();
  size.top_k = model.moe().top_k();
  size.hidden = model.moe().expert_hidden();
  size.vocabulary = padded_vocabulary_of(model.vocabulary());
  return size;
}

int threads_of(const Options& options, int ranks) {
  if (options.threads > 0) return options.threads;
  if (const char* set = std::getenv("OMP_NUM_THREADS")) return std::max(1, std::atoi(set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / ranks);
}

double all_reduced(Communicator& world, double value, ReduceOp op) {
  world.all_reduce(Tensor(&value, DType::F64, {1}), op, "bench limits").wait();
  return value;
}

// Both limits on all ranks at once, repeated until no rank's improves by a hundredth: another program on the
// machine makes a single measurement too low.
MachineLimits measure_limits(Backend& backend, Communicator& world) {
  MachineLimits limits;
  for (int round = 0; round < 10; ++round) {
    all_reduced(world, 0, ReduceOp::Sum);  // all ranks begin together
    const double products = measure_product_limit(backend);
    const bool better = products > 1.01 * limits.product_flops;
    limits.product_flops = std::max(limits.product_flops, products);
    if (all_reduced(world, better ? 1 : 0, ReduceOp::Max) == 0 && round >= 2) break;
  }
  all_reduced(world, 0, ReduceOp::Sum);
  limits.copy_bytes = measure_copy_limit(backend);
  return limits;
}

void print_limits(const MachineLimits& limits, Communicator& world, std::ostream& out) {
  const double least = -all_reduced(world, -limits.product_flops, ReduceOp::Max);
  const double products = all_reduced(world, limits.product_flops, ReduceOp::Sum);
  const double copies = all_reduced(world, limits.copy_bytes, ReduceOp::Sum);
  char text[200];
  std::snprintf(text, sizeof text,
                "limits: products %.1f GFLOP/s (%d ranks at once, the slowest %.1f); copying %.1f GB/s\n",
                products * 1e-9, world.size(), least * 1e-9, copies * 1e-9);
  out << text;
}

// Without a layout of its own the model's experts are dealt out to all ranks.
void run_exchange(const Options& options, const MpiWorld& ranks, Backend& backend, Config model,
                  std::ostream& out) {
  Communicator& world = ranks.communicator();
  ParallelConfig& parallel = *model.mutable_parallel();
  if (!parallel.has_expert() && !parallel.has_expert_tensor()) parallel.set_expert(world.size());
  complete(&model, model.model().vocabulary());
  const auto violations = validate(model, world.size(), false);
  require(violations.empty(), to_string(violations, model.name()));
  const Mesh mesh(layout_of(parallel, world.size()), kv_heads_of(model.model()));
  const MeshCommunicators communicators(mesh, world, ranks.make_groups(), ranks.hosts().of_rank);
  require(
      communicators.groups().expert->size() == world.size(),
      "--exchange measures ranks that share one set of experts: expert * expert_tensor must be their number");
  bench_exchange(backend, communicators.groups(), ranks, {.config = model, .rounds = options.rounds}, out);
}

// --set chooses its kernels for all models.
std::unique_ptr<Backend> make_gpu_backend(const Config& model, DType type, const MpiWorld& ranks) {
  CudaOptions options = cuda_options_of(model);
  options.compute_type = type;
  options.device = ranks.hosts().place_on_host(ranks.communicator().rank()) % cuda_device_count();
  return make_cuda_backend(options);
}

void run(const Options& options, const MpiWorld& ranks) {
  Communicator& world = ranks.communicator();
  std::ostringstream nowhere;
  std::ostream& out = world.rank() == 0 ? std::cout : nowhere;
  const bool on_gpu = options.device == "cuda", native = on_gpu || cpu_multiplies_bf16();
  const bool bf16 = options.precision == "bf16" || (options.precision == "auto" && native);
  const DType type = bf16 ? DType::BF16 : DType::F32;
  const std::vector<Config> models = models_of(options);
  const auto backend =
      on_gpu ? make_gpu_backend(models.front(), type, ranks)
             : make_cpu_backend({.compute_type = type, .threads = threads_of(options, world.size())});
  backend->set_progress_hook(
      [](void* all, Backend::Moment moment) {
        if (moment != Backend::Moment::Waited) static_cast<Communicator*>(all)->progress();
      },
      &world);
  out << backend->name() << ", " << name_of(backend->compute_type())
      << (bf16 && !native ? " (emulated: converted to f32)" : "") << '\n';
  if (options.exchange) {
    for (const Config& model : models) {
      out << "\n" << model.name() << '\n';
      run_exchange(options, ranks, *backend, model, out);
    }
    return;
  }
  const MachineLimits limits = measure_limits(*backend, world);
  print_limits(limits, world, out);
  for (const Config& model : models) {
    out << "\n" << model.name() << '\n';
    if (!options.no_operators) {
      bench_operators(*backend, limits,
                      {.size = operators_of(model),
                       .filter = options.filter,
                       .seconds = options.seconds,
                       .flush_caches = !options.no_flush},
                      out);
    }
    if (!options.no_step) {
      const auto violations = validate(model, world.size(), false);
      require(violations.empty(), to_string(violations, model.name()));
      const Mesh mesh(layout_of(model.parallel(), world.size()), kv_heads_of(model.model()));
      const MeshCommunicators communicators(mesh, world, ranks.make_groups());
      const StepBench bench{.config = model, .seconds = options.step_seconds, .skew = options.skew};
      const DeviceGroups groups(communicators.groups(), *backend);
      if (options.telemetry) {
        bench_telemetry(*backend, groups.groups(), bench, out);
      } else {
        bench_step(*backend, groups.groups(), limits.product_flops, bench, out);
      }
    }
  }
}

}  // namespace
}  // namespace hybridmoe

int main(int argc, char** argv) {
  hybridmoe::Options options;
  if (const int status = hybridmoe::parse(argc, argv, &options); status != 0) return status - 1;
  hybridmoe::MpiEnvironment mpi(&argc, &argv);
  try {
    const int part = options.hosts == 0 ? 0 : mpi.rank() * options.hosts / mpi.size();
    const std::string host = hybridmoe::this_host();
    const hybridmoe::MpiWorld world(MPI_COMM_WORLD,
                                    options.hosts == 0 ? host : hybridmoe::cat(host, " part ", part));
    hybridmoe::run(options, world);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "hybridmoe-bench: rank %d: %s\n", mpi.rank(), error.what());
    mpi.abort(1);
  }
}
