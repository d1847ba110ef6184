#include "launcher/worker.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <glog/logging.h>
#include <memory>
#include <optional>
#include <thread>
#include <unistd.h>

#include "core/config/changes.h"
#include "core/config/layers.h"
#include "core/config/load.h"
#include "core/config/validate.h"
#include "core/cuda_plugin.h"
#include "core/limits.h"
#include "launcher/checkpoint.h"
#include "launcher/exchange_choice.h"
#include "launcher/rank_history.h"
#include "launcher/recorder.h"
#include "launcher/run_directory.h"
#include "launcher/trainer.h"
#include "parallel/device_groups.h"
#include "parallel/mesh.h"
#include "parallel/mesh_table.h"
#include "parallel/row_exchange.h"
#include "parallel/watched_communicator.h"

namespace hybridmoe {

namespace {

// A line for the user, from rank 0.
void say(const Communicator& world, const std::string& text) {
  if (world.rank() != 0) return;
  std::fputs((text + "\n").c_str(), stdout);
  std::fflush(stdout);
}

// Runs `work` on every rank; when it throws on any of them, all ranks throw.
template <class Work>
void together(Communicator& world, const char* label, const Work& work) {
  std::string error;
  try {
    work();
  } catch (const std::exception& failure) {
    error = failure.what();
  }
  world.agree(error, label);
}

// Bytes of "VmRSS:" or "VmHWM:" of this process.
double process_memory(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(field, 0) == 0) return 1024 * std::stod(line.substr(field.size()));
  }
  return 0;
}

std::string mebibytes(double bytes) {
  return cat(static_cast<std::int64_t>(bytes / (1 << 20) + 0.5), " MiB");
}

int threads_per_rank(const Config& config, const Communicator& world) {
  if (config.parallel().threads() > 0) return config.parallel().threads();
  if (const char* set = std::getenv("OMP_NUM_THREADS"); set != nullptr && std::atoi(set) > 0)
    return std::atoi(set);
  // Open MPI says how many of the job's ranks share this host.
  const char* local = std::getenv("OMPI_COMM_WORLD_LOCAL_SIZE");
  const int ranks_here = local != nullptr && std::atoi(local) > 0 ? std::atoi(local) : world.size();
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / ranks_here);
}

class Worker {
 public:
  Worker(const TrainOptions& options, const MpiWorld& ranks, const Watching& watching,
         const std::function<std::string()>& stop_requested)
      : options_(options), ranks_(ranks), watching_(watching), stop_requested_(stop_requested) {}

  int run();
  // An error ends this rank: its history is written.
  void failed(const std::string& error) { leave_history(EventRecord::OTHER, error); }

 private:
  void load();
  std::string choose_device();
  std::string choose_precision();
  void keep_precision(std::string* reason);
  void make_backend();
  DeviceTransport choose_device_transport() const;
  void start_watchdog();
  void choose_backend();
  void choose_transport();
  void open_run_directory();
  void check_resumable() const;
  void build_trainer();
  void measure_limit();
  void open_log();
  void restore();
  void train();
  StepResult step();
  void leave_history(EventRecord::Kind kind, const std::string& why);
  void rescue(const std::string& error);
  bool after_step(const StepResult& result);
  void save();
  void evaluate();
  void report_loads(const StepResult& result);
  void report_faults(const StepResult& result);
  int finish();
  void event(EventRecord::Kind kind, const std::string& message,
             std::initializer_list<std::pair<const char*, double>> values = {});
  // Of all ranks; watched as soon as the groups are made.
  Communicator& world() const { return groups_.world != nullptr ? *groups_.world : ranks_.communicator(); }
  bool first() const { return world().rank() == 0; }

