#include "core/data/corpus_info.h"

#include <filesystem>
#include <fstream>
#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>
#include <iterator>

#include "core/data/sentencepiece.h"
#include "core/error.h"

namespace hybridmoe {
namespace {

class FirstError : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, google::protobuf::io::ColumnNumber column, const std::string& message) override {
    if (text.empty()) text = cat(line + 1, ":", column + 1, ": ", message);
  }
  std::string text;
};

void check(const std::string& path, const CorpusInfo& info) {
  require(info.vocabulary() > 0, path, ": vocabulary is ", info.vocabulary(),
          "; a positive number was expected");
  require(info.end_of_document() >= 0 && info.end_of_document() < info.vocabulary(), path,
          ": end_of_document is ", info.end_of_document(), "; an id below vocabulary ", info.vocabulary(),
          " was expected");
  if (info.tokenizer() == CorpusInfo::BYTE) {
    require(info.vocabulary() == 257 && info.end_of_document() == 256, path, ": vocabulary ",
            info.vocabulary(), " and end_of_document ", info.end_of_document(),
            "; the byte tokenizer's are 257 and 256");
    return;
  }
  require(info.token_bytes_size() == info.vocabulary(), path, ": has token_bytes for ",
          info.token_bytes_size(), " ids; one for each of the vocabulary's ", info.vocabulary(),
          " was expected");
}

}  // namespace

std::string corpus_info_path(const std::string& corpus) {
  if ((corpus.ends_with(".bin") || corpus.ends_with(".idx")) &&
      std::filesystem::exists(corpus.substr(0, corpus.size() - 4) + ".idx")) {
    return corpus.substr(0, corpus.size() - 4) + ".info";
  }
  return corpus + ".info";
}

std::optional<CorpusInfo> read_corpus_info(const std::string& corpus) {
  const std::string path = corpus_info_path(corpus);
  if (!std::filesystem::exists(path)) return std::nullopt;
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  require(!file.bad() && file.is_open(), path, ": cannot be read");
  CorpusInfo info;
  FirstError errors;
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&errors);
  require(
      parser.ParseFromString(text, &info), path, ":", errors.text,
      "; expected is a CorpusInfo of proto/data.proto: write the corpus again, or remove this file and set "
      "model.vocabulary");
  check(path, info);
  return info;
}

std::string corpus_info_text(const CorpusInfo& info) {
  google::protobuf::TextFormat::Printer printer;
  printer.SetUseShortRepeatedPrimitives(true);
  std::string text;
  require(printer.PrintToString(info, &text), "the corpus' description cannot be written as text");
  return text;
}

std::unique_ptr<Tokenizer> open_tokenizer(const std::string& corpus) {
  const auto info = read_corpus_info(corpus);
  const std::string path = corpus_info_path(corpus);
  require(info.has_value(), path, ": does not exist, so the tokenizer of the corpus is unknown");
  if (info->tokenizer() == CorpusInfo::BYTE) return make_byte_tokenizer();
  const std::string model = (std::filesystem::path(path).parent_path() / info->model_file()).string();
  require(!info->model_file().empty() && std::filesystem::exists(model), path, ": names the model file \"",
          info->model_file(), "\", which is not in its folder; copy it there");
  auto tokenizer = make_sentencepiece_tokenizer(model);
  CorpusInfo actual;
  tokenizer->describe(&actual);
  require(actual.model_hash() == info->model_hash(), model, ": has the hash ", actual.model_hash(),
          ", but the corpus was made with a model of hash ", info->model_hash(), " (", path,
          "); restore that model or tokenize again");
  return tokenizer;
}

std::vector<std::int32_t> token_byte_table(const CorpusInfo& info) {
  if (info.tokenizer() != CorpusInfo::BYTE) return {info.token_bytes().begin(), info.token_bytes().end()};
  std::vector<std::int32_t> table(info.vocabulary(), 1);
  table[info.end_of_document()] = 0;
  return table;
}

}  // namespace hybridmoe
