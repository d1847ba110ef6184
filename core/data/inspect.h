// What a corpus holds, from reading all of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/data/token_file.h"

namespace hybridmoe {

class CorpusInfo;

struct CorpusReport {
  std::int64_t documents = 0;
  std::int64_t empty_documents = 0;
  // Tokens per document: smallest, and the 10, 50, 90 and 99 % quantiles, and largest. Nearest rank.
  std::int64_t shortest = 0, q10 = 0, median = 0, q90 = 0, q99 = 0, longest = 0;
  std::int32_t smallest_id = 0, largest_id = 0;
  std::int64_t distinct_ids = 0;
  std::int64_t text_bytes = -1;  // that the tokens stand for; -1 without `info`
  // What contradicts the sidecar, in words; empty when all is well.
  std::vector<std::string> remarks;
};

// Checks the whole index and every id against `vocabulary`, and counts. `info` may be null. Throws Error at
// the first thing that is wrong with the files.
CorpusReport inspect_corpus(const TokenFile& file, std::int32_t vocabulary, const CorpusInfo* info);

}  // namespace hybridmoe
