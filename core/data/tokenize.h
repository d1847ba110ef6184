// Text to a corpus on disk.
#pragma once

#include <functional>
#include <string>

#include "core/data/text_input.h"
#include "core/data/tokenizer.h"
#include "proto/data.pb.h"

namespace hybridmoe {

struct TokenizeProgress {
  TextStatistics text;
  std::int64_t tokens = 0;
};

// Writes PREFIX.bin, .idx, .info and, of a tokenizer with a model, .model: each document of `inputs`,
// followed by the end of document. Returns the sidecar's content. `progress` is called after every megabyte
// or so of text.
CorpusInfo tokenize_corpus(const TextInputs& inputs, Tokenizer* tokenizer, const std::string& prefix,
                           bool force, const std::function<void(const TokenizeProgress&)>& progress);

}  // namespace hybridmoe
