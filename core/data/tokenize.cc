#include "core/data/tokenize.h"

#include <utility>

#include "core/data/token_writer.h"

namespace hybridmoe {
namespace {

constexpr std::size_t kBatchBytes = 1 << 20;

}  // namespace

CorpusInfo tokenize_corpus(const TextInputs& inputs, Tokenizer* tokenizer, const std::string& prefix,
                           bool force, const std::function<void(const TokenizeProgress&)>& progress) {
  TokenWriter writer(prefix, token_type_for(tokenizer->vocabulary()), force, tokenizer->model());
  TokenizeProgress state;
  std::vector<std::string> batch;
  std::size_t batch_bytes = 0;
  const std::int32_t end = tokenizer->end_of_document();
  const auto write_batch = [&] {
    for (const std::vector<std::int32_t>& document : tokenizer->encode(batch)) {
      writer.append(document);
      writer.append(std::span(&end, 1));
      writer.end_document();
    }
    batch.clear();
    batch_bytes = 0;
    state.tokens = writer.tokens();
    progress(state);
  };
  read_documents(
      inputs,
      [&](std::string&& document) {
        batch_bytes += document.size();
        batch.push_back(std::move(document));
        if (batch_bytes >= kBatchBytes) write_batch();
      },
      &state.text);
  write_batch();
  CorpusInfo info;
  tokenizer->describe(&info);
  info.set_text_bytes(state.text.bytes);
  return writer.finish(std::move(info));
}

}  // namespace hybridmoe
