#include "core/data/token_file.h"

#include <cstring>
#include <functional>

#include "tests/core/data_testing.h"

namespace hybridmoe {
namespace {

using testing::counting;
using testing::error_of;

class TokenFileTest : public testing::TemporaryFolder {
 protected:
  // Writes a good corpus of three documents, lets `spoil` change the bytes of its index or tokens, and
  // returns the error of opening it.
  std::string error_after(const char* extension, const std::function<void(std::string*)>& spoil) {
    if (!std::filesystem::exists(path("good.idx"))) {
      write_corpus("good", {counting(5, 100), counting(7, 100), counting(3, 100)});
    }
    const std::string prefix = path("spoilt");
    for (const char* e : {".bin", ".idx"}) write(std::string("spoilt") + e, read(path("good") + e));
    std::string bytes = read(prefix + extension);
    spoil(&bytes);
    write(std::string("spoilt") + extension, bytes);
    return error_of([&] { TokenFile::open_indexed(prefix); });
  }
  template <class T>
  static void put(std::string* bytes, std::size_t at, T value) {
    std::memcpy(bytes->data() + at, &value, sizeof value);
  }
};

// Offsets within an index of three sequences and four document entries.
constexpr std::size_t kLengths = 34, kPointers = kLengths + 12, kDocuments = kPointers + 24,
                      kEnd = kDocuments + 32;

TEST_F(TokenFileTest, LayoutIsMegatronsByteByByte) {
  write_corpus("c", {{1, 2, 258}, {3}});
  const std::string bin("\x01\x00\x02\x00\x02\x01\x03\x00", 8);
  EXPECT_EQ(read(path("c.bin")), bin);
  const std::string idx(
      "MMIDIDX\0\0"                       // magic
      "\1\0\0\0\0\0\0\0"                  // version
      "\x08"                              // uint16
      "\2\0\0\0\0\0\0\0"                  // sequences
      "\3\0\0\0\0\0\0\0"                  // entries of the document index
      "\3\0\0\0\1\0\0\0"                  // lengths
      "\0\0\0\0\0\0\0\0\6\0\0\0\0\0\0\0"  // pointers
      "\0\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0",
      9 + 8 + 1 + 8 + 8 + 8 + 16 + 24);
  EXPECT_EQ(read(path("c.idx")), idx);
}

TEST_F(TokenFileTest, ReadsBackWhatWasWritten) {
  for (const TokenType type : {TokenType::UInt8, TokenType::UInt16, TokenType::Int32}) {
    const std::string prefix = write_corpus(name_of(type), {counting(5, 250), counting(300, 250)}, type);
    for (const std::string& name : {prefix, prefix + ".bin", prefix + ".idx"}) {
      const TokenFile file = TokenFile::open_indexed(name);
      EXPECT_EQ(file.type(), type);
      ASSERT_EQ(file.tokens(), 305);
      EXPECT_EQ(file.documents(), 2);
      std::vector<std::int32_t> tokens(300);
      file.read(5, 300, 250, tokens.data());
      EXPECT_EQ(tokens, counting(300, 250));
      EXPECT_EQ(file.document_of(4), 0);
      EXPECT_EQ(file.document_of(5), 1);
      EXPECT_EQ(file.document_starts(0, 305), (std::vector<std::int64_t>{0, 5}));
      EXPECT_EQ(file.document_starts(1, 5), (std::vector<std::int64_t>{}));
    }
  }
}

// Types that other programs write: the .bin is made by hand, the index changed accordingly.
TEST_F(TokenFileTest, ReadsEveryIntegerType) {
  write_corpus("c", {{1, 2, 3}});
  const std::string index = read(path("c.idx"));
  const auto check = [&](int code, const std::string& bin) {
    std::string changed = index;
    changed[17] = static_cast<char>(code);
    write("t.idx", changed);
    write("t.bin", bin);
    std::vector<std::int32_t> tokens(3);
    TokenFile::open_indexed(path("t")).read(0, 3, 100, tokens.data());
    EXPECT_EQ(tokens, (std::vector<std::int32_t>{1, 2, 3})) << "code " << code;
  };
  check(1, std::string("\1\2\3", 3));
  check(2, std::string("\1\2\3", 3));
  check(3, std::string("\1\0\2\0\3\0", 6));
  check(8, std::string("\1\0\2\0\3\0", 6));
  check(4, std::string("\1\0\0\0\2\0\0\0\3\0\0\0", 12));
  check(5, std::string("\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0\3\0\0\0\0\0\0\0", 24));
}

TEST_F(TokenFileTest, EmptyDocumentsAndSeveralSequencesPerDocument) {
  // Lengths 2, 0, 3; documents: sequences {0}, {}, {1, 2}; with the optional modes at the end.
  std::string idx("MMIDIDX\0\0\1\0\0\0\0\0\0\0\1\3\0\0\0\0\0\0\0\4\0\0\0\0\0\0\0", kLengths);
  idx += std::string("\2\0\0\0\0\0\0\0\3\0\0\0", 12);
  for (const char pointer : {0, 2, 2}) idx += std::string(1, pointer) + std::string(7, '\0');
  for (const char entry : {0, 1, 1, 3}) idx += std::string(1, entry) + std::string(7, '\0');
  write("c.idx", idx + std::string(3, '\0'));
  write("c.bin", "abcde");
  const TokenFile file = TokenFile::open_indexed(path("c"));
  EXPECT_EQ(file.documents(), 3);
  EXPECT_EQ(file.document_of(1), 0);
  EXPECT_EQ(file.document_of(2), 2);
  EXPECT_EQ(file.document(1).begin, file.document(1).end);
  EXPECT_EQ(file.document_starts(0, 5), (std::vector<std::int64_t>{0, 2}));
}

TEST_F(TokenFileTest, EveryInconsistencyIsNamed) {
  const auto cut = [](std::size_t bytes) { return [bytes](std::string* s) { s->resize(bytes); }; };
  const std::string prefix = path("spoilt");
  for (std::size_t bytes = 0; bytes < kEnd; ++bytes) {
    const std::string error = error_after(".idx", cut(bytes));
    EXPECT_NE(error.find(prefix + ".idx: "), std::string::npos) << bytes << ": " << error;
  }
  EXPECT_NE(error_after(".bin", cut(28)).find("spoilt.bin: has 28 bytes"), std::string::npos);
  EXPECT_NE(error_after(".bin", cut(0)).find("empty"), std::string::npos);
  EXPECT_NE(error_after(".bin", [](std::string* s) { *s += "xx"; }).find("has 32 bytes"), std::string::npos);
  const auto expect = [&](std::size_t at, auto value, const char* part) {
    const std::string error = error_after(".idx", [&](std::string* s) { put(s, at, value); });
    EXPECT_NE(error.find(part), std::string::npos) << error;
  };
  expect(0, 'X', "MMIDIDX");
  expect(9, std::uint64_t{2}, "version 2");
  expect(17, std::uint8_t{7}, "type code 7");
  expect(17, std::uint8_t{4}, "truncated or belongs to another");
  expect(18, std::uint64_t{1} << 62, "truncated");
  expect(26, ~std::uint64_t{0}, "truncated");
  expect(kLengths, std::int32_t{4}, "sequence 0 has 4 tokens");
  expect(kLengths, std::int32_t{-5}, "sequence 0 has -5 tokens");
  expect(kPointers, std::int64_t{2}, "sequence 0");
  expect(kPointers + 8, std::int64_t{11}, "sequence 0");
  expect(kDocuments, std::int64_t{1}, "begins with 1");
  expect(kDocuments + 8, std::int64_t{3}, "document 1 holds sequences 3 to 2");
  expect(kDocuments + 8, std::int64_t{-1}, "document 0 holds");
  expect(kDocuments + 24, std::int64_t{2}, "ends with 2");
  EXPECT_NE(error_of([&] { TokenFile::open_indexed(path("nowhere")); }).find("nowhere.idx: does not exist"),
            std::string::npos);
}

TEST_F(TokenFileTest, BadIdsAreNamedWithTheirPosition) {
  const std::string prefix = write_corpus("c", {{1, 2, 300, 4}});
  const TokenFile file = TokenFile::open_indexed(prefix);
  std::vector<std::int32_t> tokens(4);
  file.read(0, 4, 301, tokens.data());
  const std::string error = error_of([&] { file.read(1, 3, 300, tokens.data()); });
  EXPECT_NE(error.find("c.bin: token 2 has id 300"), std::string::npos) << error;
}

TEST_F(TokenFileTest, RawFiles) {
  write("r16", std::string("\1\0\2\0\7\0\3\0", 8));
  const TokenFile file = TokenFile::open_raw(path("r16"), TokenType::UInt16, 7);
  std::vector<std::int32_t> tokens(4);
  file.read(0, 4, 8, tokens.data());
  EXPECT_EQ(tokens, (std::vector<std::int32_t>{1, 2, 7, 3}));
  EXPECT_EQ(file.document_starts(0, 4), (std::vector<std::int64_t>{0, 3}));
  EXPECT_EQ(file.documents(), -1);
  write("r32", std::string("\1\0\0\0\xff\xff\xff\xff", 8));
  const TokenFile wide = TokenFile::open_raw(path("r32"), TokenType::UInt32, -1);
  EXPECT_NE(error_of([&] { wide.read(0, 2, 8, tokens.data()); }).find("id 4294967295"), std::string::npos);
  write("odd", "abc");
  EXPECT_NE(error_of([&] { TokenFile::open_raw(path("odd"), TokenType::UInt16, -1); }).find("not a multiple"),
            std::string::npos);
  write("empty", "");
  EXPECT_NE(error_of([&] { TokenFile::open_raw(path("empty"), TokenType::UInt16, -1); }).find("is empty"),
            std::string::npos);
  EXPECT_NE(
      error_of([&] { TokenFile::open_raw(path("none"), TokenType::UInt16, -1); }).find("cannot be opened"),
      std::string::npos);
}

TEST_F(TokenFileTest, WriterRefusesToOverwriteAndLeavesNothingUnfinished) {
  const std::string prefix = write_corpus("c", {{1}});
  const std::string before = read(prefix + ".bin");
  EXPECT_NE(error_of([&] { TokenWriter(prefix, TokenType::UInt16, false); }).find("--force"),
            std::string::npos);
  EXPECT_EQ(read(prefix + ".bin"), before);
  {
    TokenWriter writer(path("unfinished"), TokenType::UInt16, false);
    writer.append(counting(10, 5));
  }
  for (const auto& entry : std::filesystem::directory_iterator(folder_.path())) {
    EXPECT_EQ(entry.path().filename().string().find("unfinished"), std::string::npos) << entry.path();
  }
  // Replacing an old corpus begins when the new one is complete.
  {
    TokenWriter writer(prefix, TokenType::UInt16, true);
    writer.append(counting(10, 5));
  }
  EXPECT_EQ(TokenFile::open_indexed(prefix).tokens(), 1);
  write("m.model", "one model");
  const std::string model = "another model";
  EXPECT_NE(
      error_of([&] { TokenWriter(path("m"), TokenType::UInt16, false, &model); }).find("m.model exists"),
      std::string::npos);
  TokenWriter empty(path("empty"), TokenType::UInt16, false);
  EXPECT_NE(error_of([&] { empty.finish(CorpusInfo()); }).find("no text"), std::string::npos);
  TokenWriter narrow(path("narrow"), TokenType::UInt16, false);
  EXPECT_NE(error_of([&] { narrow.append(std::vector<std::int32_t>{65536}); }).find("65536"),
            std::string::npos);
  EXPECT_EQ(token_type_for(65499), TokenType::UInt16);
  EXPECT_EQ(token_type_for(65500), TokenType::Int32);
}

}  // namespace
}  // namespace hybridmoe
