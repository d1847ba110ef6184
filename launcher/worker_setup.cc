// From the configuration to the first step: what a run needs, chosen and built on all ranks together.
#include <algorithm>
#include <cstdlib>
#include <glog/logging.h>
#include <thread>

#include "core/config/changes.h"
#include "core/config/cuda_options.h"
#include "core/config/layers.h"
#include "core/config/validate.h"
#include "core/cuda_plugin.h"
#include "launcher/exchange_choice.h"
#include "launcher/worker_state.h"
#include "parallel/mesh_table.h"
#include "parallel/row_exchange.h"

namespace hybridmoe {

namespace {

int threads_per_rank(const Config& config, const Communicator& world) {
  if (config.parallel().threads() > 0) return config.parallel().threads();
  if (const char* set = std::getenv("OMP_NUM_THREADS"); set != nullptr && std::atoi(set) > 0)
    return std::atoi(set);
  // Open MPI says how many of the job's ranks share this host.
  const char* local = std::getenv("OMPI_COMM_WORLD_LOCAL_SIZE");
  const int ranks_here = local != nullptr && std::atoi(local) > 0 ? std::atoi(local) : world.size();
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / ranks_here);
}

}  // namespace

void Worker::load() {
  together(world(), "configuration", [&] {
    require(!options_.run_dir.empty(), "--run_dir is missing");
    config_ = load_config(options_.config, options_.overrides, world().size());
    data_ = Dataset::open(config_);
    complete(&config_, data_->vocabulary());
    require_valid(config_, world().size(), options_.config);
  });
  const Mesh mesh(layout_of(config_.parallel(), world().size()), config_.model().kv_heads());
  communicators_.emplace(mesh, ranks_.communicator(), ranks_.make_groups(), ranks_.hosts().of_rank);
  watched_.emplace(communicators_->groups(), watching_.activity);
  groups_ = watched_->groups();
  if (mesh.layout() != Layout{.world = world().size()}) {
    say(world(), describe(mesh, layout_demands(config_), ranks_.hosts()));
  }
}

void Worker::open_run_directory() {
  together(world(), "run directory", [&] {
    if (first()) directory_.emplace(options_.run_dir, options_.resume);
  });
  together(world(), "checkpoint to resume from", [&] {
    if (!options_.resume) return;
    resume_from_ = checkpoint_to_resume(options_.run_dir, options_.resume_step);
    try {
      manifest_ = read_manifest(resume_from_->path);
    } catch (const Error& damage) {
      throw Error(damage.what() + advice_on_damage(options_.run_dir, resume_from_->step));
    }
    check_resumable();
  });
}

void Worker::check_resumable() const {
  const std::vector<std::string> changes = illegal_changes(manifest_.config(), config_);
  std::string text;
  for (const std::string& change : changes) text += "\n  " + change;
  require(changes.empty(), "--resume: the configuration differs from that of ", resume_from_->path,
          " in fields that must stay (docs/configuration.md says which may change):", text);
  DataConfig before;
  *before.mutable_skip() = manifest_.skip();
  require(same_samples(before, config_.data(), manifest_.samples_consumed()),
          "--resume: data.skip would change which of "
          "the ",
          manifest_.samples_consumed(),
          " samples were consumed so far; keep the old ranges and add only numbers "
          "that come later (hybridmoe-data batch prints the numbers of a step)");
  const LayoutRecord& layout = manifest_.layout();
  const ParallelConfig& parallel = config_.parallel();
  require(layout.world() == world().size() && layout.tensor() == parallel.tensor() &&
              layout.expert() == parallel.expert() && layout.expert_tensor() == parallel.expert_tensor(),
          "--resume: ", resume_from_->path, " was written by ", layout.world(),
          " ranks with parallel { tensor: ", layout.tensor(), " expert: ", layout.expert(),
          " expert_tensor: ", layout.expert_tensor(), " }, this job has ", world().size(),
          " ranks with parallel { tensor: ", parallel.tensor(), " expert: ", parallel.expert(),
          " expert_tensor: ", parallel.expert_tensor(), " }; start it with mpirun -np ", layout.world(),
          " and the same parallel sizes (this version cannot change the layout of a checkpoint)");
}

