// Embedding, and LM head with cross-entropy in two phases; whole vocabularies and one rank's rows of them.
#include <algorithm>
#include <cmath>

#include "core/testing/families.h"

namespace hybridmoe::testing {
namespace {

struct EmbeddingShape {
  std::string name;
  std::int64_t n, d, rows;  // of this rank's part
  std::int64_t first_row = 0;
  std::int64_t vocabulary = 0;  // tokens are drawn below it; 0: rows
  std::int64_t tokens() const { return vocabulary > 0 ? vocabulary : rows; }
  double held() const { return static_cast<double>(n) / static_cast<double>(rows); }
};

EmbeddingForward forward_of(const EmbeddingShape& s, const TensorSet& t) {
  return {.tokens = t["tokens"], .weight = t["weight"], .first_row = s.first_row, .y = t["y"]};
}

OperatorCase embedding_forward(const EmbeddingShape& s) {
  OperatorCase c("embedding_forward/" + s.name);
  c.input("tokens", kI32, {s.n}, below(s.tokens()));
  c.input("weight", kC, {s.rows, s.d}, normal()).touch(std::min(1.0, s.held()));
  c.output("y", kC, {s.n, s.d});
  c.run = [s](Backend& b, const TensorSet& t) { b.embedding_forward(forward_of(s, t), b.main_stream()); };
  return c;
}

OperatorCase embedding_backward(const EmbeddingShape& s) {
  OperatorCase c("embedding_backward/" + s.name);
  c.input("tokens", kI32, {s.n}, below(s.tokens()));
  c.input("dy", kC, {s.n, s.d}, normal());
  c.input("weight", kC, {s.rows, s.d}, normal()).touch(0);
  c.accumulate("dweight", kS, {s.rows, s.d}).error(static_cast<double>(s.n)).touch(std::min(1.0, s.held()));
  c.scratch("y", kC, {s.n, s.d});
  c.prepare = [s](Backend& b, const TensorSet& t) { b.embedding_forward(forward_of(s, t), b.main_stream()); };
  c.run = [s](Backend& b, const TensorSet& t) {
    b.embedding_backward(
        {.tokens = t["tokens"], .dy = t["dy"], .first_row = s.first_row, .dweight = t["dweight"]},
        b.main_stream());
  };
  c.loss = [s](const TensorSet& t) { return projection(t, "dy", "y", s.n * s.d); };
  c.gradients = {{"weight", "dweight"}};
  c.flops = static_cast<double>(s.n * s.d);
  return c;
}

struct HeadShape {
  std::string name;
  std::int64_t n, d, rows;  // of this rank's part
  std::int64_t first_row = 0;
  std::int64_t valid_rows = 0;    // of the whole table
  std::int64_t masked_every = 4;  // every so many targets is masked; 0: none
  bool dh = true, dweight = true;
  double spread = 1;

