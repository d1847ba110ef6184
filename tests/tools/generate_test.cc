// From a run directory to text: the model that inference builds is the one that was trained, and the command
// says what is wrong with what it is given.
#include <sstream>

#include "tests/tools/tiny_run.h"
#include "tools/generate_command.h"
#include "tools/generate_model.h"
#include "tools/utf8_stream.h"

namespace hybridmoe::testing {
namespace {

class GenerateTest : public TinyRunTest {
 protected:
  GenerateCommand command(const std::string& prompt = "abc") {
    GenerateCommand result;
    result.run_dir = run_dir();
    result.prompt = prompt;
    result.threads = 1;
    return result;
  }
  std::string generate(const GenerateCommand& options) {
    std::ostringstream out, notes;
    run_generate(options, out, notes);
    notes_ = notes.str();
    return out.str();
  }

  // The largest difference between -log p of the trained model and of the loaded one.
  double loss_difference(TrainerHarness& run) {
    std::vector<std::int32_t> tokens(kLength), targets(kLength);
    for (int i = 0; i < kLength; ++i) {
      tokens[i] = 37 * i % 257;
      targets[i] = (11 * i + 5) % 257;
    }
    const bool f64 = run.config().precision() == F64;
    std::vector<double> storage(kLength);
    const Tensor losses(storage.data(), f64 ? DType::F64 : DType::F32, {kLength});
    MicroBatch batch;
    batch.tokens = Tensor(tokens.data(), DType::I32, {kLength});
    batch.targets = Tensor(targets.data(), DType::I32, {kLength});
    batch.length = kLength;
    ModelStatistics statistics;
    run->model().evaluate(batch, &statistics, losses);
    const std::vector<double> expected = values_of(losses);

    CheckpointReader checkpoint(find_checkpoint(run_dir(), -1).path);
    InferenceModel model(checkpoint, {.chunk = 4, .cache_positions = kLength});
    Generator generator(model.transformer(), model.size(), {}, 1);
    double largest = 0;
    for (int i = 0; i < kLength; ++i) {
      generator.append(std::span(tokens).subspan(i, 1));
      const double loss = -std::log(token_probabilities(generator.logits(), {})[targets[i]]);
      largest = std::max(largest, std::abs(loss - expected[i]));
    }
    return largest;
  }

