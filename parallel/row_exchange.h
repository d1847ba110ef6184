// The all-to-all router: rows of tokens to the ranks of their experts and back, over the expert group.
//
// A token that goes to several experts of one rank travels there once, with its experts and weights beside
// it; the rank sends back one row per token, the weighted sum over its experts there, accumulated in S and
// rounded to C; the source adds those in ascending order of the ranks. With experts split over ET ranks a row
// goes to all of them, and what they send back are partial sums. (The method of arXiv 2412.19437,
// section 3.2, and of GShard's dispatch and combine, arXiv 2006.16668, without padding.)
//
// Rows are C on the wire, weights and their gradients S. Messages go from rank to rank directly, or over
// hosts' relays (parallel/row_transport.h); a rank's own rows are never copied into a message.
#pragma once

#include <memory>

#include "core/groups.h"
#include "core/row_exchange.h"

namespace hybridmoe {

struct ExchangeOptions {
  int chunks = 2;       // into which the rows of other ranks are cut, by their token's number
  bool overlap = true;  // false: every call waits for its messages at once, which changes no bit
  // Between hosts through relays, one message for each ordered pair of hosts and chunk; changes no bit.
  // Without groups.relays there are no other hosts.
  bool hierarchical = false;
  // Memory for slots and rows, as multiples of what a balanced router would send here: counted in the plan,
  // and accepted at most (0: whatever can come).
  double expected_load = 1.5;
  double load_limit = 0;
};

// Experts of a model over groups.expert: rank r of it holds part r / ET of `experts`, shard r % ET of each
// (ET = groups.expert_tensor, which divides the group's size; the number of parts divides `experts`). With
// one rank and one shard: the local exchange. Everything passed outlives the exchange.
std::unique_ptr<RowExchange> make_row_exchange(Backend& backend, const Groups& groups, int experts, int top_k,
                                               const CapacityRule& capacity, const ExchangeOptions& options);

}  // namespace hybridmoe
