// A verdict in words: the one report of a failure.
#pragma once

#include <string>
#include <vector>

#include "parallel/watchdog/verdict.h"

namespace hybridmoe::watchdog {

// Several lines: the cause, step and layer, the collective with who waits and who did not arrive, what each
// rank was doing (from kManyRanks ranks on, ranks that were doing the same share a line), what to do.
inline constexpr int kManyRanks = 17;
std::string report(const Job& job, const Limits& limits, const Verdict& verdict);

// The cause alone, without the rest of the report.
std::string cause_text(const Job& job, const Limits& limits, const Verdict& verdict);
// A rank that is lost, has told an error or has lost its parent, in words; empty when there is none. It is no
// verdict: a lost connection may be made again.
std::string first_sign(const Job& job);

// "0-2, 5"; of an empty list "none".
std::string rank_list(const std::vector<int>& ranks);

}  // namespace hybridmoe::watchdog
