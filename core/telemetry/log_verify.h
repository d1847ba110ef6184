// Checks a log from the checksums up to the sense of what it says, without trusting any part of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/telemetry/log_reader.h"

namespace hybridmoe {

struct LogVerification {
  std::int64_t records = 0, bytes = 0;
  int attempts = 0, segments = 0, rank_logs = 0;
  std::int64_t steps = 0;  // merged
  std::int64_t first_step = 0, last_step = 0;
  std::vector<LogProblem> problems;  // corrupt, missing or contradictory; in the order of the files
  std::vector<LogProblem> notes;  // explained: a killed writer's last record, losses the log itself records

  bool good() const { return problems.empty(); }
};

// Files of single ranks (rank_log.h) included. Throws Error when there is no log in the directory or a file
// cannot be read at all.
LogVerification verify_log(const std::string& directory);

}  // namespace hybridmoe