  const TrainOptions& options_;
  const MpiWorld& ranks_;
  std::optional<MeshCommunicators> communicators_;
  const Watching& watching_;
  std::optional<WatchedGroups> watched_;
  Groups groups_;
  std::function<std::string()> stop_requested_;
  Config config_;
  std::unique_ptr<Dataset> data_;
  int threads_ = 1;
  Precision precision_ = F32;
  int devices_ = 0;  // GPUs of this host, when they are what computes
  std::unique_ptr<Backend> backend_;
  std::optional<DeviceGroups> device_groups_;
  std::optional<MeasuredChoice> transport_;  // of the exchange; without one: nothing moves
  std::unique_ptr<RowExchange> exchange_;
  std::optional<RunDirectory> directory_;  // on rank 0
  std::optional<CheckpointEntry> resume_from_;
  CheckpointManifest manifest_;  // of the checkpoint resumed from, then the template of those saved
  std::unique_ptr<Trainer> trainer_;
  double limit_ = 0;  // of all ranks together, operations per second
  double memory_before_plan_ = 0;
  std::unique_ptr<Recorder> recorder_;    // on rank 0
  std::shared_ptr<RankHistory> history_;  // shared with the watchdog; null: not wanted
  std::optional<ProgressLine> progress_;
  std::int64_t most_slots_ = 0;  // of a layer on this rank, that were reported
  std::int64_t last_saved_ = -1, last_evaluated_ = -1;
  double first_loss_ = 0, last_loss_ = 0;
  bool lost_something_ = false;
  std::string stopped_by_;
};

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
    return world().size() == 1 ? all[rank] : cat(all[rank], " (rank ", rank, ")");
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
      backend_ = make_cuda_backend(
          {.compute_type = precision_ == BF16 ? DType::BF16 : DType::F32, .device = place % devices_});
    });
  } else if (precision_ == F64) {
    backend_ = make_reference_backend();
  } else {
    backend_ = make_cpu_backend(
        {.compute_type = precision_ == BF16 ? DType::BF16 : DType::F32, .threads = threads_});
  }
}

// How tensors of GPUs move between ranks.
DeviceTransport Worker::choose_device_transport() const {
  const ParallelConfig::DeviceTransport wanted = config_.parallel().device_transport();
  if (devices_ == 0 || world().size() == 1 || wanted == ParallelConfig::STAGED)
    return DeviceTransport::Staged;
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
    return DeviceTransport::Nccl;
  }
  const std::vector<std::string> all = world().gather_strings(lacking, "NCCL");
  for (int rank = 0; rank < std::ssize(all); ++rank) {
    if (all[rank].empty()) continue;
    say(world(), cat("tensors move through host memory: rank ", rank, ": ", all[rank]));
    return DeviceTransport::Staged;
  }
  return DeviceTransport::Nccl;
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
  device_groups_.emplace(groups_, *backend_, choose_device_transport());
  groups_ = device_groups_->groups();
  backend_->set_progress_hook([](void* world) { static_cast<Communicator*>(world)->progress(); }, &world());
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
  LibraryVersion* library = header.add_library();
  library->set_name("backend");
  library->set_version(backend_->name());
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

void Worker::leave_history(EventRecord::Kind kind, const std::string& why) {
  if (history_ != nullptr && !history_->write(kind, why)) lost_something_ = true;
}

void Worker::event(EventRecord::Kind kind, const std::string& message,
                   std::initializer_list<std::pair<const char*, double>> values) {
  if (recorder_) recorder_->event(kind, trainer_->progress().step, message, values);
}

void Worker::save() {
  groups_.mark_phase("saving");
  const std::int64_t step = trainer_->progress().step;
  const SaveResult result = save_checkpoint(options_.run_dir, manifest_, world(), *trainer_);
  if (result.saved) {
    last_saved_ = step;
    say(world(), cat("saved ", result.path, " in ", static_cast<int>(result.seconds * 1000), " ms"));
    event(EventRecord::CHECKPOINT_SAVED, result.path, {{"seconds", result.seconds}});
    LOG_IF(WARNING, !result.warning.empty()) << "older checkpoints were not removed: " << result.warning;
    return;
  }
  lost_something_ = true;
  LOG_IF(ERROR, first()) << "the checkpoint of step " << step << " could not be saved: " << result.error
                         << "; training goes on, older checkpoints are untouched";
  event(EventRecord::CHECKPOINT_FAILED, result.error);
}

