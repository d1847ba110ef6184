// hybridmoe-generate without its command line: a prompt goes in, its continuation comes out.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <memory>
#include <optional>
#include <string>

#include "core/data/tokenizer.h"
#include "moe/generator.h"
#include "proto/config.pb.h"

namespace hybridmoe {

struct GenerateCommand {
  std::string run_dir;
  // Exactly one of these is the prompt.
  std::optional<std::string> prompt;
  std::optional<std::string> prompt_file;    // -: standard input
  std::optional<std::string> prompt_tokens;  // ids; then ids come out as well
  std::string corpus;                        // whose tokenizer is used; empty: the run's first source
  std::int64_t step = -1;                    // of the checkpoint; negative: the newest
  std::int64_t tokens = 200;                 // drawn at most
  std::int64_t positions = 0;                // of the context, prompt included; 0: model.sequence_length
  SamplingRule rule{.temperature = 0.8, .top_p = 0.95};
  std::uint64_t seed = 1;
  int threads = 0;  // 0: OMP_NUM_THREADS, else the machine's cores
  bool verbose = false;
};

// Writes the continuation to `out`, token by token, and nothing else; notes and, with `verbose`, statistics
// to `notes`. The same command gives the same text. Throws Error for everything a user can get wrong.
void run_generate(const GenerateCommand& command, std::ostream& out, std::ostream& notes);

// The tokenizer of the run's data: that of `corpus` where given, else of its first source; bytes where the
// source has no sidecar but the vocabulary is that of bytes. Throws Error where it is unknown.
std::unique_ptr<Tokenizer> tokenizer_of_run(const Config& config, const std::string& corpus);

}  // namespace hybridmoe
