// The sidecar of a corpus: reading, writing and what follows from it.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/data/tokenizer.h"
#include "proto/data.pb.h"

namespace hybridmoe {

// PREFIX.info for PREFIX, PREFIX.bin or PREFIX.idx; FILE.info for a raw file.
std::string corpus_info_path(const std::string& corpus);

// Nothing when the corpus has no sidecar (it was made by another program). Throws Error naming file, line and
// column when it cannot be parsed, or the field that contradicts another.
std::optional<CorpusInfo> read_corpus_info(const std::string& corpus);
std::string corpus_info_text(const CorpusInfo& info);

// The tokenizer that made the corpus. Throws Error when there is no sidecar, or the model it names is not
// beside it or not the one the corpus was made with.
std::unique_ptr<Tokenizer> open_tokenizer(const std::string& corpus);

// By id: the bytes of text a token stands for. [vocabulary]
std::vector<std::int32_t> token_byte_table(const CorpusInfo& info);

}  // namespace hybridmoe
