#include "launcher/checkpoint.h"

#include <chrono>
#include <functional>
#include <map>

namespace hybridmoe {

namespace {

// The arrays of a shard file: state arrays that hold every bucket's owned elements one after the other, and
// the replicated router biases of rank 0.
using Pieces = std::map<std::string, std::vector<Tensor>>;

Pieces state_of(Trainer& trainer, int rank) {
  Pieces arrays;
  for (auto& bucket : trainer.parameters().buckets()) {
    arrays["master"].push_back(bucket.owned_master());
    arrays["adam_m"].push_back(bucket.m);
    arrays["adam_v"].push_back(bucket.v);
  }
  const std::vector<Tensor> biases = trainer.router_biases();
  if (rank == 0 && !biases.empty()) arrays["router_bias"] = biases;
  return arrays;
}

void add_slices(Trainer& trainer, ShardRecord* record) {
  std::int64_t offset = 0;
  for (const auto& bucket : trainer.parameters().buckets()) {
    for (const auto& range : bucket.owned) {
      OwnedSlice* slice = record->add_slice();
      slice->set_parameter(range.parameter);
      slice->set_begin(range.global_begin);
      slice->set_end(range.global_begin + range.length);
      slice->set_array_offset(offset + range.shard_begin);
    }
    offset += bucket.owned_end - bucket.owned_begin;
  }
}

void add_parameters(Trainer& trainer, CheckpointManifest* manifest) {
  for (ParameterStore::Id id = 0; id < trainer.parameters().size(); ++id) {
    const ParameterSpec& spec = trainer.parameters().spec(id);
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

// All ranks' failures, the same text on every rank.
std::string shared_failure(Communicator& world, const std::string& mine, const char* label) {
  return attempt([&] { world.agree(mine, label); });
}

}  // namespace

SaveResult save_checkpoint(const std::string& run_dir, const CheckpointManifest& run, Communicator& world,
                           Trainer& trainer) {
  const auto begin = std::chrono::steady_clock::now();
  const std::int64_t step = trainer.progress().step;
  SaveResult result;
  result.path = checkpoint_path(run_dir, step);
  const bool first = world.rank() == 0;
  result.error = shared_failure(world, attempt([&] {
                                  if (first) begin_checkpoint(run_dir, step);
                                }),
                                "checkpoint begin");
  ShardRecord record;
  if (result.error.empty()) {
    result.error = shared_failure(world, attempt([&] {
                                    std::vector<ShardArray> arrays;
                                    for (auto& [name, pieces] : state_of(trainer, world.rank()))
                                      arrays.push_back({name, pieces});
                                    const std::string name = shard_name(world.rank());
                                    const ShardInfo info = write_shard(
                                        checkpoint_building_path(run_dir, step) + "/" + name, arrays);
                                    record.set_rank(world.rank());
                                    record.set_file(name);
                                    record.set_bytes(info.bytes);
                                    record.set_checksum(info.checksum);
                                    add_slices(trainer, &record);
                                  }),
                                  "checkpoint shards");
  }
  if (result.error.empty()) {
    const std::vector<std::string> records =
        world.gather_strings(record.SerializeAsString(), "checkpoint records");
    result.error = shared_failure(world, attempt([&] {
                                    if (!first) return;
                                    CheckpointManifest manifest = run;
                                    manifest.set_step(step);
                                    manifest.set_applied_steps(trainer.progress().applied_steps);
                                    manifest.set_samples_consumed(trainer.progress().samples_consumed);
                                    *manifest.mutable_skip() = trainer.config().data().skip();
                                    *manifest.mutable_config() = trainer.config();
                                    add_parameters(trainer, &manifest);
                                    for (const std::string& bytes : records) {
                                      require(manifest.add_shard()->ParseFromString(bytes),
                                              "a rank's shard record is damaged");
                                    }
                                    finish_checkpoint(run_dir, manifest);
                                    prune_checkpoints(run_dir, trainer.config().checkpoint().keep());
                                  }),
                                  "checkpoint manifest");
  }
  if (!result.error.empty() && first) abandon_checkpoint(run_dir, step);
  result.saved = result.error.empty();
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return result;
}

void restore_checkpoint(const std::string& path, const CheckpointManifest& manifest, Communicator& world,
                        Trainer& trainer) {
  world.agree(attempt([&] {
                const ShardReader shard = open_shard(path, manifest, world.rank());
                for (auto& [name, pieces] : state_of(trainer, world.rank())) {
                  shard.verify(name);
                  std::int64_t begin = 0;
                  for (const Tensor& piece : pieces) {
                    shard.read_unverified(name, begin, piece);
                    begin += piece.elements();
                  }
                }
                if (world.rank() != 0 && !trainer.router_biases().empty()) {
                  const ShardReader first = open_shard(path, manifest, 0);
                  std::int64_t begin = 0;
                  for (const Tensor& bias : trainer.router_biases()) {
                    first.read_unverified("router_bias", begin, bias);
                    begin += bias.elements();
                  }
                }
              }),
              "restoring the checkpoint");
  trainer.progress() = {manifest.step(), manifest.applied_steps(), manifest.samples_consumed()};
  trainer.restored();
}

}  // namespace hybridmoe
