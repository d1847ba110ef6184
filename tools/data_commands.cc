#include "tools/data_commands.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <iomanip>
#include <iostream>
#include <memory>
#include <optional>
#include <thread>

#include "core/config/load.h"
#include "core/data/byte_model.h"
#include "core/data/corpus_info.h"
#include "core/data/inspect.h"
#include "core/data/tokenize.h"
#include "core/error.h"
#include "core/files/atomic_file.h"
#include "core/files/file.h"

namespace hybridmoe {
namespace {

namespace fs = std::filesystem;

// Prints to standard error, at most every two seconds.
class ProgressLine {
 public:
  void operator()(const TokenizeProgress& progress) {
    const auto now = std::chrono::steady_clock::now();
    if (now - printed_ < std::chrono::seconds(2)) return;
    printed_ = now;
    const double seconds = std::chrono::duration<double>(now - start_).count();
    const auto bytes = static_cast<double>(progress.text.bytes);
    std::cerr << std::fixed << std::setprecision(1) << "  " << progress.text.files << " files, "
              << progress.text.documents << " documents, " << bytes / 1e6 << " MB, "
              << static_cast<double>(progress.tokens) / 1e6 << " M tokens, " << bytes / 1e6 / seconds
              << " MB/s" << std::endl;
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point printed_ = start_;
};

std::unique_ptr<Tokenizer> make_tokenizer(const TokenizeCommand& command) {
  if (command.tokenizer == "byte") {
    require(command.model.empty(), "--model is for --tokenizer sentencepiece; the byte tokenizer needs none");
    return make_byte_tokenizer();
  }
  require(command.tokenizer == "sentencepiece", "--tokenizer ", command.tokenizer,
          ": byte or sentencepiece was expected");
  require(!command.model.empty(),
          "--tokenizer sentencepiece needs --model FILE; `hybridmoe-data train-tokenizer` makes one");
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return make_sentencepiece_tokenizer(command.model, command.processes > 0 ? command.processes : cores);
}

// The first bytes of a text on one line, other than printable characters escaped.
std::string printable(const std::string& text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\n') {
      out += "\\n";
    } else if (c == '\t') {
      out += "\\t";
    } else if (byte < 0x20 || byte == 0x7f) {
      const char* digits = "0123456789abcdef";
      out += std::string("\\x") + digits[byte >> 4] + digits[byte & 15];
    } else {
      out += c;
    }
  }
  return out;
}

TokenFile open_corpus(const InspectCommand& command, const std::optional<CorpusInfo>& info) {
  DataConfig::FileType type;
  require(DataConfig::FileType_Parse(command.file_type, &type), "--file_type ", command.file_type,
          ": INDEXED, RAW_UINT16 or RAW_UINT32 was expected");
  if (type == DataConfig::INDEXED) return TokenFile::open_indexed(command.corpus);
  const std::int32_t end =
      command.end_of_document < 0 && info ? info->end_of_document() : command.end_of_document;
  return TokenFile::open_raw(command.corpus,
                             type == DataConfig::RAW_UINT16 ? TokenType::UInt16 : TokenType::UInt32, end);
}

void print_report(const CorpusReport& report, const TokenFile& file, const CorpusInfo* info) {
  std::cout << file.path() << ": " << file.tokens() << " tokens of type " << name_of(file.type());
  if (file.documents() >= 0) std::cout << " in " << file.sequences() << " sequences";
  std::cout << "\ndocuments        " << report.documents << " (" << report.empty_documents << " empty)\n"
            << "document length  mean " << file.tokens() / report.documents << ", shortest "
            << report.shortest << ", 10 % " << report.q10 << ", median " << report.median << ", 90 % "
            << report.q90 << ", 99 % " << report.q99 << ", longest " << report.longest << " tokens\n"
            << "ids              " << report.distinct_ids << " distinct, from " << report.smallest_id
            << " to " << report.largest_id << "\n";
  if (info == nullptr) {
    std::cout << "tokenizer        unknown: there is no .info beside the corpus\n";
    return;
  }
  std::cout << "tokenizer        " << CorpusInfo::Tokenizer_Name(info->tokenizer()) << " "
            << info->model_file() << (info->model_file().empty() ? "" : ", ") << "vocabulary "
            << info->vocabulary() << ", end of document " << info->end_of_document() << "\n"
            << "text             " << report.text_bytes << " bytes, " << std::fixed << std::setprecision(3)
            << static_cast<double>(report.text_bytes) / static_cast<double>(file.tokens()) << " a token\n";
}

}  // namespace

