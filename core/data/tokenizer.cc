#include "core/data/tokenizer.h"

#include "core/error.h"
#include "proto/data.pb.h"

namespace hybridmoe {
namespace {

constexpr std::int32_t kEndOfDocument = 256;

class ByteTokenizer : public Tokenizer {
 public:
  ByteTokenizer() {
    for (int byte = 0; byte < 256; ++byte) texts_.emplace_back(1, static_cast<char>(byte));
    texts_.emplace_back();
  }
  std::int32_t vocabulary() const override { return kEndOfDocument + 1; }
  std::int32_t end_of_document() const override { return kEndOfDocument; }
  const std::string& token_text(std::int32_t id) const override {
    require(id >= 0 && id < vocabulary(), "token id ", id, " is outside the byte tokenizer's 0 to ",
            kEndOfDocument);
    return texts_[id];
  }
  std::vector<std::vector<std::int32_t>> encode(const std::vector<std::string>& texts) override {
    std::vector<std::vector<std::int32_t>> all;
    all.reserve(texts.size());
    for (const std::string& text : texts) {
      const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
      all.emplace_back(bytes, bytes + text.size());
    }
    return all;
  }
  void describe(CorpusInfo* info) const override {
    info->set_tokenizer(CorpusInfo::BYTE);
    info->set_vocabulary(vocabulary());
    info->set_end_of_document(end_of_document());
  }

 private:
  std::vector<std::string> texts_;  // by id
};

}  // namespace

std::string Tokenizer::decode(std::span<const std::int32_t> tokens) const {
  std::string text;
  for (const std::int32_t id : tokens) text += token_text(id);
  return text;
}

std::unique_ptr<Tokenizer> make_byte_tokenizer() { return std::make_unique<ByteTokenizer>(); }

}  // namespace hybridmoe
