#include "core/data/sentencepiece.h"

#include <array>
#include <cstdio>
#include <filesystem>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "core/data/helper_process.h"
#include "core/error.h"
#include "core/files/file.h"
#include "proto/data.pb.h"

namespace hybridmoe {
namespace {

namespace protocol = sentencepiece_protocol;
using protocol::Kind;
using protocol::PieceType;

constexpr char kProgram[] = "hybridmoe-sentencepiece";
constexpr std::string_view kSpace = "\xe2\x96\x81";  // U+2581
constexpr std::size_t kFrameBytes = 1 << 20;
constexpr std::size_t kLongestText = std::size_t{1} << 31;

std::string hash_of(const std::string& bytes) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx",
                static_cast<unsigned long long>(XXH3_64bits(bytes.data(), bytes.size())));
  return text;
}

// The length of the UTF-8 sequence at the beginning of text, 0 when there is none (RFC 3629, section 4).
std::size_t utf8_length(std::string_view text) {
  const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const auto follows = [&](std::size_t i) { return (byte(i) & 0xc0u) == 0x80u; };
  const unsigned first = byte(0), second = byte(1);
  if (first < 0x80) return 1;
  if (first >= 0xc2 && first <= 0xdf) return follows(1) ? 2 : 0;
  if (first >= 0xe0 && first <= 0xef) {
    const bool legal = (first != 0xe0 || second >= 0xa0) && (first != 0xed || second <= 0x9f);
    return legal && follows(1) && follows(2) ? 3 : 0;
  }
  if (first >= 0xf0 && first <= 0xf4) {
    const bool legal = (first != 0xf0 || second >= 0x90) && (first != 0xf4 || second <= 0x8f);
    return legal && follows(1) && follows(2) && follows(3) ? 4 : 0;
  }
  return 0;
}

// Bytes at the beginning of text that a model cannot take as text; 0: none.
std::size_t foreign_bytes(std::string_view text) {
  if (text[0] == '\0') return 1;
  if (text.starts_with(kSpace)) return kSpace.size();
  return utf8_length(text) == 0 ? 1 : 0;
}

std::string with_spaces(std::string_view piece) {
  std::string text;
  while (!piece.empty()) {
    const bool space = piece.starts_with(kSpace);
    text += space ? ' ' : piece[0];
    piece.remove_prefix(space ? kSpace.size() : 1);
  }
  return text;
}

class SentencePieceTokenizer : public Tokenizer {
 public:
  SentencePieceTokenizer(const std::string& path, int processes) : path_(path) {
    require(processes >= 1, processes, " processes of SentencePiece were asked for; at least 1 was expected");
    model_ = read_whole_file(path);
    std::string answer;
    for (int i = 0; i < processes; ++i) {
      helpers_.push_back(std::make_unique<HelperProcess>(kProgram));
      helpers_.back()->send(Kind::Load, path);
      answer = helpers_.back()->receive();
    }
    protocol::Cursor cursor(answer);
    const auto pieces = cursor.take<std::uint32_t>();
    end_of_document_ = cursor.take<std::int32_t>();
    byte_ids_.fill(-1);
    for (std::uint32_t id = 0; id < pieces && cursor.ok(); ++id) {
      const auto type = cursor.take<PieceType>();
      const std::string_view piece = cursor.take_text();
      texts_.push_back(type == PieceType::Text ? with_spaces(piece) : std::string());
      if (type != PieceType::Byte) continue;
      const int byte = static_cast<int>(std::stoul(std::string(piece.substr(3, 2)), nullptr, 16));  // <0x1F>
      texts_.back() = std::string(1, static_cast<char>(byte));
      byte_ids_[byte] = static_cast<std::int32_t>(id);
    }
    require(cursor.ok() && pieces > 0, path, ": the helper's answer is cut off");
    require(end_of_document_ >= 0, path,
            ": the model has no end of sentence (</s>) to end documents with; train one "
            "with `hybridmoe-data train-tokenizer`");
  }

