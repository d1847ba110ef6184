#include "core/data/token_writer.h"

#include <filesystem>
#include <limits>

#include "core/data/corpus_info.h"
#include "core/error.h"

namespace hybridmoe {
namespace {

constexpr std::size_t kBufferBytes = 1 << 20;

template <class T>
void put(std::string* buffer, T value) {
  buffer->append(reinterpret_cast<const char*>(&value), sizeof value);
}

std::int64_t largest_of(TokenType type) {
  switch (type) {
    case TokenType::UInt8:
      return std::numeric_limits<std::uint8_t>::max();
    case TokenType::UInt16:
      return std::numeric_limits<std::uint16_t>::max();
    case TokenType::Int32:
      return std::numeric_limits<std::int32_t>::max();
    default:
      throw Error(cat("token files of type ", name_of(type), " are read, not written; use uint16 or int32"));
  }
}

void refuse_to_overwrite(const std::string& prefix, bool force, const std::string* model) {
  for (const char* extension : {".bin", ".idx", ".info"}) {
    require(force || !std::filesystem::exists(prefix + extension), prefix, extension,
            " exists already; choose another --output, or --force to replace it");
  }
  const std::string copy = prefix + ".model";
  require(force || model == nullptr || !std::filesystem::exists(copy) || read_whole_file(copy) == *model,
          copy, " exists already and holds another model; choose another --output, or --force to replace it");
}

const std::string& prepared(const std::string& prefix, bool force, const std::string* model) {
  refuse_to_overwrite(prefix, force, model);
  const auto folder = std::filesystem::path(prefix).parent_path();
  if (!folder.empty()) make_directories(folder.string());
  return prefix;
}

}  // namespace

TokenType token_type_for(std::int32_t vocabulary) {
  return vocabulary < 65500 ? TokenType::UInt16 : TokenType::Int32;
}

TokenWriter::TokenWriter(const std::string& prefix, TokenType type, bool force, const std::string* model)
    : prefix_(prefix), model_(model), type_(type), bin_(prepared(prefix, force, model) + ".bin") {
  largest_of(type);
}

void TokenWriter::append(std::span<const std::int32_t> tokens) {
  const std::int64_t largest = largest_of(type_);
  for (const std::int32_t id : tokens) {
    require(id >= 0 && id <= largest, prefix_, ".bin: token ", tokens_, " has id ", id, ", which a ",
            name_of(type_), " cannot hold");
    if (type_ == TokenType::UInt8) put(&buffer_, static_cast<std::uint8_t>(id));
    if (type_ == TokenType::UInt16) put(&buffer_, static_cast<std::uint16_t>(id));
    if (type_ == TokenType::Int32) put(&buffer_, id);
    ++tokens_;
    // The index's lengths are int32: a longer document becomes several sequences.
    if (++current_ == std::numeric_limits<std::int32_t>::max()) end_sequence();
    if (buffer_.size() >= kBufferBytes) flush();
  }
}

void TokenWriter::end_sequence() {
  lengths_.push_back(static_cast<std::int32_t>(current_));
  current_ = 0;
}

void TokenWriter::end_document() {
  if (current_ > 0) end_sequence();
  const auto sequences = static_cast<std::int64_t>(lengths_.size());
  if (sequences > document_index_.back()) document_index_.push_back(sequences);
}

void TokenWriter::flush() {
  bin_.write(buffer_);
  buffer_.clear();
}

void TokenWriter::write_index() {
  AtomicFile file(prefix_ + ".idx");
  std::string out("MMIDIDX\0\0", 9);
  put(&out, std::uint64_t{1});
  put(&out, static_cast<std::uint8_t>(type_));
  put(&out, static_cast<std::uint64_t>(lengths_.size()));
  put(&out, static_cast<std::uint64_t>(document_index_.size()));
  const auto flush_when_full = [&] {
    if (out.size() < kBufferBytes) return;
    file.write(out);
    out.clear();
  };
  for (const std::int32_t length : lengths_) {
    put(&out, length);
    flush_when_full();
  }
  std::int64_t pointer = 0;
  for (const std::int32_t length : lengths_) {
    put(&out, pointer);
    pointer += length * size_of(type_);
    flush_when_full();
  }
  for (const std::int64_t entry : document_index_) {
    put(&out, entry);
    flush_when_full();
  }
  file.write(out);
  file.commit();
}

CorpusInfo TokenWriter::finish(CorpusInfo info) {
  end_document();
  require(documents() > 0, prefix_, ": the input holds no text, so there is no corpus to write");
  flush();
  info.set_documents(documents());
  info.set_tokens(tokens_);
  // From here on an old corpus is replaced: without its index it is none, whatever happens before the new one
  // is there.
  std::filesystem::remove(prefix_ + ".idx");
  bin_.commit();
  if (model_ != nullptr) {
    write_file_atomically(prefix_ + ".model", *model_);
    info.set_model_file(std::filesystem::path(prefix_ + ".model").filename().string());
  }
  write_file_atomically(prefix_ + ".info", corpus_info_text(info));
  write_index();
  return info;
}

}  // namespace hybridmoe
