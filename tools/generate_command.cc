#include "tools/generate_command.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <sstream>
#include <thread>

#include "core/data/corpus_info.h"
#include "core/files/file.h"
#include "tools/generate_model.h"
#include "tools/utf8_stream.h"

namespace hybridmoe {

namespace {

constexpr std::int64_t kChunk = 256;  // prompt tokens evaluated at once

std::vector<std::int32_t> parse_ids(const std::string& text) {
  std::vector<std::int32_t> ids;
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    std::int32_t id = 0;
    std::istringstream number(word);
    require(bool(number >> id) && number.peek() == EOF, "--prompt_tokens: \"", word,
            "\" is no token id; ids separated by spaces were expected");
    ids.push_back(id);
  }
  return ids;
}

std::string read_prompt(const GenerateCommand& command) {
  if (command.prompt) return *command.prompt;
  if (*command.prompt_file != "-") return read_whole_file(*command.prompt_file);
  return {std::istreambuf_iterator<char>(std::cin), {}};
}

void check(const GenerateCommand& command) {
  const int prompts =
      command.prompt.has_value() + command.prompt_file.has_value() + command.prompt_tokens.has_value();
  require(prompts == 1, prompts == 0 ? "a prompt is missing" : "there are several prompts",
          "; give one of --prompt, --prompt_file and --prompt_tokens");
  check_sampling_rule(command.rule);
  require(command.tokens > 0, "--tokens is ", command.tokens, "; a positive number was expected");
  require(command.positions >= 0, "--positions is ", command.positions,
          "; a positive number, or 0 for the length of the run's sequences, was expected");
}

int threads_of(int wanted) {
  if (wanted > 0) return wanted;
  const char* set = std::getenv("OMP_NUM_THREADS");
  if (set != nullptr && std::atoi(set) > 0) return std::atoi(set);
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// From a prompt to ids, and from drawn ids to output: as text, or as ids when there is no tokenizer.
class Text {
 public:
  Text(const GenerateCommand& command, const Config& config, std::ostream& out) : out_(out) {
    if (command.prompt_tokens) {
      prompt_ = parse_ids(*command.prompt_tokens);
      end_of_document_ = config.data().raw_end_of_document();
      if (const auto info = config.data().source_size() > 0 ? read_corpus_info(config.data().source(0).path())
                                                            : std::nullopt) {
        end_of_document_ = info->end_of_document();
      }
    } else {
      const std::string text = read_prompt(command);
      require(!text.empty(), "the prompt is empty; the model goes on from at least one token");
      tokenizer_ = tokenizer_of_run(config, command.corpus);
      prompt_ = tokenizer_->encode(text);
      end_of_document_ = tokenizer_->end_of_document();
    }
    require(!prompt_.empty(), "the prompt has no token; the model goes on from at least one");
    for (const std::int32_t id : prompt_) {
      require(id >= 0 && id < config.model().vocabulary(), "the prompt's token ", id,
              " is not in the model's vocabulary, 0 to ", config.model().vocabulary() - 1,
              tokenizer_ ? "; the tokenizer is not the run's" : "");
    }
  }

  const std::vector<std::int32_t>& prompt() const { return prompt_; }
  bool ends_document(std::int32_t id) const { return id == end_of_document_; }
  void put(std::int32_t id) {
    if (tokenizer_ == nullptr) {
      out_ << (first_ ? "" : " ") << id;
    } else if (id < tokenizer_->vocabulary()) {  // the model's may be larger
      out_ << characters_.add(tokenizer_->token_text(id));
    }
    first_ = false;
    flush();
  }
  void finish() {
    out_ << characters_.finish();
    flush();
  }

 private:
  void flush() {
    out_.flush();
    require(out_.good(), "the text cannot be written to the standard output");
  }

  std::ostream& out_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::vector<std::int32_t> prompt_;
  std::int32_t end_of_document_ = -1;
  Utf8Stream characters_;
  bool first_ = true;
};

}  // namespace

std::unique_ptr<Tokenizer> tokenizer_of_run(const Config& config, const std::string& corpus) {
  std::unique_ptr<Tokenizer> tokenizer;
  if (!corpus.empty()) {
    tokenizer = open_tokenizer(corpus);
  } else {
    const std::string source = config.data().source_size() > 0 ? config.data().source(0).path() : "";
    if (!source.empty() && read_corpus_info(source)) {
      tokenizer = open_tokenizer(source);
    } else {
      tokenizer = make_byte_tokenizer();
      require(tokenizer->vocabulary() == config.model().vocabulary(), "the run's data ", source,
              " does not say what its tokenizer is (there is no ", corpus_info_path(source),
              "); start this program where the run was started, or name a corpus of the same tokenizer with "
              "--corpus, or give ids with --prompt_tokens");
    }
  }
  require(tokenizer->vocabulary() <= config.model().vocabulary(), "the tokenizer has ",
          tokenizer->vocabulary(), " ids, the model ", config.model().vocabulary(),
          "; --corpus must name a corpus of the tokenizer that the run was trained with");
  return tokenizer;
}

void run_generate(const GenerateCommand& command, std::ostream& out, std::ostream& notes) {
  check(command);
  CheckpointReader checkpoint(find_checkpoint(command.run_dir, command.step).path);
  const Config& config = checkpoint.manifest().config();
  Text text(command, config, out);
  const std::int64_t length = config.model().sequence_length();
  const std::int64_t positions = command.positions > 0 ? command.positions : length;
  const auto prompt = static_cast<std::int64_t>(text.prompt().size());
  require(prompt < positions, "the prompt has ", prompt, " tokens and leaves no room in a context of ",
          positions, "; shorten it, or raise --positions (the model was trained on sequences of ", length,
          ")");

  InferenceModel model(checkpoint, {.chunk = std::min({prompt, positions, kChunk}),
                                    .cache_positions = positions,
                                    .threads = threads_of(command.threads)});
  if (command.verbose) {
    notes << "step " << checkpoint.manifest().step() << " of " << checkpoint.directory() << ", "
          << model.backend().name() << ", " << model.memory().bytes() / (1 << 20) << " MiB planned\n";
  }
  Generator generator(model.transformer(), model.size(), command.rule, command.seed);
  auto begin = std::chrono::steady_clock::now();
  generator.append(text.prompt());
  const double prompt_seconds = seconds_since(begin);
  begin = std::chrono::steady_clock::now();
  std::int64_t drawn = 0;
  bool ended = false;
  while (drawn < command.tokens && !ended && !generator.full()) {
    const std::int32_t token = generator.next();
    ++drawn;
    ended = text.ends_document(token);
    if (!ended) text.put(token);
  }
  text.finish();
  const double seconds = seconds_since(begin);
  if (!ended && drawn < command.tokens) {
    notes << "stopped after " << drawn << " tokens: the context of " << positions
          << " positions is full (--positions; the model was trained on sequences of " << length << ")\n";
  }
  if (command.verbose) {
    if (ended) notes << "stopped at the end of the document\n";
    notes << "prompt: " << prompt << " tokens in " << prompt_seconds << " s; drawn: " << drawn
          << " tokens in " << seconds << " s, " << static_cast<double>(drawn) / seconds << " tokens/s\n";
  }
}

}  // namespace hybridmoe
