// hybridmoe-sentencepiece: encodes text with a SentencePiece model, and trains models, for other programs of
// HybridMoE. It links SentencePiece and none of HybridMoE's libraries (core/data/sentencepiece_protocol.h
// says why and how it is spoken to), and ends when its standard input does.
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>
#include <string>
#include <string_view>
#include <unistd.h>
#include <unordered_map>
#include <vector>

#include "core/data/sentencepiece_protocol.h"

namespace {

using namespace hybridmoe::sentencepiece_protocol;

bool read_all(char* to, std::size_t bytes) {
  while (bytes > 0) {
    const ssize_t got = ::read(STDIN_FILENO, to, bytes);
    if (got <= 0) return false;
    to += got;
    bytes -= static_cast<std::size_t>(got);
  }
  return true;
}

void write_all(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(STDOUT_FILENO, bytes.data(), bytes.size());
    if (written <= 0) std::exit(1);  // nobody listens any more
    bytes.remove_prefix(static_cast<std::size_t>(written));
  }
}

bool read_frame(Kind* kind, std::string* payload) {
  char header[kHeaderBytes];
  if (!read_all(header, sizeof header)) return false;
  *kind = static_cast<Kind>(header[0]);
  std::uint64_t bytes = 0;
  std::memcpy(&bytes, header + 1, sizeof bytes);
  payload->resize(bytes);
  return read_all(payload->data(), payload->size());
}

void write_frame(Kind kind, std::string_view payload) {
  std::string header(1, static_cast<char>(kind));
  put(&header, static_cast<std::uint64_t>(payload.size()));
  write_all(header);
  write_all(payload);
}

PieceType type_of(const sentencepiece::SentencePieceProcessor& processor, int id) {
  if (processor.IsByte(id)) return PieceType::Byte;
  if (processor.IsControl(id) || processor.IsUnused(id)) return PieceType::Control;
  return processor.IsUnknown(id) ? PieceType::Unknown : PieceType::Text;
}

void load(sentencepiece::SentencePieceProcessor* processor, const std::string& path) {
  const auto status = processor->Load(path);
  if (!status.ok()) {
    write_frame(Kind::Failed, path + ": is not a model that can be loaded: " + status.ToString());
    return;
  }
  std::string answer;
  put(&answer, static_cast<std::uint32_t>(processor->GetPieceSize()));
  put(&answer, static_cast<std::int32_t>(processor->eos_id()));
  for (int id = 0; id < processor->GetPieceSize(); ++id) {
    put(&answer, type_of(*processor, id));
    put_text(&answer, processor->IdToPiece(id));
  }
  write_frame(Kind::Ok, answer);
}

void encode(const sentencepiece::SentencePieceProcessor& processor, const std::string& request) {
  Cursor cursor(request);
  const auto count = cursor.take<std::uint32_t>();
  std::string answer;
  std::vector<int> ids;
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::string_view text = cursor.take_text();
    const auto status = processor.Encode(text, &ids);
    if (!status.ok() || !cursor.ok()) {
      write_frame(Kind::Failed, "a text cannot be encoded: " + status.ToString());
      return;
    }
    put(&answer, static_cast<std::uint32_t>(ids.size()));
    for (const int id : ids) put(&answer, static_cast<std::int32_t>(id));
  }
  write_frame(Kind::Ok, answer);
}

// The sentences of the Text frames that follow a Train frame.
class ReceivedSentences : public sentencepiece::SentenceIterator {
 public:
  ReceivedSentences() { Next(); }
  bool done() const override { return done_; }
  void Next() override {
    while (left_ == 0) {
      Kind kind;
      if (!read_frame(&kind, &payload_)) std::exit(1);
      if (kind != Kind::Text) {
        done_ = true;
        return;
      }
      cursor_ = Cursor(payload_);
      left_ = cursor_.take<std::uint32_t>();
    }
    --left_;
    value_ = cursor_.take_text();
  }
  const std::string& value() const override { return value_; }
  sentencepiece::util::Status status() const override { return {}; }
  void drain() {
    while (!done_) Next();
  }

 private:
  std::string payload_, value_;
  Cursor cursor_{{}};
  std::uint32_t left_ = 0;
  bool done_ = false;
};

void train(const std::string& request) {
  Cursor cursor(request);
  const auto count = cursor.take<std::uint32_t>();
  std::unordered_map<std::string, std::string> settings;
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::string name(cursor.take_text());
    settings[name] = std::string(cursor.take_text());
  }
  ReceivedSentences sentences;
  std::string model;
  const auto status = sentencepiece::SentencePieceTrainer::Train(settings, &sentences, &model);
  sentences.drain();
  if (status.ok()) {
    write_frame(Kind::Ok, model);
  } else {
    write_frame(Kind::Failed, "training failed: " + status.ToString());
  }
}

}  // namespace

int main(int argc, char**) {
  if (argc > 1 || ::isatty(STDIN_FILENO) == 1) {
    std::cerr << "hybridmoe-sentencepiece is started by the other programs; see `hybridmoe-data "
                 "train-tokenizer --help`\n";
    return 1;
  }
  sentencepiece::SentencePieceProcessor processor;
  Kind kind;
  std::string payload;
  while (read_frame(&kind, &payload)) {
    if (kind == Kind::Load) {
      load(&processor, payload);
    } else if (kind == Kind::Encode) {
      encode(processor, payload);
    } else if (kind == Kind::Train) {
      train(payload);
    } else {
      write_frame(Kind::Failed, "a request that is not known");
    }
  }
  return 0;
}
