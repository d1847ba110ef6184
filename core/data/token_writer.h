// Writes Megatron's PREFIX.bin and PREFIX.idx, with the sidecar PREFIX.info. Tokens are streamed; of the
// index only the sequence lengths are kept in memory (4 bytes a document). Files are written aside, synced
// and renamed, the index last: a corpus without .idx is one that was not finished.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/data/token_file.h"
#include "core/files/atomic_file.h"

namespace hybridmoe {

class CorpusInfo;

// uint16 for vocabularies under 65500, else int32 (Megatron's own rule).
TokenType token_type_for(std::int32_t vocabulary);

class TokenWriter {
 public:
  // `model`: null, or the bytes of the tokenizer's model, which becomes PREFIX.model. Throws Error when a
  // file of the corpus exists (with other content, of the model) and `force` is false.
  TokenWriter(const std::string& prefix, TokenType type, bool force, const std::string* model = nullptr);

  // Adds tokens to the current document. Throws Error naming the id that the type cannot hold.
  void append(std::span<const std::int32_t> tokens);
  // A document without tokens is not written.
  void end_document();
  // Ends the files and returns what became the sidecar: `info` with documents, tokens and model file filled
  // in. Until then an old corpus is as it was, and when it is not reached nothing is left of the new one.
  // Throws Error when there is no document.
  CorpusInfo finish(CorpusInfo info);

  std::int64_t tokens() const { return tokens_; }
  std::int64_t documents() const { return static_cast<std::int64_t>(document_index_.size()) - 1; }

 private:
  void end_sequence();
  void flush();
  void write_index();

  std::string prefix_;
  const std::string* model_;
  TokenType type_;
  AtomicFile bin_;
  std::string buffer_;
  std::vector<std::int32_t> lengths_;
  std::vector<std::int64_t> document_index_{0};
  std::int64_t current_ = 0;  // tokens of the sequence that is being written
  std::int64_t tokens_ = 0;
};

}  // namespace hybridmoe
