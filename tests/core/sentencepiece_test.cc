#include "core/data/sentencepiece.h"

#include <csignal>

#include "core/data/byte_model.h"
#include "core/data/corpus_info.h"
#include "core/data/helper_process.h"
#include "core/data/inspect.h"
#include "core/data/tokenize.h"
#include "core/files/atomic_file.h"
#include "tests/core/data_testing.h"

namespace hybridmoe {
namespace {

using sentencepiece_protocol::Kind;
using testing::error_of;

class SentencePieceTest : public testing::TemporaryFolder {
 protected:
  static bool helper_built() { return std::filesystem::exists(HYBRIDMOE_BIN_DIR "/hybridmoe-sentencepiece"); }

  // Where SentencePiece is not installed, what remains to be tested is that its absence is explained.
  void SetUp() override {
    if (helper_built()) return;
    const std::string error = error_of([&] { HelperProcess("hybridmoe-sentencepiece"); });
    EXPECT_NE(error.find("libsentencepiece-dev"), std::string::npos) << error;
    GTEST_SKIP() << "hybridmoe-sentencepiece is not built: " << error;
  }

  TextInputs text() {
    std::string content;
    for (int i = 0; i < 400; ++i) {
      content +=
          cat("The quick brown fox number ", i * 37 % 101, " jumps over the lazy dog and the hen.\n\n");
    }
    return {{write("text.txt", content)}};
  }
  std::string train(const std::string& type) {
    SentencePieceTraining training;
    training.type = type;
    training.vocabulary = 340;
    const std::string model = path(type + ".model");
    write_file_atomically(model, train_sentencepiece(text(), training));
    return model;
  }
};

TEST_F(SentencePieceTest, RoundTripIsExactForAnyBytes) {
  for (const char* type : {"bpe", "unigram"}) {
    const auto tokenizer = make_sentencepiece_tokenizer(train(type));
    EXPECT_LE(tokenizer->vocabulary(), 340);
    std::string every_byte;
    for (int byte = 0; byte < 256; ++byte) every_byte += static_cast<char>(byte);
    const std::vector<std::string> texts = {"The quick brown fox.",
                                            "",
                                            " leading  and   inner spaces ",
                                            "tabs\tand\r\nline ends\n\n\n",
                                            "Grüße 漢字 🙂",
                                            "\xe2\x96\x81 the mark of a space",
                                            every_byte,
                                            std::string("zero\0inside", 11),
                                            "overlong \xc0\xaf, surrogate \xed\xa0\x80, cut \xf0\x9f\x99"};
    const auto tokens = tokenizer->encode(texts);
    for (std::size_t i = 0; i < texts.size(); ++i) {
      EXPECT_EQ(tokenizer->decode(tokens[i]), texts[i]) << type << " text " << i;
      std::int64_t bytes = 0;
      for (const std::int32_t id : tokens[i]) bytes += tokenizer->token_bytes(id);
      EXPECT_EQ(bytes, static_cast<std::int64_t>(texts[i].size()));
    }
    EXPECT_LT(tokens[0].size(), texts[0].size());  // it learned something
    EXPECT_EQ(tokenizer->token_bytes(tokenizer->end_of_document()), 0);
    EXPECT_NE(error_of([&] { tokenizer->token_text(tokenizer->vocabulary()); }).find("outside"),
              std::string::npos);
  }
}

TEST_F(SentencePieceTest, CorpusKnowsItsTokenizerAndBytes) {
  const std::string model = train("bpe");
  const auto tokenizer = make_sentencepiece_tokenizer(model);
  const CorpusInfo info =
      tokenize_corpus(text(), tokenizer.get(), path("c"), false, [](const TokenizeProgress&) {});
  EXPECT_EQ(info.model_file(), "c.model");
  EXPECT_EQ(read(path("c.model")), read(model));
  const TokenFile file = TokenFile::open_indexed(path("c"));
  const CorpusReport report = inspect_corpus(file, info.vocabulary(), &info);
  EXPECT_EQ(report.text_bytes, info.text_bytes());
  EXPECT_TRUE(report.remarks.empty());
  std::vector<std::int32_t> tokens(file.tokens());
  file.read(0, file.tokens(), info.vocabulary(), tokens.data());
  EXPECT_EQ(open_tokenizer(path("c"))->decode(tokens), read(path("text.txt")));

  // A baseline sees bytes, whatever the tokens are.
  Config config;
  config.mutable_model()->set_sequence_length(16);
  config.mutable_data()->set_held_out(0.1);
  config.mutable_data()->add_source()->set_path(path("c"));
  const auto dataset = Dataset::open(config);
  const Baseline baseline = fit_baseline(*dataset, *tokenizer, 0, 0);
  EXPECT_GT(baseline.held_out_bytes, baseline.held_out_targets);
  EXPECT_LT(baseline.bits_per_byte[2], baseline.bits_per_byte[0]);

  write("c.model", read(train("unigram")));
  EXPECT_NE(error_of([&] { open_tokenizer(path("c")); }).find("hash"), std::string::npos);
  std::filesystem::remove(path("c.model"));
  EXPECT_NE(error_of([&] { open_tokenizer(path("c")); }).find("c.model"), std::string::npos);
}

TEST_F(SentencePieceTest, ProcessesShareTheWorkInOrder) {
  const std::string model = train("bpe");
  const auto one = make_sentencepiece_tokenizer(model), three = make_sentencepiece_tokenizer(model, 3);
  std::vector<std::string> texts;
  for (int i = 0; i < 50; ++i) texts.push_back(std::string(i * i % 17, 'x') + cat(" fox ", i));
  EXPECT_EQ(three->encode(texts), one->encode(texts));
  EXPECT_EQ(three->encode(texts[0]), one->encode(texts[0]));
  EXPECT_TRUE(three->encode(std::vector<std::string>{}).empty());
}

TEST_F(SentencePieceTest, MistakesAreNamed) {
  const std::string junk = write("junk.model", "this is no model");
  EXPECT_NE(error_of([&] { make_sentencepiece_tokenizer(junk); }).find("junk.model"), std::string::npos);
  EXPECT_NE(error_of([&] { make_sentencepiece_tokenizer(path("gone.model")); }).find("gone.model"),
            std::string::npos);
  SentencePieceTraining training;
  training.vocabulary = 100;
  EXPECT_NE(error_of([&] { train_sentencepiece(text(), training); }).find("at least 300"), std::string::npos);
  training = {};
  training.character_coverage = 2;
  EXPECT_NE(error_of([&] { train_sentencepiece(text(), training); }).find("SentencePiece: training failed"),
            std::string::npos);
  training = {};
  training.type = "words";
  EXPECT_NE(error_of([&] { train_sentencepiece(text(), training); }).find("--type words"), std::string::npos);
  EXPECT_NE(error_of([&] { HelperProcess("hybridmoe-no-such-helper"); }).find("HYBRIDMOE_LIBEXEC"),
            std::string::npos);
}

TEST_F(SentencePieceTest, ADyingHelperIsAnError) {
  HelperProcess helper("hybridmoe-sentencepiece");
  helper.send(Kind::Load, train("bpe"));
  helper.receive();
  ::kill(helper.id(), SIGKILL);
  const std::string error = error_of([&] {
    for (int i = 0; i < 1000; ++i) {
      helper.send(Kind::Encode, std::string(4, '\0'));
      helper.receive();
    }
  });
  EXPECT_NE(error.find("signal 9"), std::string::npos) << error;
}

}  // namespace
}  // namespace hybridmoe
