// Saving and restoring a trainer, collectively over the world: every rank writes the elements it owns.
#pragma once

#include <string>

#include "core/files/checkpoint_directory.h"
#include "launcher/trainer.h"
#include "proto/checkpoint.pb.h"

namespace hybridmoe {

struct SaveResult {
  bool saved = false;
  std::string path;     // of the checkpoint
  std::string error;    // of every rank that failed; older checkpoints are untouched then
  std::string warning;  // of rank 0: older checkpoints could not be removed
  double seconds = 0;
};

// Writes RUN/checkpoints/step-N and removes the oldest beyond checkpoint.keep. `run` carries what the trainer
// does not know (run id, layout, choices, versions). Never throws for a failing disk: all ranks return the
// same failure.
SaveResult save_checkpoint(const std::string& run_dir, const CheckpointManifest& run, Communicator& world,
                           Trainer& trainer);

// Restores the trainer (after start()) from the checkpoint in `path`, which the same layout wrote. Throws the
// same Error on every rank; then the trainer's state is undefined.
void restore_checkpoint(const std::string& path, const CheckpointManifest& manifest, Communicator& world,
                        Trainer& trainer);

}  // namespace hybridmoe
