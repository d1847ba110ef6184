#include "core/data/byte_model.h"

#include <cmath>

#include "core/data/tokenizer.h"
#include "tests/core/data_testing.h"

namespace hybridmoe {
namespace {

using testing::counting;
using testing::error_of;

class ByteModelTest : public testing::TemporaryFolder {};

// By hand: of "abab", predicted after its first symbol, the counts are b 2, a 1; after a: b 2; after b: a 1;
// after ab: a 1; after ba: b 1.
TEST_F(ByteModelTest, ProbabilitiesByHand) {
  ByteModel model;
  const std::vector<std::int32_t> run = {'a', 'b', 'a', 'b'};
  model.count(run, 1);
  model.fit();
  const double uniform = 1.0 / 257;
  const double d0 = 1.0 / 3, d1 = 1.0 / 3, d2 = 1.0;  // one of each of the first two seen once, one twice
  const double p0 = (1 - d0 + d0 * 2 * uniform) / 3;  // a
  const double p1 = (1 - d1 + d1 * 1 * p0) / 1;       // a after b
  const double p2 = (1 - d2 + d2 * 1 * p1) / 1;       // a after ab
  const auto bits = model.bits(run, 2);
  EXPECT_NEAR(bits[0], -std::log2(p0), 1e-12);
  EXPECT_NEAR(bits[1], -std::log2(p1), 1e-12);
  EXPECT_NEAR(bits[2], -std::log2(p2), 1e-12);
  // With one symbol before it, order 2 knows no more than order 1; with none, no more than order 0.
  EXPECT_EQ(model.bits(run, 1)[2], model.bits(run, 1)[1]);
  EXPECT_EQ(model.bits(run, 0)[2], model.bits(run, 0)[0]);
  // A context never seen falls back.
  const std::vector<std::int32_t> unseen = {'x', 'y', 'a'};
  EXPECT_NEAR(model.bits(unseen, 2)[2], -std::log2(p0), 1e-12);
}

TEST_F(ByteModelTest, ProbabilitiesSumToOne) {
  ByteModel model;
  std::vector<std::int32_t> run;
  for (std::uint32_t i = 0, x = 7; i < 5000; ++i)
    run.push_back(((x = x * 1664525 + 1013904223) >> 28) * (i % 3 + 1));
  model.count(run, 2);
  model.fit();
  for (const auto& context : std::vector<std::vector<std::int32_t>>{{3, 8}, {0, 0}, {255, 1}, {14, 28}}) {
    std::array<double, ByteModel::kOrders> sum{};
    for (std::int32_t symbol = 0; symbol < ByteModel::kSymbols; ++symbol) {
      const std::vector<std::int32_t> asked = {context[0], context[1], symbol};
      const auto bits = model.bits(asked, 2);
      for (int order = 0; order < ByteModel::kOrders; ++order) sum[order] += std::exp2(-bits[order]);
    }
    for (const double total : sum) EXPECT_NEAR(total, 1, 1e-10);
  }
}

// Sixteen symbols, each followed by the next: order 0 needs 4 bits a byte, the others nothing.
TEST_F(ByteModelTest, BaselineOfACycle) {
  Config config;
  config.mutable_model()->set_sequence_length(32);
  config.mutable_data()->set_held_out(0.1);
  config.mutable_data()->add_source()->set_path(write_corpus("c", {counting(200000, 16)}));
  const auto dataset = Dataset::open(config);
  const auto tokenizer = make_byte_tokenizer();
  const Baseline baseline = fit_baseline(*dataset, *tokenizer, 0, 0);
  EXPECT_NEAR(baseline.bits_per_byte[0], 4, 1e-3);
  EXPECT_LT(baseline.bits_per_byte[1], 1e-3);
  EXPECT_LT(baseline.bits_per_byte[2], 1e-3);
  EXPECT_EQ(baseline.held_out_bytes, baseline.held_out_targets);
  EXPECT_GT(baseline.held_out_targets, dataset->held_out_samples() * 31);
  config.mutable_data()->set_held_out(0);
  EXPECT_NE(error_of([&] { fit_baseline(*Dataset::open(config), *tokenizer, 0, 0); }).find("data.held_out"),
            std::string::npos);
}

// Documents of two bytes and an end. The byte after the end is a fair coin: with data.document_mask it is
// neither predicted nor a context, so the rest is certain.
TEST_F(ByteModelTest, DocumentMaskIsObeyed) {
  std::vector<std::vector<std::int32_t>> documents;
  for (std::uint32_t i = 0, x = 3; i < 20000; ++i) {
    const std::int32_t letter = (x = x * 1664525 + 1013904223) >> 31 ? 'a' : 'b';
    documents.push_back({letter, letter + 2, 256});
  }
  Config config;
  config.mutable_model()->set_sequence_length(30);
  config.mutable_data()->set_held_out(0.1);
  config.mutable_data()->add_source()->set_path(write_corpus("c", documents));
  const auto tokenizer = make_byte_tokenizer();
  const Baseline open = fit_baseline(*Dataset::open(config), *tokenizer, 0, 0);
  EXPECT_NEAR(open.bits_per_byte[2], 0.5, 0.02);  // one bit for two bytes
  config.mutable_data()->set_document_mask(true);
  const Baseline masked = fit_baseline(*Dataset::open(config), *tokenizer, 0, 0);
  EXPECT_LT(masked.bits_per_byte[2], 0.02);
}

}  // namespace
}  // namespace hybridmoe
