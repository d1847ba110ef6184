// hybridmoe-ckpt: the checkpoints of a run, listed, verified and exported. See docs/checkpoint.md.
#include <CLI/CLI.hpp>
#include <exception>
#include <iostream>

#include "core/files/shard_file.h"
#include "tools/ckpt_check.h"
#include "tools/ckpt_export.h"

namespace {

using namespace hybridmoe;

constexpr int kDamaged = 3;  // exit status of verify

int export_weights(ExportCommand command, const std::string& dtype) {
  if (!dtype.empty()) command.dtype = dtype_from_name(dtype);
  const ExportResult result = export_checkpoint(command);
  std::cout << "step " << result.step << ": " << result.tensors << " tensors of " << name_of(result.dtype)
            << ", " << result.elements << " elements, in " << result.path << '\n';
  return 0;
}

int run(int argc, char** argv) {
  CLI::App app("Lists, verifies and exports the checkpoints of a run.", "hybridmoe-ckpt");
  app.require_subcommand(1);
  ExportCommand command;
  std::string dtype;
  const auto add = [&](const char* name, const char* what) {
    CLI::App* sub = app.add_subcommand(name, what);
    sub->add_option("--run_dir", command.run_dir, "directory of the run")->required();
    return sub;
  };
  const auto add_step = [&](CLI::App* sub, const char* what) {
    sub->add_option("--step", command.step, what)->check(CLI::NonNegativeNumber);
  };
  add("list", "Steps, sizes, times and ranks");
  CLI::App* verify = add("verify", "Checks every byte against its checksum; exit status 0 or 3");
  add_step(verify, "only the checkpoint of this step");
  CLI::App* exporting = add(
      "export", "Weights as safetensors, every matrix [out, in], under names that docs/checkpoint.md lists");
  add_step(exporting, "step of the checkpoint; default: the newest");
  exporting->add_option("--out", command.out, "directory for model.safetensors and config.textproto")
      ->required();
  exporting->add_option("--dtype", dtype, "f32, f64 or bf16; default: as the master weights are kept")
      ->check(CLI::IsMember({"f32", "f64", "bf16"}));
  exporting->add_flag("--force", command.force, "replace an export that is there already");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 1;
  }
  if (*exporting) return export_weights(command, dtype);
  if (*verify) return verify_checkpoints(command.run_dir, command.step, std::cout) == 0 ? 0 : kDamaged;
  list_run_checkpoints(command.run_dir, std::cout);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "hybridmoe-ckpt: " << error.what() << '\n';
    return 1;
  }
}
