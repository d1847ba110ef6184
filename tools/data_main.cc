// hybridmoe-data: makes corpora out of text and shows what is in them.
#include <CLI/CLI.hpp>
#include <exception>
#include <iostream>

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
  CLI::App* tokenize =
      app->add_subcommand("tokenize", "Text to a corpus: PREFIX.bin, PREFIX.idx and PREFIX.info");
  add_text_options(tokenize, &command->inputs);
  tokenize->add_option("--output", command->output, "PREFIX of the corpus")->required();
  tokenize->add_flag("--force", command->force, "Replace a corpus that is there already");
  tokenize->callback([command] { run_tokenize(*command); });
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Makes corpora out of text and shows what is in them.", "hybridmoe-data");
  app.require_subcommand(1);
  try {
    add_tokenize(&app);
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  } catch (const std::exception& error) {
    std::cerr << "hybridmoe-data: " << error.what() << std::endl;
    return 1;
  }
  return 0;
}
