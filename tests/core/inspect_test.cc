#include "core/data/inspect.h"

#include "tests/core/data_testing.h"

namespace hybridmoe {
namespace {

using testing::counting;
using testing::error_of;

class InspectTest : public testing::TemporaryFolder {};

TEST_F(InspectTest, CountsAndCompares) {
  std::vector<std::vector<std::int32_t>> documents;
  for (int length = 1; length <= 100; ++length) documents.push_back(counting(length, 50));
  const TokenFile file = TokenFile::open_indexed(write_corpus("c", documents));
  CorpusInfo info = *read_corpus_info(path("c"));
  const CorpusReport report = inspect_corpus(file, 257, &info);
  EXPECT_EQ(report.documents, 100);
  EXPECT_EQ(report.shortest, 1);
  EXPECT_EQ(report.q10, 10);
  EXPECT_EQ(report.median, 50);
  EXPECT_EQ(report.q90, 90);
  EXPECT_EQ(report.q99, 99);
  EXPECT_EQ(report.longest, 100);
  EXPECT_EQ(report.smallest_id, 0);
  EXPECT_EQ(report.largest_id, 49);
  EXPECT_EQ(report.distinct_ids, 50);
  EXPECT_EQ(report.text_bytes, 5050);
  ASSERT_EQ(report.remarks.size(), 1);  // write_corpus does not say how long the text was
  info.set_text_bytes(5050);
  EXPECT_TRUE(inspect_corpus(file, 257, &info).remarks.empty());
  info.set_tokens(7);
  EXPECT_NE(inspect_corpus(file, 257, &info).remarks.at(0).find("says 7 tokens"), std::string::npos);
  EXPECT_NE(error_of([&] { inspect_corpus(file, 49, nullptr); }).find("has id 49"), std::string::npos);
}

TEST_F(InspectTest, RawFilesAreCutAtEndsOfDocuments) {
  write("raw", std::string("\1\0\7\0\2\0\2\0\7\0\3\0", 12));
  const CorpusReport report =
      inspect_corpus(TokenFile::open_raw(path("raw"), TokenType::UInt16, 7), 8, nullptr);
  EXPECT_EQ(report.documents, 3);
  EXPECT_EQ(report.shortest, 1);
  EXPECT_EQ(report.longest, 3);
  EXPECT_EQ(report.text_bytes, -1);
}

}  // namespace
}  // namespace hybridmoe