  std::int32_t vocabulary() const override { return static_cast<std::int32_t>(texts_.size()); }
  std::int32_t end_of_document() const override { return end_of_document_; }
  const std::string& token_text(std::int32_t id) const override {
    require(id >= 0 && id < vocabulary(), "token id ", id, " is outside the vocabulary of ", path_, ", 0 to ",
            vocabulary() - 1);
    return texts_[id];
  }
  void describe(CorpusInfo* info) const override {
    info->set_tokenizer(CorpusInfo::SENTENCEPIECE);
    info->set_model_file(std::filesystem::path(path_).filename().string());
    info->set_model_hash(hash_of(model_));
    info->set_vocabulary(vocabulary());
    info->set_end_of_document(end_of_document_);
    for (const std::string& text : texts_) info->add_token_bytes(static_cast<std::int32_t>(text.size()));
  }

  const std::string* model() const override { return &model_; }
  std::vector<std::vector<std::int32_t>> encode(const std::vector<std::string>& texts) override;

 private:
  struct Part {  // of a text: what the helper encodes, then bytes that it cannot
    std::string_view text;
    std::string_view foreign;
  };
  std::vector<Part> parts_of(std::string_view text) const;
  std::string request_for(std::span<const std::string> texts) const;
  void receive(HelperProcess* helper, std::span<const std::string> texts,
               std::vector<std::vector<std::int32_t>>* tokens) const;

  std::string path_;
  std::vector<std::unique_ptr<HelperProcess>> helpers_;
  std::string model_;  // the bytes of the file
  std::int32_t end_of_document_ = -1;
  std::vector<std::string> texts_;  // by id
  std::array<std::int32_t, 256> byte_ids_{};
};

std::vector<SentencePieceTokenizer::Part> SentencePieceTokenizer::parts_of(std::string_view text) const {
  if (byte_ids_[0] < 0) return {{text, {}}};
  std::vector<Part> parts;
  std::size_t begin = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t foreign = foreign_bytes(text.substr(at));
    if (foreign > 0) {
      parts.push_back({text.substr(begin, at - begin), text.substr(at, foreign)});
      begin = at + foreign;
    }
    at += foreign > 0 ? foreign : utf8_length(text.substr(at));
  }
  parts.push_back({text.substr(begin), {}});
  return parts;
}

std::string SentencePieceTokenizer::request_for(std::span<const std::string> texts) const {
  std::uint32_t count = 0;
  std::string request;
  protocol::put(&request, count);
  for (const std::string& text : texts) {
    require(text.size() < kLongestText, "a document of ", text.size(),
            " bytes is too long for SentencePiece; cut the text with --split_documents");
    for (const Part& part : parts_of(text)) {
      protocol::put_text(&request, part.text);
      ++count;
    }
  }
  std::memcpy(request.data(), &count, sizeof count);
  return request;
}

void SentencePieceTokenizer::receive(HelperProcess* helper, std::span<const std::string> texts,
                                     std::vector<std::vector<std::int32_t>>* tokens) const {
  const std::string answer = helper->receive();
  protocol::Cursor cursor(answer);
  for (const std::string& text : texts) {
    std::vector<std::int32_t>& out = tokens->emplace_back();
    for (const Part& part : parts_of(text)) {
      const auto ids = cursor.take<std::uint32_t>();
      for (std::uint32_t i = 0; i < ids && cursor.ok(); ++i) out.push_back(cursor.take<std::int32_t>());
      for (const char byte : part.foreign) out.push_back(byte_ids_[static_cast<unsigned char>(byte)]);
    }
  }
  require(cursor.ok(), path_, ": the helper's answer is cut off");
}

