// Causal attention: grouped heads, generation, documents, strided rows, sequences longer than a tile.
#include <cmath>

#include "core/testing/families.h"

namespace hybridmoe::testing {
namespace {

struct AttentionShape {
  std::string name;
  std::int32_t batch, heads, kv_heads, head_dim;
  std::int64_t queries, keys;
  std::int64_t first_query = 0;
  std::int64_t document = 0;  // length of each document; 0: one document, no bounds given
  std::int64_t gap = 0;
  double spread = 1;  // of q: large values make the softmax sharp

  std::int64_t width() const { return std::int64_t{heads} * head_dim; }
  std::int64_t kv_width() const { return std::int64_t{kv_heads} * head_dim; }
  // Pairs of a query and a key that it sees, over all sequences and heads.
  double pairs() const {
    double pairs = 0;
    for (std::int64_t i = 0; i < queries; ++i) {
      const std::int64_t position = first_query + i;
      pairs += static_cast<double>(position + 1 - (document > 0 ? position / document * document : 0));
    }
    return pairs * batch * heads;
  }
};

void add_attention_inputs(const AttentionShape& s, OperatorCase& c) {
  c.input("q", kC, {s.batch * s.queries, s.width()}, normal(s.spread)).gap(s.gap);
  c.input("k", kC, {s.batch * s.keys, s.kv_width()}, normal()).gap(s.gap);
  c.input("v", kC, {s.batch * s.keys, s.kv_width()}, normal()).gap(s.gap);
  if (s.document == 0) return;
  c.input("doc_start", kI32, {s.batch * s.queries}, [s](const Random&, std::int64_t i) {
    const std::int64_t position = s.first_query + i % s.queries;
    return static_cast<double>(position / s.document * s.document);
  });
}

AttentionForward forward_of(const AttentionShape& s, const TensorSet& t) {
  return {.q = t["q"],
          .k = t["k"],
          .v = t["v"],
          .batch = s.batch,
          .heads = s.heads,
          .kv_heads = s.kv_heads,
          .head_dim = s.head_dim,
          .queries = s.queries,
          .keys = s.keys,
          .first_query = s.first_query,
          .doc_start = t["doc_start"],
          .scale = 1 / std::sqrt(s.head_dim),
          .o = t["o"],
          .lse = t["lse"],
          .logit_max = t["logit_max"]};
}

// Probabilities may be rounded to the compute type before they meet v.
OperatorCase attention_forward(const AttentionShape& s) {
  OperatorCase c("attention_forward/" + s.name);
  const auto terms = static_cast<double>(s.keys + s.head_dim);
  add_attention_inputs(s, c);
  c.output("o", kC, {s.batch * s.queries, s.width()}).gap(s.gap).error(terms, 1);
  c.output("lse", kS, {s.batch, s.heads, s.queries}).error(terms);
  c.accumulate("logit_max", kF64, {1}, constant(-INFINITY)).error(s.head_dim);
  c.run = [s](Backend& b, const TensorSet& t) { b.attention_forward(forward_of(s, t), b.main_stream()); };
  c.flops = 4 * s.pairs() * s.head_dim;
  return c;
}

// Without lse and logit_max, as generation calls it.
OperatorCase attention_inference(const AttentionShape& s) {
  OperatorCase c = attention_forward(s);
  c.operands.resize(c.operands.size() - 2);
  return c;
}

OperatorCase attention_backward(const AttentionShape& s) {
  OperatorCase c("attention_backward/" + s.name);
  const auto terms = static_cast<double>(s.keys * s.heads / s.kv_heads + s.head_dim);
  add_attention_inputs(s, c);
  c.input("do", kC, {s.batch * s.queries, s.width()}, normal()).gap(s.gap);
  c.derived("o", kC, {s.batch * s.queries, s.width()}).gap(s.gap);
  c.derived("lse", kS, {s.batch, s.heads, s.queries});
  c.scratch("delta", kS, {s.batch, s.heads, s.queries});
  // A query that sees one key has no gradient: two terms of the size of do·v cancel.
  c.output("dq", kC, {s.batch * s.queries, s.width()}).gap(s.gap).error(terms, 2).terms_of(1);
  c.output("dk", kC, {s.batch * s.keys, s.kv_width()}).gap(s.gap).error(terms, 2).terms_of(1);
  c.output("dv", kC, {s.batch * s.keys, s.kv_width()}).gap(s.gap).error(terms, 2);
  c.prepare = [s](Backend& b, const TensorSet& t) { b.attention_forward(forward_of(s, t), b.main_stream()); };
  c.run = [s](Backend& b, const TensorSet& t) {
    b.attention_backward({.forward = forward_of(s, t),
                          .do_ = t["do"],
                          .delta = t["delta"],
                          .dq = t["dq"],
                          .dk = t["dk"],
                          .dv = t["dv"]},
                         b.main_stream());
  };
  c.loss = [s](const TensorSet& t) { return projection(t, "do", "o", s.batch * s.queries * s.width()); };
  c.gradients = {{"q", "dq"}, {"k", "dk"}, {"v", "dv"}};
  c.flops = 8 * s.pairs() * s.head_dim;
  return c;
}

}  // namespace

void add_attention(Cases& cases) {
  const std::vector<AttentionShape> training{
      {.name = "2x3x5", .batch = 2, .heads = 3, .kv_heads = 3, .head_dim = 4, .queries = 5, .keys = 5},
      {.name = "one_token", .batch = 1, .heads = 2, .kv_heads = 2, .head_dim = 16, .queries = 1, .keys = 1},
      {.name = "no_sequences", .batch = 0, .heads = 2, .kv_heads = 1, .head_dim = 8, .queries = 4, .keys = 4},
      {.name = "grouped_heads_strided",
       .batch = 2,
       .heads = 6,
       .kv_heads = 2,
       .head_dim = 8,
       .queries = 11,
       .keys = 11,
       .gap = 24},
      {.name = "documents",
       .batch = 2,
       .heads = 2,
       .kv_heads = 1,
       .head_dim = 12,
       .queries = 29,
       .keys = 29,
       .document = 7},
      {.name = "across_tiles",
       .batch = 1,
       .heads = 2,
       .kv_heads = 2,
       .head_dim = 32,
       .queries = 151,
       .keys = 151,
       .gap = 64},
      {.name = "documents_across_tiles",
       .batch = 1,
       .heads = 2,
       .kv_heads = 1,
       .head_dim = 16,
       .queries = 200,
       .keys = 200,
       .document = 70},
      {.name = "grouped_documents_64_wide",
       .batch = 2,
       .heads = 4,
       .kv_heads = 2,
       .head_dim = 64,
       .queries = 150,
       .keys = 150,
       .document = 41,
       .gap = 8},
      {.name = "128_wide",
       .batch = 1,
       .heads = 2,
       .kv_heads = 1,
       .head_dim = 128,
       .queries = 70,
       .keys = 70,
       .gap = 128},
      {.name = "documents_128_wide",
       .batch = 2,
       .heads = 2,
       .kv_heads = 1,
       .head_dim = 128,
       .queries = 300,
       .keys = 300,
       .document = 90},
      {.name = "sharp",
       .batch = 1,
       .heads = 1,
       .kv_heads = 1,
       .head_dim = 64,
       .queries = 40,
       .keys = 40,
       .spread = 8},
  };
  for (const AttentionShape& s : training) {
    cases.push_back(attention_forward(s));
    cases.push_back(attention_backward(s));
  }
  AttentionShape s{
      .name = "generating", .batch = 2, .heads = 4, .kv_heads = 2, .head_dim = 16, .queries = 1, .keys = 130};
  s.first_query = 100;
  cases.push_back(attention_inference(s));
  s.name = "appending", s.queries = 9, s.first_query = 64;
  cases.push_back(attention_forward(s));
  s.name = "appending_documents_strided", s.document = 17, s.gap = 8;
  cases.push_back(attention_forward(s));
  s.name = "appending_64_wide", s.head_dim = 64, s.queries = 140, s.keys = 300, s.first_query = 151;
  s.document = 100;
  cases.push_back(attention_forward(s));
}

void add_attention(const BenchmarkSize& z, Cases& cases) {
  const AttentionShape s{.name = "causal",
                         .batch = static_cast<std::int32_t>(z.sequences),
                         .heads = z.heads,
                         .kv_heads = z.kv_heads,
                         .head_dim = z.head_dim,
                         .queries = z.sequence_length,
                         .keys = z.sequence_length};
  cases.push_back(attention_forward(s));
  cases.push_back(attention_backward(s));
}

}  // namespace hybridmoe::testing