void Worker::start_watchdog() {
  const std::string problem = watching_.watchdog.start(
      world(), {.seconds = config_.parallel().watchdog_seconds(), .run_dir = options_.run_dir});
  LOG_IF(WARNING, !problem.empty()) << "nobody will report which rank is stuck or dead, and why: " << problem
                                    << "; training goes on";
}

// Decides for all ranks whether GPUs compute, and returns why.
std::string Worker::choose_device() {
  if (config_.device() == Config::CPU) return "as configured";
  if (config_.precision() == F64) return "F64 is the reference backend's";
  std::string lacking;
  try {
    devices_ = cuda_device_count();
  } catch (const Error& none) {
    lacking = none.what();
  }
  if (config_.device() == Config::CUDA) {
    world().agree(lacking, "devices");
    return "as configured";
  }
  // One rank without a GPU decides for all.
  const std::vector<std::string> all = world().gather_strings(lacking, "devices");
  for (int rank = 0; rank < std::ssize(all); ++rank) {
    if (all[rank].empty()) continue;
    devices_ = 0;
    const bool everywhere = std::count(all.begin(), all.end(), all[rank]) == std::ssize(all);
    return everywhere ? all[rank] : cat(all[rank], " (rank ", rank, ")");
  }
  return "every rank has a GPU";
}

// The compute type of all ranks, and why it is this one.
std::string Worker::choose_precision() {
  if (devices_ > 0) {
    precision_ = config_.precision() == AUTO ? BF16 : config_.precision();
    return config_.precision() == AUTO ? "GPUs multiply bf16" : "as configured";
  }
  // One rank whose CPU lacks bf16 products decides for all: they exchange weights in the compute type.
  std::int32_t lacking = cpu_multiplies_bf16() ? 0 : 1;
  world().all_reduce(Tensor(&lacking, DType::I32, {1}), ReduceOp::Max, "bf16 products").wait();
  const bool native = lacking == 0;
  std::string reason = "as configured";
  precision_ = config_.precision();
  if (precision_ == AUTO) {
    precision_ = native ? BF16 : F32;
    reason = native ? "every rank's CPU multiplies bf16" : "a rank's CPU does not multiply bf16";
  } else if (precision_ == BF16 && !native && !config_.emulate_bf16()) {
    precision_ = F32;
    reason =
        "BF16 was asked for, but a rank's CPU does not multiply bf16; emulate_bf16: true would imitate it";
  }
  return reason;
}

// A continued run computes in the type it began with, whatever these machines would choose.
void Worker::keep_precision(std::string* reason) {
  together(world(), "compute type", [&] {
    for (const MeasuredChoice& choice : manifest_.choice()) {
      if (choice.name() != "precision") continue;
      Precision before = F32;
      require(Precision_Parse(choice.value(), &before), "the checkpoint's precision ", choice.value(),
              " is unknown");
      if (before != precision_) *reason = "as the run began";
      precision_ = before;
    }
  });
}

void Worker::choose_transport() {
  if (!config_.model().has_moe() || groups_.expert->size() == 1) return;
  const MeasuredChoice* before = nullptr;
  for (const MeasuredChoice& choice : manifest_.choice()) {
    if (choice.name() == "exchange") before = &choice;
  }
  transport_ = choose_exchange(config_, *backend_, groups_, before);
}