// Each helper gets a run of texts of about the same size. It reads its request to the end before it answers,
// so that all can be sent before the first answer is awaited.
std::vector<std::vector<std::int32_t>> SentencePieceTokenizer::encode(const std::vector<std::string>& texts) {
  std::size_t bytes = 0, sent = 0;
  for (const std::string& text : texts) bytes += text.size();
  std::vector<std::span<const std::string>> runs;
  auto begin = texts.begin();
  for (std::size_t h = 0; h < helpers_.size(); ++h) {
    auto end = begin;
    while (end != texts.end() && (h + 1 == helpers_.size() || sent * helpers_.size() < bytes * (h + 1))) {
      sent += (end++)->size();
    }
    runs.emplace_back(begin, end);
    helpers_[h]->send(Kind::Encode, request_for(runs.back()));
    begin = end;
  }
  std::vector<std::vector<std::int32_t>> tokens;
  for (std::size_t h = 0; h < helpers_.size(); ++h) receive(helpers_[h].get(), runs[h], &tokens);
  return tokens;
}

// Sends lines to the helper, many in a frame.
class SentenceSender {
 public:
  explicit SentenceSender(HelperProcess* helper) : helper_(helper) { clear(); }
  void add(std::string_view line) {
    protocol::put_text(&payload_, line);
    ++count_;
    if (payload_.size() >= kFrameBytes) flush();
  }
  void flush() {
    std::memcpy(payload_.data(), &count_, sizeof count_);
    helper_->send(Kind::Text, payload_);
    clear();
  }

 private:
  void clear() {
    count_ = 0;
    payload_.assign(sizeof count_, '\0');
  }
  HelperProcess* helper_;
  std::uint32_t count_ = 0;
  std::string payload_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(const std::string& model_path, int processes) {
  return std::make_unique<SentencePieceTokenizer>(model_path, processes);
}

std::string train_sentencepiece(const TextInputs& inputs, const SentencePieceTraining& training) {
  require(training.type == "bpe" || training.type == "unigram", "--type ", training.type,
          ": bpe or unigram was expected");
  // 256 byte pieces, <unk>, <s>, </s> and some characters have to fit.
  require(training.vocabulary >= 300, "--vocabulary ", training.vocabulary,
          ": at least 300 was expected, because 259 are bytes and marks");
  require(training.sentences > 0, "--sentences ", training.sentences, ": a positive number was expected");
  const std::vector<std::pair<std::string, std::string>> settings = {
      {"model_type", training.type},
      {"vocab_size", std::to_string(training.vocabulary)},
      {"character_coverage", std::to_string(training.character_coverage)},
      {"input_sentence_size", std::to_string(training.sentences)},
      {"shuffle_input_sentence", "true"},
      {"num_threads", std::to_string(training.threads)},
      {"max_sentence_length", "65536"},
      {"normalization_rule_name", "identity"},
      {"add_dummy_prefix", "false"},
      {"remove_extra_whitespaces", "false"},
      {"allow_whitespace_only_pieces", "true"},
      {"byte_fallback", "true"},
      {"user_defined_symbols", "\n"},  // else rare bytes, or glued to words
      {"hard_vocab_limit", "false"},
      {"minloglevel", "2"},
  };
  HelperProcess helper(kProgram);
  std::string request;
  protocol::put(&request, static_cast<std::uint32_t>(settings.size()));
  for (const auto& [name, value] : settings) {
    protocol::put_text(&request, name);
    protocol::put_text(&request, value);
  }
  helper.send(Kind::Train, request);
  SentenceSender sender(&helper);
  TextInputs lines = inputs;
  lines.split_documents = "lines";
  TextStatistics statistics;
  read_documents(
      lines,
      [&](std::string&& line) {
        std::string_view text = line;
        while (text.starts_with('\n')) text.remove_prefix(1);
        while (text.ends_with('\n')) text.remove_suffix(1);
        sender.add(text);
      },
      &statistics);
  require(statistics.documents > 0, "the input holds no text to train a tokenizer on");
  sender.flush();
  helper.send(Kind::End, {});
  return helper.receive();
}

}  // namespace hybridmoe