void Worker::evaluate() {
  groups_.mark_phase("evaluation");
  const Evaluation result = trainer_->evaluate();
  last_evaluated_ = result.step;
  char text[200];
  std::snprintf(text, sizeof text, "evaluation at step %lld: loss %.4f", static_cast<long long>(result.step),
                result.loss);
  std::string line = text;
  if (result.bits_per_byte >= 0) {
    std::snprintf(text, sizeof text, ", %.4f bits per byte", result.bits_per_byte);
    line += text;
  }
  say(world(), cat(line, " (", result.tokens, " held-out tokens)"));
  event(EventRecord::EVALUATION, line, {{"loss", result.loss}, {"bits_per_byte", result.bits_per_byte}});
}

// A router that sends this rank more than the memory plan counts on: said once, and again whenever it
// doubles.
void Worker::report_loads(const StepResult& result) {
  const ModelStatistics::MoeLayer* most = nullptr;
  for (const auto& layer : result.model.moe) {
    if (most == nullptr || layer.slots > most->slots) most = &layer;
  }
  if (most == nullptr || most->slots <= std::max(most->expected_slots, 2 * most_slots_)) return;
  most_slots_ = most->slots;
  LOG(INFO) << "step " << result.step << ": layer " << most->layer << " sent rank " << world().rank() << " "
            << most->slots << " slots, the memory plan counts on " << most->expected_slots
            << "; memory grows (parallel.expected_load, parallel.load_limit)";
}

// What a step found wrong, said by rank 0; the recorder has it too.
void Worker::report_faults(const StepResult& result) {
  if (result.skipped) {
    const std::string origin = nonfinite_origin(result, trainer_->parameters().table()).message;
    LOG_IF(WARNING, first()) << "step " << result.step
                             << ": a gradient was not finite, the update is skipped: " << origin;
    leave_history(EventRecord::SKIP, "gradient not finite: " + origin);
  }
  if (!first()) return;
  const StepMeasures& measures = result.measures;
  for (std::size_t i = 0; i < std::min(measures.mismatches.size(), kMostMismatches); ++i) {
    LOG(ERROR) << "replicas differ: " << measures.mismatches[i].message;
  }
  if (!measures.table_error.empty()) LOG(ERROR) << "gradient norms are wrong: " << measures.table_error;
}

// Returns whether training goes on.
bool Worker::after_step(const StepResult& result) {
  progress_->add(result);
  if (recorder_) recorder_->step(result);
  report_faults(result);
  report_loads(result);
  if (first_loss_ == 0) first_loss_ = result.cross_entropy;
  last_loss_ = result.cross_entropy;
  const bool last = result.step >= config_.steps();
  const std::int64_t every = std::max(1, config_.telemetry().progress_every());
  if (last || result.stop_requested || result.step % every == 0) say(world(), progress_->str());
  if (result.stop_requested) {
    stopped_by_ = stop_requested_();
    if (stopped_by_.empty()) stopped_by_ = "a signal on another rank";
    say(world(), cat("stopping after step ", result.step, " (", stopped_by_, ")"));
    event(EventRecord::SIGNAL, stopped_by_);
    return false;
  }
  const std::int64_t evaluate_every = config_.evaluation().every(), save_every = config_.checkpoint().every();
  if (save_every > 0 && result.step % save_every == 0 && !last) save();
  if (evaluate_every > 0 && result.step % evaluate_every == 0) evaluate();
  return !last;
}