  std::string notes_;
};

TEST_F(GenerateTest, LoadsTheTrainedModel) {
  const auto run = make_run("F64");
  // Biases large enough to change the routing: a model loaded without them would differ.
  for (const Tensor& bias : (*run)->router_biases()) {
    for (std::int64_t e = 0; e < bias.elements(); ++e) bias.ptr<double>()[e] = e % 2 == 0 ? 3 : -3;
  }
  CheckpointManifest manifest = read_manifest(find_checkpoint(run_dir(), -1).path);
  manifest.clear_parameter();
  manifest.clear_shard();
  ASSERT_EQ(save_checkpoint(run_dir(), manifest, run->world(), **run).error, "");
  EXPECT_LT(loss_difference(*run), 1e-12);
}

TEST_F(GenerateTest, LoadsRoundedWeights) {
  const auto run = make_run("BF16");
  // The same weights; sums are rounded to bf16 in another order, since rows are computed one at a time.
  EXPECT_LT(loss_difference(*run), 8 * std::exp2(-8));
}

TEST_F(GenerateTest, SameSeedSameText) {
  make_run("F32", "placement: HYBRID_STAR");
  GenerateCommand options = command();
  options.tokens = 10;
  const std::string text = generate(options);
  EXPECT_FALSE(text.empty());
  EXPECT_EQ(generate(options), text);
  EXPECT_EQ(notes_, "");
  options.seed = 2;
  EXPECT_NE(generate(options), text);
  options.rule.temperature = 0;
  const std::string greedy = generate(options);
  options.seed = 3;
  EXPECT_EQ(generate(options), greedy);
  // The prompt may come from a file, or as ids; then ids come out.
  options.prompt.reset();
  options.prompt_file = write("prompt.txt", "abc");
  EXPECT_EQ(generate(options), greedy);
  options.prompt_file.reset();
  options.prompt_tokens = "97 98 99";
  std::istringstream ids(generate(options));
  Utf8Stream characters;
  std::string from_ids;
  for (int id = 0; ids >> id;) from_ids += characters.add(make_byte_tokenizer()->token_text(id));
  EXPECT_EQ(from_ids + characters.finish(), greedy);
}

TEST_F(GenerateTest, StopsWhereTheContextEndsAndSaysSo) {
  make_run("F32");
  GenerateCommand options = command();
  options.prompt.reset();
  options.prompt_tokens = "97 98 99";
  const auto count = [](const std::string& ids) { return 1 + std::count(ids.begin(), ids.end(), ' '); };
  EXPECT_EQ(count(generate(options)), kLength - 3);
  EXPECT_NE(notes_.find(cat("the context of ", kLength, " positions is full")), std::string::npos) << notes_;
  options.positions = 40;
  EXPECT_EQ(count(generate(options)), 37);
  options.tokens = 5;
  options.verbose = true;
  EXPECT_EQ(count(generate(options)), 5);
  EXPECT_NE(notes_.find("drawn: 5 tokens"), std::string::npos) << notes_;
}

TEST_F(GenerateTest, MistakesAreExplained) {
  make_run("F32");
  const auto error = [&](const std::function<void(GenerateCommand*)>& change) {
    GenerateCommand options = command();
    change(&options);
    return error_of([&] { generate(options); });
  };
  const auto says = [&](const std::string& text, const std::function<void(GenerateCommand*)>& change) {
    const std::string message = error(change);
    EXPECT_NE(message.find(text), std::string::npos) << message;
  };
  says("holds no checkpoint", [&](GenerateCommand* c) { c->run_dir = path("nothing"); });
  says("the steps that have one: 3", [](GenerateCommand* c) { c->step = 4; });
  says("the prompt is empty", [](GenerateCommand* c) { c->prompt = ""; });
  says("a prompt is missing", [](GenerateCommand* c) { c->prompt.reset(); });
  says("several prompts", [](GenerateCommand* c) { c->prompt_tokens = "1"; });
  says("temperature is -1", [](GenerateCommand* c) { c->rule.temperature = -1; });
  says("top_p is 0", [](GenerateCommand* c) { c->rule.top_p = 0; });
  says("--tokens is 0", [](GenerateCommand* c) { c->tokens = 0; });
  says("no room", [](GenerateCommand* c) { c->prompt = std::string(kLength, 'a'); });
  says("\"x\" is no token id", [](GenerateCommand* c) {
    c->prompt.reset();
    c->prompt_tokens = "1 x";
  });
  says("not in the model's vocabulary", [](GenerateCommand* c) {
    c->prompt.reset();
    c->prompt_tokens = "257";
  });
  Config raw;  // of a corpus that says nothing of its tokenizer
  raw.mutable_model()->set_vocabulary(1000);
  raw.mutable_data()->add_source()->set_path(path("raw"));
  EXPECT_NE(error_of([&] { tokenizer_of_run(raw, ""); }).find("--prompt_tokens"), std::string::npos);
  EXPECT_EQ(tokenizer_of_run(raw, path("corpus"))->vocabulary(), 257);
}

TEST(Utf8StreamTest, GivesOnWholeCharactersOnly) {
  const std::string text = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z";  // a é € 😀 z
  Utf8Stream stream;
  std::vector<std::size_t> sizes;
  std::string joined;
  for (const char byte : text) {
    const std::string part = stream.add({&byte, 1});
    sizes.push_back(part.size());
    joined += part;
  }
  EXPECT_EQ(joined, text);
  EXPECT_EQ(sizes, (std::vector<std::size_t>{1, 0, 2, 0, 0, 3, 0, 0, 0, 4, 1}));
  EXPECT_EQ(stream.finish(), "");
}

TEST(Utf8StreamTest, ReplacesWhatIsNoCharacter) {
  const std::string r = "\xEF\xBF\xBD";
  const auto through = [](std::string_view bytes) {
    Utf8Stream stream;
    const std::string text = stream.add(bytes);
    return text + stream.finish();
  };
  EXPECT_EQ(through("\x80"), r);
  EXPECT_EQ(through("\xC3"), r);                  // half a character at the end
  EXPECT_EQ(through("\xC3z"), r + "z");           // the z is not swallowed
  EXPECT_EQ(through("\xC0\xAF"), r + r);          // overlong
  EXPECT_EQ(through("\xED\xA0\x80"), r + r + r);  // a surrogate
  // The example of the Unicode Standard, table 3-11.
  EXPECT_EQ(through("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), r + r + r + r + "A");
}

}  // namespace
}  // namespace hybridmoe::testing
