// A checkpoint's weights as one safetensors file under readable names, for other frameworks: every matrix as
// [out, in] (y = W x), fused matrices taken apart, every expert by itself. docs/checkpoint.md, "Export", has
// the table of names. Weights are streamed: at most one matrix is in memory.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/tensor.h"
#include "proto/checkpoint.pb.h"

namespace hybridmoe {

// Where an exported tensor comes from.
struct ExportTensor {
  std::string name;                 // "layers.3.experts.5.gate.weight"
  std::vector<std::int64_t> shape;  // in the file
  std::string parameter;            // empty: the router biases of the checkpoint
  std::int64_t begin = 0;           // its first element in the parameter, row-major; all others follow
  bool transposed = false;          // stored as [in, out]: shape backwards
};

// What the export of a checkpoint holds, in the order of the file. Throws Error for a parameter it cannot
// place.
std::vector<ExportTensor> export_plan(const CheckpointManifest& manifest);

struct ExportCommand {
  std::string run_dir = {};
  std::int64_t step = -1;           // negative: the newest
  std::string out = {};             // directory: model.safetensors and config.textproto
  std::optional<DType> dtype = {};  // F32, F64 or BF16; none: as the master weights are
  bool force = false;               // replace an export that is there
};
struct ExportResult {
  std::int64_t step = 0, tensors = 0, elements = 0;
  DType dtype = DType::F32;
  std::string path;  // of the safetensors file
};
// Throws Error for whatever is missing or damaged; then there is no file of that name, or the old one.
ExportResult export_checkpoint(const ExportCommand& command);

}  // namespace hybridmoe
