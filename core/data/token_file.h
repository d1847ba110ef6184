// The tokens of one corpus as one long stream, memory-mapped: Megatron's indexed PREFIX.bin with PREFIX.idx,
// or a raw file of uint16 or uint32 ids. Every inconsistency is an Error that names the file, what was
// expected and what to do. Reading is const and thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/data/mapped_file.h"

namespace hybridmoe {

// Type codes of Megatron's index (megatron/core/datasets/indexed_dataset.py, DType); the floating-point codes
// 6 and 7 cannot hold token ids. UInt32 exists in raw files only.
enum class TokenType : std::uint8_t {
  UInt8 = 1,
  Int8 = 2,
  Int16 = 3,
  Int32 = 4,
  Int64 = 5,
  UInt16 = 8,
  UInt32 = 100
};

std::int64_t size_of(TokenType type);  // bytes of one token
const char* name_of(TokenType type);   // "uint16"

// Tokens [begin, end) of a stream that belong to one document.
struct TokenRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

class TokenFile {
 public:
  // PREFIX.bin and PREFIX.idx. A path that ends in .bin or .idx is taken as well.
  static TokenFile open_indexed(const std::string& prefix);
  // A file of nothing but ids. A document ends with each end_of_document; negative: where documents end is
  // unknown and the whole file counts as one.
  static TokenFile open_raw(const std::string& path, TokenType type, std::int32_t end_of_document);

  const std::string& path() const { return tokens_.path(); }  // of the file that holds the tokens
  TokenType type() const { return type_; }
  std::int64_t tokens() const { return token_count_; }
  // Documents of the index; -1 for a raw file, which has none.
  std::int64_t documents() const { return index_.data() == nullptr ? -1 : document_entries_ - 1; }
  std::int64_t sequences() const { return sequence_count_; }

  // out [count] = tokens [begin, begin + count). Throws Error naming file, position and id where an id is
  // negative or not below `vocabulary`.
  void read(std::int64_t begin, std::int64_t count, std::int32_t vocabulary, std::int32_t* out) const;

  // Indexed files: the number of the document that token `position` belongs to, and a document's tokens.
  // O(log).
  std::int64_t document_of(std::int64_t position) const;
  TokenRange document(std::int64_t number) const;

  // Ascending positions in [begin, end) at which a document starts.
  std::vector<std::int64_t> document_starts(std::int64_t begin, std::int64_t end) const;

  // Reads the whole index and throws Error at the first entry that contradicts another. `open_indexed` does
  // it for indexes of up to 2^24 sequences; of larger ones it checks the ends, and each access checks the
  // entries it uses.
  void check_index() const;

 private:
  TokenFile() = default;
  void parse_index();
  std::int32_t length_at(std::int64_t sequence) const;
  std::int64_t pointer_at(std::int64_t sequence) const;      // in bytes
  std::int64_t document_entry(std::int64_t entry) const;     // first sequence of a document
  std::int64_t sequence_start(std::int64_t sequence) const;  // in tokens; sequence == sequences(): the end
  void check_sequence(std::int64_t sequence) const;
  void check_document_entry(std::int64_t entry) const;

  MappedFile tokens_;
  MappedFile index_;
  TokenType type_ = TokenType::UInt16;
  std::int32_t end_of_document_ = -1;  // of raw files
  std::int64_t token_count_ = 0;
  std::int64_t sequence_count_ = 0;
  std::int64_t document_entries_ = 0;  // documents + 1
  const std::uint8_t* lengths_ = nullptr;
  const std::uint8_t* pointers_ = nullptr;
  const std::uint8_t* document_index_ = nullptr;
};

}  // namespace hybridmoe