void Worker::make_backend() {
  if (devices_ > 0) {
    const int place = ranks_.hosts().place_on_host(ranks_.communicator().rank());
    together(world(), "device", [&] {
      CudaOptions options = cuda_options_of(config_);
      options.compute_type = precision_ == BF16 ? DType::BF16 : DType::F32;
      options.device = place % devices_;
      backend_ = make_cuda_backend(options);
    });
  } else if (precision_ == F64) {
    backend_ = make_reference_backend();
  } else {
    backend_ = make_cpu_backend(
        {.compute_type = precision_ == BF16 ? DType::BF16 : DType::F32, .threads = threads_});
  }
}

// Whether tensors of GPUs move between ranks by NCCL, not through host memory.
bool Worker::use_nccl() const {
  const ParallelConfig::DeviceTransport wanted = config_.parallel().device_transport();
  if (devices_ == 0 || world().size() == 1 || wanted == ParallelConfig::STAGED) return false;
  std::string lacking;
  if (ranks_.hosts().place_on_host(ranks_.communicator().rank()) >= devices_) {
    lacking = cat("ranks share a GPU (", devices_, " on this host)");
  } else {
    try {
      make_nccl_id();
    } catch (const Error& failure) {
      lacking = failure.what();
    }
  }
  if (wanted == ParallelConfig::NCCL) {
    world().agree(lacking, "NCCL");
    return true;
  }
  const std::vector<std::string> all = world().gather_strings(lacking, "NCCL");
  for (int rank = 0; rank < std::ssize(all); ++rank) {
    if (all[rank].empty()) continue;
    say(world(), cat("tensors move through host memory: rank ", rank, ": ", all[rank]));
    return false;
  }
  return true;
}

void Worker::choose_backend() {
  threads_ = threads_per_rank(config_, world());
  std::string reason = choose_precision();
  keep_precision(&reason);
  if (options_.resume && manifest_.layout().threads() != threads_) {
    LOG_IF(WARNING, first()) << "the run had " << manifest_.layout().threads() << " threads per rank, now "
                             << threads_ << ": it goes on equal to rounding, not to the bit";
  }
  make_backend();
  if (use_nccl()) {
    device_groups_.emplace(groups_, *backend_, DeviceGroups::Nccl{.watched = &*watched_});
  } else {
    device_groups_.emplace(groups_, *backend_);
  }
  groups_ = device_groups_->groups();
  backend_->set_progress_hook(
      [](void* groups, Backend::Moment moment) { static_cast<DeviceGroups*>(groups)->progress(moment); },
      &*device_groups_);
  choose_transport();

  manifest_.clear_choice();
  MeasuredChoice* choice = manifest_.add_choice();
  choice->set_name("precision");
  choice->set_value(Precision_Name(precision_));
  choice->set_reason(reason);
  if (transport_) *manifest_.add_choice() = *transport_;
  LayoutRecord* layout = manifest_.mutable_layout();
  layout->set_world(world().size());
  layout->set_data(groups_.data->size());
  layout->set_tensor(groups_.tensor->size());
  layout->set_expert(groups_.expert->size() / groups_.expert_tensor);
  layout->set_expert_tensor(groups_.expert_tensor);
  layout->set_threads(threads_);
  const int hosts = ranks_.hosts().count();
  say(world(), cat(config_.name(), ": ", world().size(), world().size() == 1 ? " rank" : " ranks",
                   hosts > 1 ? cat(" on ", hosts, " hosts") : "", ", ", backend_->name(), ", precision ",
                   Precision_Name(precision_), " (", reason, ")"));
  if (transport_) say(world(), cat("exchange ", transport_->value(), ": ", transport_->reason()));
}

