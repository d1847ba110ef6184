// Rows to the ranks of their experts: keys, counts, what travels beside the rows, and the scalars that
// return.
#include "core/testing/families.h"

namespace hybridmoe::testing {
namespace {

// n tokens that choose different experts at a place; some choices are dropped (-1).
struct Dispatch {
  std::string name;
  ExchangePlace place;
  std::int64_t n;
  double dropped;  // share of the choices
  std::vector<double> topk = {};
  std::int64_t own_rows = 0, sent = 0;

  Dispatch(std::string dispatch_name, const ExchangePlace& at, std::int64_t tokens, double dropped_share = 0)
      : name(std::move(dispatch_name)), place(at), n(tokens), dropped(dropped_share) {
    const Random random(1, "dispatch/" + name);
    const std::int64_t experts = place.parts() * place.local_experts, k = place.top_k;
    for (std::int64_t t = 0; t < n; ++t) {
      // A step without a common divisor with most numbers of experts: choices differ, in no order.
      const auto first = static_cast<std::int64_t>(random.below(2 * t, experts));
      std::vector<bool> goes(place.parts());
      for (std::int64_t j = 0; j < k; ++j) {
        const std::int64_t expert = (first + 7 * j) % experts;
        const bool keep = random.uniform(1000000 + t * k + j) >= dropped;
        topk.push_back(keep ? static_cast<double>(expert) : -1.0);
        if (keep) goes[expert / place.local_experts] = true;
      }
      for (std::int64_t rank = 0; rank < place.ranks; ++rank) {
        (rank == place.rank ? own_rows : sent) += goes[rank / place.shards];
      }
    }
  }
  std::int64_t most_ranks() const { return place.most_ranks(); }
};

DispatchKeys keys_of(const Dispatch& d, const TensorSet& t) {
  return {.place = d.place, .topk = t["topk"], .keys = t["keys"], .own = t["own"]};
}

SortSlots sorted(const TensorSet& t) {
  return {.topk = t["keys"],
          .offsets = t["offsets"],
          .slot_source = t["slot_source"],
          .token_slots = t["token_slots"]};
}

PackChoices packed(const Dispatch& d, const TensorSet& t) {
  return {.place = d.place,
          .topk = t["topk"],
          .weights = t["weights"],
          .keys = t["keys"],
          .offsets = t["offsets"],
          .token_slots = t["token_slots"],
          .sent_topk = t["sent_topk"],
          .sent_weights = t["sent_weights"],
          .token_rows = t["token_rows"]};
}

OperatorCase dispatch_keys(const Dispatch& d) {
  OperatorCase c("dispatch_keys/" + d.name);
  c.input("topk", kI32, {d.n, d.place.top_k}, values(d.topk));
  c.output("keys", kI32, {d.n, d.most_ranks()});
  c.output("own", kI32, {d.n, d.place.top_k});
  c.run = [d](Backend& b, const TensorSet& t) { b.dispatch_keys(keys_of(d, t), b.main_stream()); };
  return c;
}

// The sorted keys as inputs of another operator.
void add_sorted_keys(const Dispatch& d, OperatorCase& c) {
  const std::int64_t m = d.most_ranks();
  c.input("topk", kI32, {d.n, d.place.top_k}, values(d.topk));
  c.scratch("own", kI32, {d.n, d.place.top_k});
  c.derived("keys", kI32, {d.n, m});
  c.derived("offsets", kI64, {d.place.keys() + 1});
  c.derived("slot_source", kI32, {d.n * m});
  c.derived("token_slots", kI32, {d.n, m});
  c.prepare = [d](Backend& b, const TensorSet& t) {
    b.dispatch_keys(keys_of(d, t), b.main_stream());
    b.sort_slots(sorted(t), b.main_stream());
  };
}

OperatorCase count_dispatch(const Dispatch& d) {
  OperatorCase c("count_dispatch/" + d.name);
  add_sorted_keys(d, c);
  c.output("counts", kI64, {d.place.ranks, 2 * (1 + d.place.chunks)});
  c.run = [d](Backend& b, const TensorSet& t) {
    b.count_dispatch({.place = d.place,
                      .topk = t["topk"],
                      .offsets = t["offsets"],
                      .slot_source = t["slot_source"],
                      .counts = t["counts"]},
                     b.main_stream());
  };
  return c;
}

OperatorCase pack_choices(const Dispatch& d, bool in_place) {
  OperatorCase c(cat("pack_choices/", d.name, in_place ? "_in_place" : ""));
  add_sorted_keys(d, c);
  const std::int64_t k = d.place.top_k, most = d.n * d.most_ranks();
  c.input("weights", kS, {d.n, k}, normal());
  c.output("sent_topk", kI32, {most, k}).define_first(d.sent * k);
  c.output("sent_weights", kS, {most, k}).define_first(d.sent * k);
  c.output("token_rows", kI32, {d.n, d.most_ranks()}).alias_of(in_place ? "token_slots" : "");
  c.run = [d](Backend& b, const TensorSet& t) { b.pack_choices(packed(d, t), b.main_stream()); };
  return c;
}

OperatorCase combine_scalars(const Dispatch& d) {
  OperatorCase c("combine_scalars/" + d.name);
  add_sorted_keys(d, c);
  const std::int64_t k = d.place.top_k, most = d.n * d.most_ranks();
  c.scratch("weights", kS, {d.n, k});
  c.scratch("sent_topk", kI32, {most, k});
  c.scratch("sent_weights", kS, {most, k});
  c.derived("token_rows", kI32, {d.n, d.most_ranks()});
  c.input("scalars", kS, {d.n + d.sent, k}, normal());
  c.output("target", kS, {d.n, k}).error(static_cast<double>(d.place.shards));
  const auto sort = c.prepare;
  c.prepare = [d, sort](Backend& b, const TensorSet& t) {
    sort(b, t);
    b.pack_choices(packed(d, t), b.main_stream());
  };
  c.run = [d](Backend& b, const TensorSet& t) {
    b.combine_scalars({.place = d.place,
                       .topk = t["topk"],
                       .token_rows = t["token_rows"],
                       .scalars = t["scalars"],
                       .target = t["target"]},
                      b.main_stream());
  };
  return c;
}

void add(const Dispatch& d, Cases& cases) {
  cases.push_back(dispatch_keys(d));
  cases.push_back(count_dispatch(d));
  cases.push_back(pack_choices(d, false));
  cases.push_back(combine_scalars(d));
}

}  // namespace

void add_dispatch(Cases& cases) {
  const ExchangePlace four{.ranks = 4, .rank = 1, .local_experts = 4, .top_k = 3, .chunks = 2};
  for (const Dispatch& d :
       {Dispatch("four_ranks", four, 23), Dispatch("dropped", four, 40, 0.4),
        Dispatch("all_dropped", four, 5, 1.1), Dispatch("one_token", four, 1), Dispatch("no_tokens", four, 0),
        Dispatch("one_chunk", {.ranks = 2, .rank = 0, .local_experts = 8, .top_k = 2, .chunks = 1}, 19),
        Dispatch("shards", {.ranks = 6, .rank = 4, .shards = 2, .local_experts = 3, .top_k = 4, .chunks = 5},
                 31, 0.1),
        Dispatch("only_shards",
                 {.ranks = 2, .rank = 1, .shards = 2, .local_experts = 5, .top_k = 2, .chunks = 2}, 7)}) {
    add(d, cases);
  }
  cases.push_back(pack_choices(Dispatch("four_ranks", four, 23), true));
  add(Dispatch("700x8_of_64", {.ranks = 8, .rank = 5, .local_experts = 8, .top_k = 8, .chunks = 2}, 700),
      cases);
}

void add_dispatch(const BenchmarkSize& z, Cases& cases) {
  const std::int64_t ranks = z.experts % 8 == 0 ? 8 : 2;
  add(Dispatch("route",
               {.ranks = ranks, .rank = 1, .local_experts = z.experts / ranks, .top_k = z.top_k, .chunks = 2},
               z.tokens()),
      cases);
}

}  // namespace hybridmoe::testing
