// Text to token ids and back. Every token stands for a fixed string of bytes (empty for the end of a document
// and other control tokens), which is what makes bits per byte exact.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace hybridmoe {

class CorpusInfo;

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  virtual std::int32_t vocabulary() const = 0;       // ids are 0 to vocabulary() - 1
  virtual std::int32_t end_of_document() const = 0;  // the id that follows a document's last token
  // The bytes that a token stands for. Throws Error when id is outside the vocabulary.
  virtual const std::string& token_text(std::int32_t id) const = 0;
  // The ids of each text, without an end of document.
  virtual std::vector<std::vector<std::int32_t>> encode(const std::vector<std::string>& texts) = 0;
  // The bytes of the model's file; null where there is none.
  virtual const std::string* model() const { return nullptr; }
  // Fills tokenizer, vocabulary, end_of_document and, where it is needed, token_bytes.
  virtual void describe(CorpusInfo* info) const = 0;

  std::vector<std::int32_t> encode(const std::string& text) {
    return std::move(encode(std::vector{text})[0]);
  }
  // The tokens' bytes, one after another: the inverse of encode for text that the tokenizer does not
  // normalize.
  std::string decode(std::span<const std::int32_t> tokens) const;
  std::int32_t token_bytes(std::int32_t id) const { return static_cast<std::int32_t>(token_text(id).size()); }
};

// Ids 0 to 255 are bytes, 256 is the end of a document.
std::unique_ptr<Tokenizer> make_byte_tokenizer();

}  // namespace hybridmoe
