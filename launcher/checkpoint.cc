#include "launcher/checkpoint.h"

#include <chrono>
#include <functional>
#include <map>

#include "core/telemetry/log_writer.h"

namespace hybridmoe {

namespace {

// A part of the state: how it is written to a file, and filled from one (part by part, as it is read).
struct StatePiece {
  ShardPiece stored;
  std::function<void(const UsePart& fill)> write;
};

StatePiece tensor_piece(Trainer& trainer, const Tensor& tensor) {
  return {{tensor.dtype, tensor.shape,
           [&trainer, tensor](const UsePart& use) { trainer.host().read(tensor, use); }},
          [&trainer, tensor](const UsePart& fill) { trainer.host().write(tensor, fill); }};
}

// The file has the masters themselves, however this run keeps them.
StatePiece masters_piece(Trainer& trainer, const ParameterStore::Bucket& bucket) {
  const std::int64_t count = bucket.owned_end - bucket.owned_begin;
  return {
      {bucket.m.dtype,
       {count},
       [&trainer, &bucket, count](const UsePart& use) { trainer.masters().read(bucket, 0, count, use); }},
      [&trainer, &bucket, count](const UsePart& fill) { trainer.masters().update(bucket, 0, count, fill); }};
}

// The arrays of a shard file: state arrays that hold every bucket's owned elements one after the other, and
// the replicated router biases of rank 0.
using State = std::map<std::string, std::vector<StatePiece>>;

std::vector<StatePiece> biases_of(Trainer& trainer) {
  std::vector<StatePiece> pieces;
  for (const Tensor& bias : trainer.router_biases()) pieces.push_back(tensor_piece(trainer, bias));
  return pieces;
}

State state_of(Trainer& trainer, int rank) {
  State arrays;
  for (const auto& bucket : trainer.parameters().buckets()) {
    arrays["master"].push_back(masters_piece(trainer, bucket));
    arrays["adam_m"].push_back(tensor_piece(trainer, bucket.m));
    arrays["adam_v"].push_back(tensor_piece(trainer, bucket.v));
  }
  const std::vector<StatePiece> biases = biases_of(trainer);
  if (rank == 0 && !biases.empty()) arrays["router_bias"] = biases;
  return arrays;
}

// The numbers of the manifest's parameters, by specification: parts of one parameter share its number.
std::vector<int> parameter_numbers(const ParameterStore& parameters) {
  std::vector<int> numbers;
  std::map<std::string, int> known;
  for (ParameterStore::Id id = 0; id < parameters.size(); ++id) {
    numbers.push_back(
        known.try_emplace(parameters.spec(id).name, static_cast<int>(known.size())).first->second);
  }
  return numbers;
}

void add_slices(Trainer& trainer, ShardRecord* record) {
  const std::vector<int> numbers = parameter_numbers(trainer.parameters());
  std::int64_t offset = 0;
  for (const auto& bucket : trainer.parameters().buckets()) {
    for (const auto& range : bucket.owned) {
      OwnedSlice* slice = record->add_slice();
      slice->set_parameter(numbers[range.parameter]);
      slice->set_begin(range.global_begin);
      slice->set_end(range.global_begin + range.length);
      slice->set_array_offset(offset + range.shard_begin);
    }
    offset += bucket.owned_end - bucket.owned_begin;
  }
}

void add_parameters(Trainer& trainer, CheckpointManifest* manifest) {
  const std::vector<int> numbers = parameter_numbers(trainer.parameters());
  for (ParameterStore::Id id = 0; id < trainer.parameters().size(); ++id) {
    const ParameterSpec& spec = trainer.parameters().spec(id);
    if (numbers[id] < manifest->parameter_size()) continue;  // another part of it
    ParameterRecord* record = manifest->add_parameter();
    record->set_name(spec.name);
    for (int i = 0; i < spec.global_shape.rank; ++i) record->add_shape(spec.global_shape[i]);
  }
}

// Runs `work` on this rank; returns the error text, empty when it went well.
std::string attempt(const std::function<void()>& work) {
  try {
    work();
    return {};
  } catch (const std::exception& failure) {
    return failure.what();
  }
}

// All ranks' failures, the same text on every rank. Any other exception is this rank's alone and must end the
// job.
std::string shared_failure(Communicator& world, const std::string& mine, const char* label) {
  try {
    world.agree(mine, label);
    return {};
  } catch (const SharedError& failure) {
    return failure.what();
  }
}

// State is read by position, so the positions must be those of this program's layout.
void require_same_layout(const std::string& path, const CheckpointManifest& manifest,
                         const ShardReader& shard, int rank, Trainer& trainer) {
  CheckpointManifest expected;
  add_parameters(trainer, &expected);
  ShardRecord record;
  add_slices(trainer, &record);
  bool same = manifest.parameter_size() == expected.parameter_size() && rank < manifest.shard_size() &&
              manifest.shard(rank).slice_size() == record.slice_size();
  for (int i = 0; same && i < expected.parameter_size(); ++i) {
    same = manifest.parameter(i).SerializeAsString() == expected.parameter(i).SerializeAsString();
  }
  for (int i = 0; same && i < record.slice_size(); ++i) {
    same = manifest.shard(rank).slice(i).SerializeAsString() == record.slice(i).SerializeAsString();
  }
  for (auto& [name, pieces] : state_of(trainer, rank)) {
    const DType dtype = pieces.front().stored.dtype;
    std::int64_t bytes = 0;
    for (const StatePiece& piece : pieces) bytes += piece.stored.shape.elements() * size_of(dtype);
    same = same && shard.find(name).bytes() == bytes && shard.find(name).dtype() == name_of(dtype);
  }
  require(
      same, path,
      ": its parameters lie otherwise than in this version of the program; continue with the version that "
      "wrote it (",
      manifest.code_version(), ")");
}

ShardRecord write_state(const std::string& run_dir, int rank, Trainer& trainer) {
  std::vector<ShardArray> arrays;
  for (const auto& [name, pieces] : state_of(trainer, rank)) {
    std::vector<ShardPiece> stored;
    for (const StatePiece& piece : pieces) stored.push_back(piece.stored);
    arrays.push_back({name, std::move(stored)});
  }
  ShardRecord record;
  record.set_rank(rank);
  record.set_file(shard_name(rank));
  const std::string building = checkpoint_building_path(run_dir, trainer.progress().step);
  const ShardInfo info = write_shard(building + "/" + record.file(), arrays);
  record.set_bytes(info.bytes);
  record.set_checksum(info.checksum);
  add_slices(trainer, &record);
  return record;
}

void write_manifest(const std::string& run_dir, const CheckpointManifest& run,
                    const std::vector<std::string>& records, Trainer& trainer) {
  CheckpointManifest manifest = run;
  manifest.set_step(trainer.progress().step);
  manifest.set_wall_time(wall_time());
  manifest.set_applied_steps(trainer.progress().applied_steps);
  manifest.set_samples_consumed(trainer.progress().samples_consumed);
  *manifest.mutable_skip() = trainer.config().data().skip();
  *manifest.mutable_config() = trainer.config();
  manifest.clear_parameter();  // `run` may be that of an older checkpoint
  manifest.clear_shard();
  add_parameters(trainer, &manifest);
  for (const std::string& bytes : records) {
    require(manifest.add_shard()->ParseFromString(bytes), "a rank's shard record is damaged");
  }
  finish_checkpoint(run_dir, manifest);
}

void read_state(const std::string& path, const CheckpointManifest& manifest, int rank, Trainer& trainer) {
  const auto read = [&](const ShardReader& shard, const std::string& name,
                        const std::vector<StatePiece>& pieces) {
    shard.verify(name);
    std::int64_t begin = 0;
    for (const StatePiece& piece : pieces) {
      piece.write([&](const Tensor& part) {
        shard.read_unverified(name, begin, part);
        begin += part.elements();
      });
    }
  };
  const ShardReader shard = open_shard(path, manifest, rank);
  require_same_layout(path, manifest, shard, rank, trainer);
  for (auto& [name, pieces] : state_of(trainer, rank)) read(shard, name, pieces);
  const std::vector<StatePiece> biases = biases_of(trainer);
  if (rank != 0 && !biases.empty()) read(open_shard(path, manifest, 0), "router_bias", biases);
}

}  // namespace

SaveResult save_checkpoint(const std::string& run_dir, const CheckpointManifest& run, Communicator& world,
                           Trainer& trainer) {
  const auto begin = std::chrono::steady_clock::now();
  const std::int64_t step = trainer.progress().step;
  const bool first = world.rank() == 0;
  SaveResult result;
  result.path = checkpoint_path(run_dir, step);
  const auto on_first = [&](const char* label, const std::function<void()>& work) {
    result.error = shared_failure(world, first ? attempt(work) : std::string(), label);
  };
  on_first("checkpoint begin", [&] { begin_checkpoint(run_dir, step); });
  ShardRecord record;
  if (result.error.empty()) {
    const std::string mine = attempt([&] { record = write_state(run_dir, world.rank(), trainer); });
    result.error = shared_failure(world, mine, "checkpoint shards");
  }
  if (result.error.empty()) {
    const std::vector<std::string> records =
        world.gather_strings(record.SerializeAsString(), "checkpoint records");
    on_first("checkpoint manifest", [&] { write_manifest(run_dir, run, records, trainer); });
  }
  result.saved = result.error.empty();
  if (!result.saved && first) abandon_checkpoint(run_dir, step);
  if (result.saved && first) {
    const int keep = trainer.config().checkpoint().keep();
    result.warning = attempt([&] { prune_checkpoints(run_dir, keep); });
  }
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return result;
}

void restore_checkpoint(const std::string& path, const CheckpointManifest& manifest, Communicator& world,
                        Trainer& trainer) {
  const std::string mine = attempt([&] { read_state(path, manifest, world.rank(), trainer); });
  world.agree(mine, "restoring the checkpoint");
  trainer.progress() = {manifest.step(), manifest.applied_steps(), manifest.samples_consumed()};
  trainer.restored();
}

}  // namespace hybridmoe
