// Checkpoints in a run directory: RUN/checkpoints/step-00000123/{rank-00000.shard, ..., manifest.textproto}.
//
// A checkpoint is built in step-00000123.tmp and renamed when every file in it is complete and synced: a
// directory without .tmp is whole. A save that fails or is killed leaves the older checkpoints untouched, and
// its .tmp is removed by the next save. Saving, collectively: rank 0 begins; each rank writes its shard; rank
// 0 finishes with the manifest when all have succeeded.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/files/shard_file.h"
#include "proto/checkpoint.pb.h"

namespace hybridmoe {

inline constexpr int kCheckpointVersion = 1;

struct CheckpointEntry {
  std::int64_t step = 0;
  std::string path;  // of its directory
};

std::string checkpoints_directory(const std::string& run_dir);
std::string checkpoint_path(const std::string& run_dir, std::int64_t step);
std::string checkpoint_building_path(const std::string& run_dir,
                                     std::int64_t step);  // while it is being written
std::string shard_name(int rank);                         // "rank-00000.shard"

// Removes what failed saves left behind and makes the directory to build in, whose path it returns. Rank 0
// alone.
std::string begin_checkpoint(const std::string& run_dir, std::int64_t step);
// Writes the manifest, checks that every file it names is there in full, and gives the checkpoint its name.
// One of the same step that is already there is replaced, in one step where the file system can exchange
// names. Rank 0 alone, after all shards were written. Throws Error; then no checkpoint has changed.
void finish_checkpoint(const std::string& run_dir, CheckpointManifest manifest);
// Removes a directory left by a save that failed. Never throws.
void abandon_checkpoint(const std::string& run_dir, std::int64_t step) noexcept;

// The complete checkpoints, newest first; none when there is no such directory.
std::vector<CheckpointEntry> list_checkpoints(const std::string& run_dir);
// The complete checkpoint of a step, or the newest when step is negative. Throws Error naming the steps there
// are.
CheckpointEntry find_checkpoint(const std::string& run_dir, std::int64_t step);
// Removes all but the newest `keep`; 0 keeps all. Returns the steps that were removed.
std::vector<std::int64_t> prune_checkpoints(const std::string& run_dir, int keep);

// Renames the checkpoints of later steps, for a run that goes on from `step`: they would count as its newest
// although they belong to what was abandoned. Returns their new paths; nothing is deleted.
std::vector<std::string> set_aside_later_checkpoints(const std::string& run_dir, std::int64_t step);

// Throws Error when the manifest is missing, was changed, or a file it names is missing or has another size.
CheckpointManifest read_manifest(const std::string& checkpoint_dir);
// Opens a rank's shard and compares it with the manifest.
ShardReader open_shard(const std::string& checkpoint_dir, const CheckpointManifest& manifest, int rank);

}  // namespace hybridmoe
