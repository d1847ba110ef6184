#include "core/data/text_input.h"

#include <zlib.h>

#include "core/data/document_splitter.h"
#include "core/data/tokenize.h"
#include "tests/core/data_testing.h"

namespace hybridmoe {
namespace {

using testing::error_of;
using Texts = std::vector<std::string>;

Texts split(const std::string& rule, const std::string& text, std::size_t piece = 1) {
  Texts documents;
  DocumentSplitter splitter(SplitRule::parse(rule),
                            [&](std::string&& document) { documents.push_back(document); });
  for (std::size_t at = 0; at < text.size(); at += piece)
    splitter.add(std::string_view(text).substr(at, piece));
  splitter.finish();
  return documents;
}

TEST(DocumentSplitter, Rules) {
  for (const std::size_t piece : {1, 3, 1000}) {
    EXPECT_EQ(split("none", "a\n\nb\n", piece), (Texts{"a\n\nb\n"}));
    EXPECT_EQ(split("none", " \n", piece), Texts{});
    EXPECT_EQ(split("lines", "a\n\nb", piece), (Texts{"a\n", "\nb"}));
    EXPECT_EQ(split("blank_lines", "\na\n \nb\nc\n\n\nd", piece), (Texts{"\na\n \n", "b\nc\n\n\n", "d"}));
    EXPECT_EQ(split("blank_lines:2", "a\n\nb\n\n\nc\n\n", piece), (Texts{"a\n\nb\n\n\n", "c\n\n"}));
    EXPECT_EQ(split("size:4", "ab\ncd\nefghij\nk", piece), (Texts{"ab\ncd\n", "efghij\n", "k"}));
    EXPECT_EQ(split("pattern:^= .* =$", "x\n= A =\na\n= B =\n= c\n", piece),
              (Texts{"x\n", "= A =\na\n", "= B =\n= c\n"}));
  }
  EXPECT_EQ(split("pattern:^b", std::string("a\0\nb\n", 5)), (Texts{std::string("a\0\n", 3), "b\n"}));
}

TEST(DocumentSplitter, WrongRulesAreNamed) {
  for (const char* rule :
       {"", "lines:2", "size", "size:0", "size:x", "blank_lines:-1", "blank_lines:", "pattern:", "words"}) {
    EXPECT_NE(error_of([&] { SplitRule::parse(rule); }).find("size:BYTES"), std::string::npos) << rule;
  }
  EXPECT_NE(error_of([&] { split("pattern:(", "x"); }).find("regular expression"), std::string::npos);
}

class TextInputTest : public testing::TemporaryFolder {
 protected:
  Texts documents(const TextInputs& inputs) {
    Texts all;
    statistics_ = {};
    read_documents(
        inputs, [&](std::string&& document) { all.push_back(document); }, &statistics_);
    return all;
  }
  std::string write_gzip(const std::string& name, const std::string& content) {
    gzFile file = ::gzopen(path(name).c_str(), "wb");
    ::gzwrite(file, content.data(), static_cast<unsigned>(content.size()));
    ::gzclose(file);
    return path(name);
  }
  TextStatistics statistics_;
};

TEST_F(TextInputTest, FoldersGzipAndBinaryFiles) {
  write("d/b.txt", "bee");
  write("d/a/z.txt", "zed");
  write("d/empty", "");
  write("d/picture.png", std::string("\x89PNG\0\0", 6));
  write_gzip("d/c.txt.gz", "compressed");
  EXPECT_EQ(documents({{path("d")}}), (Texts{"zed", "bee", "compressed"}));
  EXPECT_EQ(statistics_.binary_files, 1);
  EXPECT_EQ(statistics_.files, 4);
  EXPECT_EQ(statistics_.documents, 3);
  EXPECT_EQ(statistics_.bytes, 16);
  TextInputs matching{{path("d")}};
  matching.match = "*.txt";
  EXPECT_EQ(documents(matching), (Texts{"zed", "bee"}));
  matching.match = "*.rst";
  EXPECT_NE(error_of([&] { documents(matching); }).find("*.rst"), std::string::npos);
  EXPECT_NE(error_of([&] {
              documents({{path("d/b.txt"), path("gone")}});
            }).find("gone: does not exist"),
            std::string::npos);
}

TEST_F(TextInputTest, TruncatedGzipIsAnError) {
  std::string noise;
  for (std::uint32_t i = 0, x = 1; i < 100000; ++i)
    noise += static_cast<char>('a' + ((x = x * 1664525 + 1013904223) >> 27) % 26);
  const std::string whole = read(write_gzip("whole.gz", noise));
  for (const std::size_t bytes : {whole.size() - 1, whole.size() / 2, std::size_t{20}}) {
    const std::string file = write("cut.gz", whole.substr(0, bytes));
    EXPECT_NE(error_of([&] { documents({{file}}); }).find("cut.gz: cannot be read"), std::string::npos)
        << bytes;
  }
}

TEST_F(TextInputTest, JsonLines) {
  TextInputs inputs{
      {write("d.jsonl", "{\"text\": \"one\\n\", \"id\": 1}\n\n{\"id\": 2, \"text\": \"tw\\u00f6\"}")}};
  inputs.json_field = "text";
  EXPECT_EQ(documents(inputs), (Texts{"one\n", "tw\xc3\xb6"}));
  inputs.json_field = "body";
  EXPECT_NE(error_of([&] { documents(inputs); }).find("d.jsonl:1: has no text field named body"),
            std::string::npos);
  inputs.json_field = "id";
  EXPECT_NE(error_of([&] { documents(inputs); }).find("no text field"), std::string::npos);
  write("d.jsonl", "{\"text\": \"one\"}\n[1]\n");
  inputs.json_field = "text";
  EXPECT_NE(error_of([&] { documents(inputs); }).find("d.jsonl:2"), std::string::npos);
  write("d.jsonl", "{\"text\": \"one\"}\nnonsense\n");
  EXPECT_NE(error_of([&] { documents(inputs); }).find("d.jsonl:2: is not JSON"), std::string::npos);
}

TEST_F(TextInputTest, TokenizedBytesComeBack) {
  const std::string text = "Grüße,\n\nzweiter Absatz\xff\n";
  TextInputs inputs{{write("t.txt", text)}};
  inputs.split_documents = "blank_lines";
  const auto tokenizer = make_byte_tokenizer();
  const CorpusInfo info =
      tokenize_corpus(inputs, tokenizer.get(), path("c"), false, [](const TokenizeProgress&) {});
  EXPECT_EQ(info.documents(), 2);
  EXPECT_EQ(info.text_bytes(), static_cast<std::int64_t>(text.size()));
  EXPECT_EQ(info.tokens(), static_cast<std::int64_t>(text.size()) + 2);
  const TokenFile file = TokenFile::open_indexed(path("c"));
  std::vector<std::int32_t> tokens(file.tokens());
  file.read(0, file.tokens(), 257, tokens.data());
  EXPECT_EQ(tokenizer->decode(tokens), text);
  EXPECT_EQ(tokens.back(), 256);
  const auto reread = read_corpus_info(path("c"));
  ASSERT_TRUE(reread.has_value());
  EXPECT_EQ(reread->SerializeAsString(), info.SerializeAsString());
}

}  // namespace
}  // namespace hybridmoe
