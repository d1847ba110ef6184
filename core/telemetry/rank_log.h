// What single ranks left of their own numbers when something went wrong (launcher/rank_history.h writes it):
// a file a rank and attempt, in the framing of the log. Its header names the values; then come parts, each an
// event that says why it was written and the samples that were not written before.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/telemetry/log_reader.h"

namespace hybridmoe {

struct RankLog {
  struct Part {
    EventRecord why;
    std::vector<RankSample> samples;  // by step; the last may be of an unfinished step
  };
  int attempt = 0, rank = 0;
  std::string path;
  RunHeader header;  // without fields when it cannot be read
  std::vector<Part> parts;
  // Damage and contradictions; with tail set: the rank was killed while it wrote.
  std::vector<LogProblem> problems;
  std::int64_t records = 0, bytes = 0;

  // Of all samples; 0 when there is none.
  std::int64_t first_step() const;
  std::int64_t last_step() const;
  // The sample of a step that had ended; null when there is none.
  const RankSample* sample_of(std::int64_t step) const;
};

// All of a log's directory by attempt and rank; none when nothing went wrong. What is whole is returned, the
// rest is in `problems`, a file that cannot be read at all included. Throws Error when the directory cannot
// be listed.
std::vector<RankLog> read_rank_logs(const std::string& directory);

// The value of that name; nothing when it was not measured.
std::optional<double> find_value(const RankSample& sample, const std::string& name);

}  // namespace hybridmoe
