#include "tools/data_commands.h"

#include <chrono>
#include <cstdio>
#include <iomanip>
#include <iostream>
#include <memory>

#include "core/data/tokenize.h"
#include "core/error.h"

namespace hybridmoe {
namespace {

// Prints to standard error, at most every two seconds.
class ProgressLine {
 public:
  void operator()(const TokenizeProgress& progress) {
    const auto now = std::chrono::steady_clock::now();
    if (now - printed_ < std::chrono::seconds(2)) return;
    printed_ = now;
    const double seconds = std::chrono::duration<double>(now - start_).count();
    std::cerr << std::fixed << std::setprecision(1) << "  " << progress.text.files << " files, "
              << progress.text.documents << " documents, " << progress.text.bytes / 1e6 << " MB, "
              << progress.tokens / 1e6 << " M tokens, " << progress.text.bytes / 1e6 / seconds << " MB/s"
              << std::endl;
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point printed_ = start_;
};

}  // namespace

void run_tokenize(const TokenizeCommand& command) {
  const std::unique_ptr<Tokenizer> tokenizer = make_byte_tokenizer();
  ProgressLine progress;
  const CorpusInfo info = tokenize_corpus(command.inputs, tokenizer.get(), command.output, command.force,
                                          [&](const TokenizeProgress& state) { progress(state); });
  std::cout << command.output << ": " << info.documents() << " documents, " << info.tokens() << " tokens, "
            << info.text_bytes() << " bytes of text, vocabulary " << info.vocabulary() << std::endl;
}

}  // namespace hybridmoe
