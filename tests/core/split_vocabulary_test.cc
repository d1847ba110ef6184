// A vocabulary split over ranks gives the loss and the gradients of the whole one: the two phases of the LM
// head with the sums between them done by hand.
#include <algorithm>
#include <cmath>
#include <gtest/gtest.h>
#include <memory>
#include <vector>

#include "core/backend.h"
#include "core/random.h"
#include "tests/core/views.h"

namespace hybridmoe {
namespace {

constexpr std::int64_t kTokens = 5, kWidth = 6, kVocabulary = 20, kValid = 13;

// What one rank with rows [first, last) of the vocabulary keeps.
struct Rank {
  std::int64_t first, rows;
  Vector logits, max = Vector(kTokens), sumexp = Vector(kTokens), target_logit = Vector(kTokens);
  Vector dh = Vector(kTokens * kWidth), dweight, sums = Vector(kHeadSums, 0.0);

  Rank(std::int64_t begin, std::int64_t end)
      : first(begin), rows(end - begin), logits(kTokens * rows), dweight(rows * kWidth, 0.0) {}
};

class SplitVocabulary : public ::testing::Test {
 protected:
  SplitVocabulary() {
    const Random random(1, "split vocabulary");
    for (std::int64_t i = 0; i < kTokens * kWidth; ++i) h_.push_back(random.normal(i));
    for (std::int64_t i = 0; i < kVocabulary * kWidth; ++i) weight_.push_back(random.normal(1000 + i));
  }

  void run(std::vector<Rank>& ranks) {
    const Tensor h = view(h_, {kTokens, kWidth}), weight = view(weight_, {kVocabulary, kWidth});
    const Tensor targets(targets_.data(), DType::I32, {kTokens});
    Vector max(kTokens, -INFINITY), sumexp(kTokens, 0.0), target_logit(kTokens, 0.0);
    const Shape tokens{kTokens};
    for (Rank& r : ranks) {
      backend_->head_partial({.h = h,
                              .weight = weight.rows(r.first, r.first + r.rows),
                              .targets = targets,
                              .first_row = r.first,
                              .valid_rows = kValid,
                              .logits = view(r.logits, {kTokens, r.rows}),
                              .max = view(r.max, tokens),
                              .sumexp = view(r.sumexp, tokens),
                              .target_logit = view(r.target_logit, tokens)},
                             nullptr);
      for (int t = 0; t < kTokens; ++t) max[t] = std::max(max[t], r.max[t]);
    }
    for (Rank& r : ranks) {
      backend_->head_rescale({view(r.max, tokens), view(max, tokens), view(r.sumexp, tokens)}, nullptr);
      for (int t = 0; t < kTokens; ++t) {
        sumexp[t] += r.sumexp[t];
        target_logit[t] += r.target_logit[t];
      }
    }
    for (Rank& r : ranks) {
      backend_->head_finish({.h = h,
                             .weight = weight.rows(r.first, r.first + r.rows),
                             .targets = targets,
                             .first_row = r.first,
                             .logits = view(r.logits, {kTokens, r.rows}),
                             .max = view(max, tokens),
                             .sumexp = view(sumexp, tokens),
                             .target_logit = view(target_logit, tokens),
                             .scale = 0.25,
                             .sums = view(r.sums, {kHeadSums}),
                             .dh = view(r.dh, {kTokens, kWidth}),
                             .dweight = view(r.dweight, {r.rows, kWidth})},
                            nullptr);
    }
  }

  std::unique_ptr<Backend> backend_ = make_reference_backend();
  Vector h_, weight_;
  std::vector<std::int32_t> targets_{3, -1, 12, 0, 7};
};

TEST_F(SplitVocabulary, EqualsTheWhole) {
  std::vector<Rank> whole{{0, kVocabulary}};
  std::vector<Rank> parts{{0, 7}, {7, 14}, {14, kVocabulary}};  // the last one holds padding rows only
  run(whole);
  run(parts);
  const double tolerance = 1e-13;  // sums of 20 terms of order 1 in another order
  for (const Rank& part : parts) {
    for (int i = 0; i < kHeadSums; ++i) EXPECT_NEAR(part.sums[i], whole[0].sums[i], tolerance);
    for (std::size_t i = 0; i < part.dweight.size(); ++i) {
      EXPECT_NEAR(part.dweight[i], whole[0].dweight[part.first * kWidth + i], tolerance);
    }
  }
  for (std::int64_t i = 0; i < kTokens * kWidth; ++i) {
    EXPECT_NEAR(parts[0].dh[i] + parts[1].dh[i] + parts[2].dh[i], whole[0].dh[i], tolerance);
  }
  EXPECT_EQ(whole[0].sums[kHeadTargets], 4);
}

}  // namespace
}  // namespace hybridmoe