void Worker::build_trainer() {
  const ModelConfig& model = config_.model();
  together(world(), "memory plan", [&] {
    if (model.has_moe()) {
      ExchangeOptions options = exchange_options(config_.parallel());
      options.hierarchical =
          transport_ && transport_->value() == ParallelConfig::Exchange_Name(ParallelConfig::HIERARCHICAL);
      exchange_ = make_row_exchange(
          *backend_, groups_, model.moe().experts(), model.moe().top_k(),
          {.factor = model.moe().capacity_factor(), .by_position = model.moe().drop() == BY_POSITION},
          options);
    }
    trainer_ = std::make_unique<Trainer>(config_, *data_, *backend_, groups_, exchange_.get());
  });
  const ParameterCount count = parameter_count(model);
  say(world(), cat("model: ", model.layers(), " layers, ", count.total, " parameters, ", count.active,
                   " active; ", trainer_->tokens_per_step(), " tokens a step"));
  std::string plan =
      cat("memory per rank: ", mebibytes(static_cast<double>(trainer_->memory().bytes())), " =");
  for (const auto& [component, bytes] : trainer_->memory().by_component()) {
    plan += cat(" ", component, " ", mebibytes(static_cast<double>(bytes)), ",");
  }
  plan.pop_back();
  say(world(), plan);
}

void Worker::measure_limit() {
  world().barrier("before measuring the limit");
  double limit = measure_product_limit(*backend_);
  world().all_reduce(Tensor(&limit, DType::F64, {1}), ReduceOp::Sum, "limit").wait();
  limit_ = limit;
  char text[200];
  const double seconds = trainer_->flops_per_step() / limit_;
  std::snprintf(
      text, sizeof text,
      "limit: %.0f GFLOP/s of matrix products over all ranks; at that rate a step of %.1f GFLOP takes %.3f s "
      "(%.0f tokens/s)",
      limit_ / 1e9, trainer_->flops_per_step() / 1e9, seconds,
      static_cast<double>(trainer_->tokens_per_step()) / seconds);
  say(world(), text);
}

void Worker::restore() {
  try {
    restore_checkpoint(resume_from_->path, manifest_, world(), *trainer_);
  } catch (const SharedError& damage) {
    throw SharedError(damage.what() + advice_on_damage(options_.run_dir, resume_from_->step));
  }
  last_saved_ = resume_from_->step;
  say(world(), cat("resumed from ", resume_from_->path));
  together(world(), "later checkpoints", [&] {
    if (!first()) return;
    for (const std::string& path : set_aside_later_checkpoints(options_.run_dir, resume_from_->step)) {
      say(world(), cat("a later checkpoint is now ", path, "; delete it when you do not need it"));
    }
  });
}

void Worker::open_log() {
  RunHeader header;
  header.set_resume_step(trainer_->progress().step + 1);
  *header.mutable_config() = config_;
  *header.mutable_layout() = manifest_.layout();
  *header.mutable_choice() = manifest_.choice();
  header.set_code_version(HYBRIDMOE_VERSION);
  const auto add_library = [&](const char* name, const std::string& version) {
    LibraryVersion* library = header.add_library();
    library->set_name(name);
    library->set_version(version);
  };
  add_library("backend", backend_->name());
  add_library("MPI", mpi_version());
  add_library("protobuf", google::protobuf::internal::VersionString(GOOGLE_PROTOBUF_VERSION));
  if (manifest_.has_run_id()) header.set_run_id(manifest_.run_id());
  char host[256] = {};
  gethostname(host, sizeof host - 1);
  for (const std::string& name : world().gather_strings(host, "host names")) header.add_host(name);
  together(world(), "telemetry log", [&] {
    if (!first()) return;
    directory_->write_config(config_);
    if (!config_.telemetry().enabled()) return;
    recorder_ = std::make_unique<Recorder>(options_.run_dir, *trainer_, header, limit_);
    manifest_.set_run_id(recorder_->header().run_id());
  });
  manifest_.set_code_version(HYBRIDMOE_VERSION);
  history_ = open_rank_history(options_.run_dir, header, recorder_ ? &recorder_->header() : nullptr, world(),
                               &watching_.activity);
  if (history_ == nullptr) return;
  watching_.watchdog.set_last_words(
      [history = history_](const std::string& why) { history->write(EventRecord::OTHER, why); });
}

}  // namespace hybridmoe
