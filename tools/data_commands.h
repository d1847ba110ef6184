// The subcommands of hybridmoe-data, without their command line. Each prints its result to standard output
// and throws Error.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/data/sentencepiece.h"
#include "core/data/text_input.h"

namespace hybridmoe {

struct TokenizeCommand {
  TextInputs inputs;
  std::string tokenizer = "byte";  // or "sentencepiece", with a model
  std::string model;
  int processes = 0;   // of SentencePiece; 0: one for each core
  std::string output;  // prefix
  bool force = false;
};
void run_tokenize(const TokenizeCommand& command);

struct TrainTokenizerCommand {
  TextInputs inputs;
  SentencePieceTraining training;
  std::string output;  // file
  bool force = false;
};
void run_train_tokenizer(const TrainTokenizerCommand& command);

struct InspectCommand {
  std::string corpus;                 // prefix, or a raw file
  std::string file_type = "INDEXED";  // as data.file_type
  std::int32_t vocabulary = 0;        // 0: the sidecar's, else any
  std::int32_t end_of_document = -1;  // of raw files
  std::int64_t first_token = 0;
  std::int32_t show_tokens = 100;
};
void run_inspect(const InspectCommand& command);

struct ConfigArguments {
  std::string path;
  std::vector<std::string> overrides;
};

struct BatchCommand {
  ConfigArguments config;
  std::int64_t step = 1;
  bool json = false;
};
void run_batch(const BatchCommand& command);  // data_batch.cc

struct BaselineCommand {
  ConfigArguments config;
  std::int64_t training_samples = 0;  // 0: one epoch
  bool json = false;
};
void run_baseline(const BaselineCommand& command);

}  // namespace hybridmoe