  double product() const { return 2.0 * n * d * rows; }
};

// Targets anywhere in the vocabulary, some of them masked out.
Fill targets_of(const HeadShape& s) {
  return [s](const Random& random, std::int64_t i) {
    if (s.masked_every > 0 && i % s.masked_every == 1) return -1.0;
    return static_cast<double>(random.below(i, s.valid_rows));
  };
}

void add_head_inputs(const HeadShape& s, OperatorCase& c) {
  c.input("h", kC, {s.n, s.d}, normal(s.spread));
  c.input("weight", kC, {s.rows, s.d}, normal(1 / std::sqrt(s.d)));
  c.input("targets", kI32, {s.n}, targets_of(s));
}

HeadPartial partial_of(const HeadShape& s, const TensorSet& t) {
  return {.h = t["h"],
          .weight = t["weight"],
          .targets = t["targets"],
          .first_row = s.first_row,
          .valid_rows = s.valid_rows,
          .logits = t["logits"],
          .max = t["max"],
          .sumexp = t["sumexp"],
          .target_logit = t["target_logit"]};
}

OperatorCase head_partial(const HeadShape& s) {
  OperatorCase c("head_partial/" + s.name);
  const auto d = static_cast<double>(s.d);
  add_head_inputs(s, c);
  c.output("logits", kS, {s.n, s.rows}).error(d);
  c.output("max", kS, {s.n}).error(d);
  c.output("sumexp", kS, {s.n}).error(d + static_cast<double>(s.rows));
  c.output("target_logit", kS, {s.n}).error(d);
  c.run = [s](Backend& b, const TensorSet& t) { b.head_partial(partial_of(s, t), b.main_stream()); };
  c.flops = s.product();
  return c;
}

OperatorCase head_rescale() {
  OperatorCase c("head_rescale/13");
  c.input("max", kS, {13}, [](const Random& random, std::int64_t i) {
    return i == 4 ? -INFINITY : random.normal(i);  // a rank with padding rows only
  });
  c.input("global_max", kS, {13}, [](const Random& random, std::int64_t i) { return 3 + random.uniform(i); });
  c.accumulate("sumexp", kS, {13},
               [](const Random& random, std::int64_t i) { return i == 4 ? 0.0 : 1 + random.uniform(i); });
  c.run = [](Backend& b, const TensorSet& t) {
    b.head_rescale({.max = t["max"], .global_max = t["global_max"], .sumexp = t["sumexp"]}, b.main_stream());
  };
  return c;
}

OperatorCase head_finish(const HeadShape& s) {
  OperatorCase c("head_finish/" + s.name);
  const double scale = 0.25;
  const auto n = static_cast<double>(s.n), rows = static_cast<double>(s.rows);
  add_head_inputs(s, c);
  c.derived("logits", kS, {s.n, s.rows}).consume();
  for (const char* statistic : {"max", "sumexp", "target_logit"}) c.derived(statistic, kS, {s.n});
  c.output("token_loss", kS, {s.n}).error(1);
  c.accumulate("sums", kF64, {kHeadSums}).error(n);
  c.accumulate("logit_max", kF64, {1}, constant(-INFINITY));
  c.accumulate("lse_max", kF64, {1}, constant(-INFINITY));
  c.scratch("dlogits", kC, {s.n, s.rows});
  if (s.dh) c.output("dh", kC, {s.n, s.d}).error(rows, 1);
  if (s.dweight) c.accumulate("dweight", kS, {s.rows, s.d}).error(n + 1, 1);
  c.prepare = [s](Backend& b, const TensorSet& t) { b.head_partial(partial_of(s, t), b.main_stream()); };
  c.run = [=](Backend& b, const TensorSet& t) {
    b.head_finish({.h = t["h"],
                   .weight = t["weight"],
                   .targets = t["targets"],
                   .first_row = s.first_row,
                   .logits = t["logits"],
                   .max = t["max"],
                   .sumexp = t["sumexp"],
                   .target_logit = t["target_logit"],
                   .scale = scale,
                   .token_loss = t["token_loss"],
                   .sums = t["sums"],
                   .logit_max = t["logit_max"],
                   .lse_max = t["lse_max"],
                   .dlogits = t["dlogits"],
                   .dh = t["dh"],
                   .dweight = t["dweight"]},
                  b.main_stream());
  };
  c.loss = [=](const TensorSet& t) {
    double loss = 0;
    for (std::int64_t i = 0; i < s.n; ++i) {
      if (t.get("targets", i) < 0) continue;
      loss += scale * (t.get("max", i) + std::log(t.get("sumexp", i)) - t.get("target_logit", i));
    }
    return loss;
  };
  if (s.dh) c.gradients.push_back({"h", "dh"});
  if (s.dweight) c.gradients.push_back({"weight", "dweight"});
  c.flops = s.product() * (s.dh + s.dweight);
  return c;
}

}  // namespace

void add_loss(Cases& cases) {
  for (const EmbeddingShape& s :
       {EmbeddingShape{"9x7_of_11", 9, 7, 11}, EmbeddingShape{"one_token", 1, 32, 5},
        EmbeddingShape{"no_tokens", 0, 8, 5}, EmbeddingShape{"part_of_table", 31, 12, 8, 16, 30},
        EmbeddingShape{"few_rows", 200, 40, 3}}) {
    cases.push_back(embedding_forward(s));
    cases.push_back(embedding_backward(s));
  }

  const HeadShape odd{"7x13x29", 7, 13, 29, 0, 29};
  const HeadShape padded{"padded_rows", 9, 16, 40, 0, 33};
  const HeadShape part{"part_of_table", 10, 24, 32, 32, 60};
  const HeadShape one{"one_row", 1, 64, 17, 0, 17, 0};
  const HeadShape none{"no_rows", 0, 8, 12, 0, 12};
  const HeadShape sharp{"sharp", 6, 48, 100, 0, 100, 4, true, true, 20};
  // More columns than the threads of a block read at once.
  const HeadShape wide{"many_columns", 3, 8, 9000, 0, 8995, 3};
  for (const HeadShape& s : {odd, padded, part, one, none, sharp, wide}) {
    cases.push_back(head_partial(s));
    cases.push_back(head_finish(s));
  }
  cases.push_back(head_partial({"only_padding", 5, 8, 16, 64, 60}));
  cases.push_back(head_finish({"all_masked", 6, 8, 16, 0, 16, 0}));
  cases.back().operands[2].fill = constant(-1);
  cases.push_back(head_finish({"evaluation", 8, 16, 24, 0, 20, 3, false, false}));
  cases.push_back(head_finish({"dh_only", 8, 16, 24, 0, 24, 3, true, false}));
  cases.push_back(head_rescale());
}

void add_loss(const BenchmarkSize& z, Cases& cases) {
  cases.push_back(embedding_forward({"tokens", z.tokens(), z.d, z.vocabulary}));
  cases.push_back(embedding_backward({"tokens", z.tokens(), z.d, z.vocabulary}));
  const HeadShape s{"chunk", z.loss_chunk, z.d, z.vocabulary, 0, z.vocabulary, 0};
  cases.push_back(head_partial(s));
  cases.push_back(head_finish(s));
}

}  // namespace hybridmoe::testing
