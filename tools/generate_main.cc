// hybridmoe-generate: a trained model goes on from a prompt.
#include <CLI/CLI.hpp>
#include <exception>
#include <iostream>
#include <unistd.h>

#include "tools/generate_command.h"

namespace {

void declare(CLI::App* app, hybridmoe::GenerateCommand* command) {
  app->add_option("--run_dir", command->run_dir, "directory of the run that trained the model")->required();
  app->add_option("--prompt", command->prompt, "text to go on from");
  app->add_option("--prompt_file", command->prompt_file,
                  "file with the text to go on from, taken as it is; -: standard input");
  app->add_option("--prompt_tokens", command->prompt_tokens,
                  "token ids to go on from, separated by spaces; ids come out as well");
  app->add_option("--corpus", command->corpus,
                  "PREFIX of the corpus whose tokenizer to use; default: the run's first data source");
  app->add_option("--step", command->step, "step of the checkpoint; default: the newest")
      ->check(CLI::NonNegativeNumber);
  app->add_option("--tokens", command->tokens, "tokens to draw at most")->capture_default_str();
  app->add_option(
      "--positions", command->positions,
      "longest context in tokens, prompt included: generation stops there; default: the length of "
      "the sequences that the model was trained on");
  app->add_option("--temperature", command->rule.temperature,
                  "divides the logits; 0: always the most probable token")
      ->capture_default_str();
  app->add_option("--top_p", command->rule.top_p,
                  "draw from the fewest most probable tokens that together have this probability")
      ->capture_default_str();
  app->add_option("--seed", command->seed, "the same seed gives the same text")->capture_default_str();
  app->add_option("--threads", command->threads, "default: OMP_NUM_THREADS, else the machine's cores")
      ->check(CLI::PositiveNumber);
  app->add_flag("--verbose", command->verbose, "statistics to standard error");
  app->footer(
      "\nThe continuation, without the prompt, goes to standard output as it is produced, as valid UTF-8 "
      "(bytes "
      "that\nform no character appear as U+FFFD). It ends after --tokens, at the end of a document, or where "
      "the "
      "context is full.");
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Goes on from a prompt with a model of a training run.", "hybridmoe-generate");
  hybridmoe::GenerateCommand command;
  declare(&app, &command);
  try {
    app.parse(argc, argv);
    hybridmoe::run_generate(command, std::cout, std::cerr);
    // On a terminal the shell's own prompt would follow the text on its line.
    if (isatty(STDOUT_FILENO) == 1) std::cout << std::endl;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    std::cerr << "hybridmoe-generate: " << error.what() << std::endl;
    return 1;
  }
  return 0;
}