void Worker::train() {
  progress_.emplace(*trainer_, limit_);
  if (resume_from_) event(EventRecord::RESTART, resume_from_->path);
  if (config_.checkpoint().before_first_step() && trainer_->progress().step == 0) save();
  if (trainer_->progress().step >= config_.steps()) {
    say(world(), cat("nothing to do: ", trainer_->progress().step, " of ", config_.steps(),
                     " steps are done; raise `steps` to go on"));
  } else {
    while (after_step(step())) {
    }
  }
  if (stopped_by_.empty() && last_evaluated_ != trainer_->progress().step && data_->held_out_samples() > 0)
    evaluate();
}

StepResult Worker::step() {
  if (history_ != nullptr) {
    const Progress& done = trainer_->progress();
    const std::int64_t samples = trainer_->own_samples(done.samples_consumed);
    history_->begin(done.step + 1, samples, samples + trainer_->local_sequences());
  }
  StepResult result = trainer_->step(!stop_requested_().empty());
  if (history_ != nullptr) history_->end(result);
  return result;
}

// Training cannot go on, on any rank (a token that is none, found in the middle of the run). A step that
// fails so has changed nothing yet: what was trained up to it is saved.
void Worker::rescue(const std::string& error) {
  trainer_->wait_weights();
  const std::int64_t step = trainer_->progress().step;
  event(EventRecord::OTHER, error);
  if (step > 0 && last_saved_ != step) save();
  std::string text = cat(error, "\ntraining ended after step ", step);
  if (last_saved_ >= 0) {
    text += cat("; ", checkpoint_path(options_.run_dir, last_saved_),
                " is kept: when the cause is removed, --resume goes on from there");
  }
  throw SharedError(text);
}

int Worker::finish() {
  trainer_->wait_weights();
  const std::int64_t step = trainer_->progress().step;
  if (last_saved_ != step) save();
  const double peak = process_memory("VmHWM:");
  say(world(),
      cat("memory: process peak ", mebibytes(peak), ", of which ", mebibytes(peak - memory_before_plan_),
          " beyond what it held before the plan of ",
          mebibytes(static_cast<double>(trainer_->memory().bytes())), "; ",
          mebibytes(static_cast<double>(trainer_->memory().resident_bytes())), " of the plan were touched"));
  event(EventRecord::END, stopped_by_.empty() ? "all steps are done" : "stopped by " + stopped_by_);
  if (recorder_) {
    const CloseReport report = recorder_->close();
    if (!report.complete()) {
      LOG(ERROR) << report.str();
      lost_something_ = true;
    }
  }
  if (first_loss_ != 0) {
    char text[120];
    std::snprintf(text, sizeof text, "loss %.4f at the start, %.4f at the end", first_loss_, last_loss_);
    say(world(), text);
  }
  say(world(), cat(stopped_by_.empty() ? "done: " : "stopped: ", step, " of ", config_.steps(),
                   " steps; run directory ", options_.run_dir));
  std::int32_t lost = lost_something_ ? 1 : 0;
  world().all_reduce(Tensor(&lost, DType::I32, {1}), ReduceOp::Max, "exit status").wait();
  return lost;
}

int Worker::run() {
  load();
  const std::string reason = choose_device();
  say(world(), cat("device ", devices_ > 0 ? "CUDA" : "CPU", ": ", reason));
  open_run_directory();
  start_watchdog();
  choose_backend();
  build_trainer();
  measure_limit();
  memory_before_plan_ = process_memory("VmRSS:");
  together(world(), "memory", [&] { trainer_->start(); });
  if (resume_from_) restore();
  open_log();
  try {
    train();
  } catch (const SharedError& error) {
    rescue(error.what());
  }
  return finish();
}

}  // namespace

int run_worker(const TrainOptions& options, const MpiWorld& ranks, const Watching& watching,
               const std::function<std::string()>& stop_requested) {
  Worker worker(options, ranks, watching, stop_requested);
  try {
    return worker.run();
  } catch (const std::exception& error) {
    worker.failed(error.what());
    throw;
  }
}

}  // namespace hybridmoe
