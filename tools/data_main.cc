// hybridmoe-data: makes corpora out of text and shows what is in them.
#include <CLI/CLI.hpp>
#include <exception>
#include <iostream>

#include "core/config/load.h"
#include "tools/data_commands.h"

namespace {

using namespace hybridmoe;

void add_text_options(CLI::App* app, TextInputs* inputs) {
  app->add_option("--input,input", inputs->paths,
                  "Text files, gzip files, folders (read recursively) or - for standard input")
      ->required();
  app->add_option("--match", inputs->match,
                  "In folders, only files whose name matches this pattern, such as '*.txt'");
  app->add_option("--json_field", inputs->json_field,
                  "The input is JSON lines, and this field of each object is the text of a document");
  app->add_option(
         "--split_documents", inputs->split_documents,
         "How a text becomes documents: none (a file is one), lines (each line), blank_lines[:N] (a document "
         "begins after N or more blank lines), size:BYTES (a document ends with the line that brings it to "
         "this size) or pattern:EXPRESSION (a document begins with each line in which the POSIX extended "
         "regular expression is found)")
      ->capture_default_str();
}

void add_tokenize(CLI::App* app) {
  auto command = std::make_shared<TokenizeCommand>();
  CLI::App* sub = app->add_subcommand("tokenize", "Text to a corpus: PREFIX.bin, PREFIX.idx and PREFIX.info");
  add_text_options(sub, &command->inputs);
  sub->add_option("--tokenizer", command->tokenizer, "byte, or sentencepiece with --model")
      ->capture_default_str();
  sub->add_option("--model", command->model, "SentencePiece model; a copy becomes PREFIX.model");
  sub->add_option("--processes", command->processes, "SentencePiece processes; 0: one for each core")
      ->capture_default_str();
  sub->add_option("--output", command->output, "PREFIX of the corpus")->required();
  sub->add_flag("--force", command->force, "Replace a corpus that is there already");
  sub->callback([command] { run_tokenize(*command); });
}

void add_train_tokenizer(CLI::App* app) {
  auto command = std::make_shared<TrainTokenizerCommand>();
  SentencePieceTraining& training = command->training;
  CLI::App* sub =
      app->add_subcommand("train-tokenizer", "Trains a SentencePiece model on the lines of a text");
  add_text_options(sub, &command->inputs);
  sub->add_option("--vocabulary", training.vocabulary, "Token ids, bytes and marks included")
      ->capture_default_str();
  sub->add_option("--type", training.type, "bpe or unigram")->capture_default_str();
  sub->add_option(
         "--character_coverage", training.character_coverage,
         "Share of the text's characters that get tokens of their own; the others are spelled in bytes")
      ->capture_default_str();
  sub->add_option("--sentences", training.sentences, "Lines to train on at most, a random choice")
      ->capture_default_str();
  sub->add_option("--threads", training.threads, "Threads of the training")->capture_default_str();
  sub->add_option("--output", command->output, "File of the model")->required();
  sub->add_flag("--force", command->force, "Replace a model that is there already");
  sub->callback([command] { run_train_tokenizer(*command); });
}

void add_inspect(CLI::App* app) {
  auto command = std::make_shared<InspectCommand>();
  CLI::App* sub = app->add_subcommand("inspect", "Checks all of a corpus and says what it holds");
  sub->add_option("corpus", command->corpus, "PREFIX of a corpus, or a raw file")->required();
  sub->add_option("--file_type", command->file_type, "INDEXED, RAW_UINT16 or RAW_UINT32")
      ->capture_default_str();
  sub->add_option("--vocabulary", command->vocabulary, "Ids must be below it; 0: as the .info says");
  sub->add_option("--end_of_document", command->end_of_document,
                  "In a raw file, the id that ends a document");
  sub->add_option("--first_token", command->first_token, "Where to begin showing tokens")
      ->capture_default_str();
  sub->add_option("--tokens", command->show_tokens, "Tokens to show")->capture_default_str();
  sub->callback([command] { run_inspect(*command); });
}

void add_config_options(CLI::App* sub, ConfigArguments* config) {
  sub->add_option("--config", config->path, "Configuration of the run (protobuf text)")->required();
  sub->add_option("--set", config->overrides, "PATH=VALUE, repeatable. " + override_grammar())
      ->take_all()
      ->expected(1)
      ->allow_extra_args(false);
}

void add_batch(CLI::App* app) {
  auto command = std::make_shared<BatchCommand>();
  CLI::App* sub =
      app->add_subcommand("batch", "Which tokens a training step takes, and from which documents");
  add_config_options(sub, &command->config);
  sub->add_option("--step", command->step, "The step; the first is 1")->required();
  sub->add_flag("--json", command->json, "One JSON object, with all tokens");
  sub->callback([command] { run_batch(*command); });
}

void add_baseline(CLI::App* app) {
  auto command = std::make_shared<BaselineCommand>();
  CLI::App* sub = app->add_subcommand(
      "baseline",
      "Held-out bits per byte of context models of order 0, 1 and 2 fitted to the training split");
  add_config_options(sub, &command->config);
  sub->add_option("--training_samples", command->training_samples, "Samples to fit to; 0: one epoch")
      ->capture_default_str();
  sub->add_flag("--json", command->json, "One JSON object");
  sub->callback([command] { run_baseline(*command); });
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Makes corpora out of text and shows what is in them.", "hybridmoe-data");
  app.require_subcommand(1);
  try {
    add_tokenize(&app);
    add_train_tokenizer(&app);
    add_inspect(&app);
    add_batch(&app);
    add_baseline(&app);
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  } catch (const std::exception& error) {
    std::cerr << "hybridmoe-data: " << error.what() << std::endl;
    return 1;
  }
  return 0;
}