void run_tokenize(const TokenizeCommand& command) {
  const std::unique_ptr<Tokenizer> tokenizer = make_tokenizer(command);
  ProgressLine progress;
  const CorpusInfo info = tokenize_corpus(command.inputs, tokenizer.get(), command.output, command.force,
                                          [&](const TokenizeProgress& state) { progress(state); });
  std::cout << command.output << ": " << info.documents() << " documents, " << info.tokens() << " tokens, "
            << info.text_bytes() << " bytes of text, vocabulary " << info.vocabulary() << std::endl;
}

void run_train_tokenizer(const TrainTokenizerCommand& command) {
  require(command.force || !fs::exists(command.output), command.output,
          " exists already; choose another --output, or --force to replace it");
  const std::string model = train_sentencepiece(command.inputs, command.training);
  const fs::path folder = fs::path(command.output).parent_path();
  if (!folder.empty()) make_directories(folder.string());
  write_file_atomically(command.output, model);
  const auto tokenizer = make_sentencepiece_tokenizer(command.output);
  std::cout << command.output << ": " << command.training.type << " model, vocabulary "
            << tokenizer->vocabulary();
  if (tokenizer->vocabulary() < command.training.vocabulary) std::cout << " (the text gives no more)";
  std::cout << std::endl;
}

void run_inspect(const InspectCommand& command) {
  const auto info = read_corpus_info(command.corpus);
  const TokenFile file = open_corpus(command, info);
  std::int32_t vocabulary = command.vocabulary;
  // Without any statement about the vocabulary ids are taken up to more than anybody uses.
  if (vocabulary == 0) vocabulary = info ? info->vocabulary() : 1 << 24;
  const CorpusReport report = inspect_corpus(file, vocabulary, info ? &*info : nullptr);
  print_report(report, file, info ? &*info : nullptr);
  for (const std::string& remark : report.remarks) std::cout << "note: " << remark << "\n";
  require(command.first_token >= 0 && command.first_token < file.tokens(), "--first_token ",
          command.first_token, ": the corpus has ", file.tokens(), " tokens");
  const std::int64_t count = std::min<std::int64_t>(command.show_tokens, file.tokens() - command.first_token);
  std::vector<std::int32_t> tokens(count);
  file.read(command.first_token, count, vocabulary, tokens.data());
  std::cout << "tokens from " << command.first_token << ":";
  for (const std::int32_t token : tokens) std::cout << " " << token;
  std::cout << "\n";
  if (info) std::cout << "text: " << printable(open_tokenizer(command.corpus)->decode(tokens)) << "\n";
  std::cout.flush();
}

void run_baseline(const BaselineCommand& command) {
  const Config config = load_config(command.config.path, command.config.overrides);
  const auto dataset = Dataset::open(config);
  const auto tokenizer = open_tokenizer(config.data().source(0).path());
  const Baseline baseline =
      fit_baseline(*dataset, *tokenizer, command.training_samples, config.evaluation().sequences());
  std::cout << std::fixed << std::setprecision(4);
  if (command.json) {
    std::cout << "{\"order_0\": " << baseline.bits_per_byte[0]
              << ", \"order_1\": " << baseline.bits_per_byte[1]
              << ", \"order_2\": " << baseline.bits_per_byte[2]
              << ", \"training_symbols\": " << baseline.training_symbols
              << ", \"held_out_targets\": " << baseline.held_out_targets
              << ", \"held_out_bytes\": " << baseline.held_out_bytes << "}" << std::endl;
    return;
  }
  std::cout << "Context models of bytes (counts with interpolated absolute discounting) fitted to "
            << baseline.training_symbols << " bytes and ends of documents of the training split;\n"
            << "bits per byte on the " << baseline.held_out_targets << " held-out targets ("
            << baseline.held_out_bytes << " bytes of text):\n"
            << "  order 0 (unigram entropy)  " << baseline.bits_per_byte[0] << "\n"
            << "  order 1                    " << baseline.bits_per_byte[1] << "\n"
            << "  order 2                    " << baseline.bits_per_byte[2] << std::endl;
}

}  // namespace hybridmoe
