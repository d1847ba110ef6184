// SwiGLU, and the movement of rows: between token order and expert order, and to the ranks of their experts.
//
// n tokens choose k experts each. The slots that are kept (not dropped) are sorted by expert, stably by
// (token, choice): "expert order", S of them. See core/operators/common.h for types and conventions.
#pragma once

#include <algorithm>

#include "core/operators/common.h"

namespace hybridmoe {

// Sorts the chosen slots by expert.
struct SortSlots {
  Tensor topk;     // [n, k] I32, -1: no slot
  Tensor offsets;  // [E + 1] I64 =: slots of expert e are offsets[e] .. offsets[e + 1]
  Tensor
      slot_source;  // [n * k] I32 =: of slot s, its index t * k + j in topk; entries from S on are undefined
  Tensor token_slots;  // [n, k] I32 =: the slot of choice j of token t, or -1
};

// y[s] = x[slot_source[s] / k] for s < S.
struct GatherRows {
  Tensor x;            // [n, d] C
  Tensor slot_source;  // [S] I32
  std::int32_t k = 1;
  Tensor y;  // [S, d] C =
};
// y[t] = residual[t] + Σ_j weights[t, j] · rows[token_slots[t, j]], j ascending, accumulated in S.
struct CombineRows {
  Tensor rows;           // [S, d] C
  Tensor token_slots;    // [n, k] I32
  Tensor weights = {};   // [n, k] S, optional: absent means 1
  Tensor residual = {};  // [n, d] C, optional
  Tensor y;              // [n, d] C =; may be residual
};
// target[s] = source[slot_source[s]]: scalars from choice order [n * k] into expert order [S].
struct GatherScalars {
  Tensor source, slot_source, target;  // [n, k] S; [S] I32; [S] S =
};
// target[t, j] = source[token_slots[t, j]], 0 where the slot is -1.
struct ScatterScalars {
  Tensor source, token_slots, target;  // [S] S; [n, k] I32; [n, k] S =
};

// Where a layer's experts are, seen by one rank of their group: rank r holds local_experts of them from
// r / shards · local_experts on, or a shard of each.
struct ExchangePlace {
  std::int64_t ranks = 1, rank = 0;  // of the group; the own one
  std::int64_t shards = 1;           // ranks r with equal r / shards hold shards of the same experts
  std::int64_t local_experts = 1;
  std::int64_t top_k = 1;
  std::int64_t chunks = 1;  // of the rows that move; numbered from 1. Chunk 0: of the own rank to itself

  std::int64_t parts() const { return ranks / shards; }
  // m: ranks that one token's row can go to.
  std::int64_t most_ranks() const { return std::min(top_k, parts()) * shards; }
  std::int64_t most_sent(std::int64_t n) const { return n * std::min(most_ranks(), ranks - 1); }
  // Of token t of n, where its row moves.
  std::int64_t chunk_of(std::int64_t t, std::int64_t n) const { return 1 + t * chunks / n; }
  std::int64_t keys() const { return (1 + chunks) * ranks; }
};

// The dispatch of n tokens' rows: one to every rank that holds experts of the token's choice, sorted by
// (chunk, rank, token). Sorting the keys of the first operator (SortSlots, with keys() in the place of
// experts) gives that order; its slots are the rows.
struct DispatchKeys {
  ExchangePlace place;
  Tensor topk;  // [n, k] I32, numbered over all ranks; -1: no slot
  Tensor keys;  // [n, m] I32 =: chunk · ranks + rank for these ranks, ascending, then -1; chunk:
                // that of the token, on the own rank 0
  Tensor own;   // [n, k] I32 =: the local number of a choice that is an expert of the own rank, else -1
};
// What goes to each rank, for the exchange of counts.
struct CountDispatch {
  ExchangePlace place;
  Tensor topk;         // [n, k] I32
  Tensor offsets;      // [keys() + 1] I64, of the sorted keys
  Tensor slot_source;  // [n * m] I32, likewise
  Tensor counts;       // [ranks, 2 (1 + chunks)] I64 =: by rank, then chunk: rows, and their slots there
};
// What travels beside the rows, and where the rows are that come back for a token: in a buffer of the own
// rank's n, by token, then those that were sent, in the order in which they were.
struct PackChoices {
  ExchangePlace place;
  Tensor topk, weights;  // [n, k] I32; [n, k] S
  Tensor keys;           // [n, m] I32
  Tensor offsets;        // [keys() + 1] I64, of the sorted keys
  Tensor token_slots;    // [n, m] I32, likewise
  Tensor sent_topk;      // [up to n * m, k] I32 =: of each row sent, the local numbers of its experts in the
                         // order of the token's choices, then -1
  Tensor sent_weights;   // [up to n * m, k] S =: their weights, then 0
  Tensor token_rows;     // [n, m] I32 =: t where the own rank is, n + row for the others, then -1; may be
                         // token_slots
};
// target[t, j] = Σ of what the ranks that hold the expert of choice j, or shards of it, return for it, in
// ascending order of the ranks; 0 where the slot is -1.
struct CombineScalars {
  ExchangePlace place;
  Tensor topk;        // [n, k] I32
  Tensor token_rows;  // [n, m] I32
  Tensor scalars;  // [n + rows sent, k] S: by choice in the first n, in the order of sent_topk in the others
  Tensor target;   // [n, k] S =
};

// a = silu(gate) ⊙ up, gate_up = [gate | up].
struct SwigluForward {
  Tensor gate_up;  // [n, 2F] C
  Tensor a;        // [n, F] C =
};
// With a weight w per row, of the loss as a function of w · f, f = a W₂: `da` is the gradient before that
// weight (dy W₂ᵀ), and the outputs carry it. arXiv 2409.02060's experts; the row's scalar gradient is taken
// here, on the hidden dimension, so that f need not be kept.
struct SwigluBackward {
  Tensor gate_up;       // [n, 2F] C
  Tensor da;            // [n, F] C
  Tensor weight = {};   // [n] S, optional
  Tensor dgate_up;      // [n, 2F] C =, times w; may be gate_up
  Tensor a = {};        // [n, F] C =, w · a, for the weight gradient of W₂; may be da
  Tensor dweight = {};  // [n] S =, Σ da · a, with weight
};

class Experts {
 public:
  virtual ~Experts() = default;
  virtual void sort_slots(const SortSlots&, Stream*) = 0;
  virtual void gather_rows(const GatherRows&, Stream*) = 0;
  virtual void combine_rows(const CombineRows&, Stream*) = 0;
  virtual void gather_scalars(const GatherScalars&, Stream*) = 0;
  virtual void scatter_scalars(const ScatterScalars&, Stream*) = 0;
  virtual void dispatch_keys(const DispatchKeys&, Stream*) = 0;
  virtual void count_dispatch(const CountDispatch&, Stream*) = 0;
  virtual void pack_choices(const PackChoices&, Stream*) = 0;
  virtual void combine_scalars(const CombineScalars&, Stream*) = 0;
  virtual void swiglu_forward(const SwigluForward&, Stream*) = 0;
  virtual void swiglu_backward(const SwigluBackward&, Stream*) = 0;
};

}  // namespace hybridmoe
