// What moves tokens to their experts and back. The model sees only this: where an expert lives, whether rows
// cross a process boundary and how often, is the exchange's affair. Deduplication needs the top-k before any
// row moves, so `plan` comes first; the same route is used by the forward pass, by recomputation and by the
// backward pass, which exchange no counts and decide nothing again.
//
// Rows move in chunks, so that the exchange of one can run while the experts compute another. Chunk 0 holds
// what this rank's own tokens ask of its own experts and never moves; the others hold parts of what other
// ranks send. A pass starts every chunk's dispatch, finishes and computes one after the other, starts sending
// each one's results as soon as they are there, and finishes with all of them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/memory_plan.h"
#include "core/tensor.h"

namespace hybridmoe {

// How many slots an expert takes; docs/model.md, "Capacity". The micro-batch is global: over all ranks.
struct CapacityRule {
  double factor = 0;  // 0: dropless
  bool by_position = false;
};

// The slots of one chunk, sorted by expert (core/operators/experts.h), for the R rows that it brings.
struct RouteChunk {
  Tensor offsets;                          // [local experts + 1] I64, from 0 in every chunk
  Tensor slot_source;                      // [up to R · k] I32: row · k + choice
  Tensor token_slots;                      // [R, k] I32, slots counted within the chunk
  Tensor weights;                          // [R, k] S
  std::int64_t rows = 0;                   // R; of chunk 0: all tokens of this rank
  std::int64_t slot_begin = 0, slots = 0;  // where its slots lie among those of all chunks
  std::int64_t slot_end() const { return slot_begin + slots; }
};

// The routing of one layer and micro-batch. Tensors lie in the memory plan; n and k as in
// core/operators/experts.h.
struct Route {
  Tensor kept;     // [n, k] I32: topk with -1 where a slot was dropped; aliases topk when dropless
  Tensor weights;  // [n, k] S, of the caller
  std::vector<RouteChunk> chunks;
  std::int64_t tokens = 0;   // n
  std::int64_t slots = 0;    // of all chunks
  std::int64_t rows = 0;     // received from other ranks, over all chunks
  std::int64_t dropped = 0;  // slots of this rank's tokens that found no room
  struct Details {           // what an exchange keeps for itself
    virtual ~Details() = default;
  };
  std::shared_ptr<Details> details;
};

class RowExchange {
 public:
  virtual ~RowExchange() = default;

  // This rank holds experts first_expert .. first_expert + local_experts - 1 (or a shard of each).
  virtual int first_expert() const = 0;
  virtual int local_experts() const = 0;
  // The most slots and the most rows of other ranks that can come for n tokens on every rank, and how many
  // the memory plan counts on.
  virtual std::int64_t max_slots(std::int64_t n) const = 0;
  virtual std::int64_t max_rows(std::int64_t n) const = 0;
  virtual std::int64_t expected_slots(std::int64_t n) const { return max_slots(n); }
  virtual std::int64_t expected_rows(std::int64_t n) const { return max_rows(n); }

  // Plans the buffers of a route for up to n tokens.
  virtual void declare(MemoryPlan& memory, Route* route, std::int64_t n, const std::string& name) = 0;
  // Plans what all routes share, for n tokens of width d: the buffers of rows under way.
  virtual void declare_shared(MemoryPlan& memory, std::int64_t n, std::int64_t d) = 0;
  // [max_rows, d], a place for rows that need not be kept: `received` of a dispatch may be this.
  virtual Tensor inbox() const { return {}; }

  // Decides who goes where from topk [n, k] I32 and weights [n, k] S, which must outlive the route, and tells
  // the other ranks. Token t of rank r of the world is token r · n + t of the micro-batch. Waits for the
  // other ranks' answers. Throws Error when more comes to this rank than its memory may grow to.
  virtual void plan(const Tensor& topk, const Tensor& weights, Route* route, Stream* stream) = 0;

  // Starts sending the rows [n, d] of this rank's tokens; what others send in this chunk comes to its part of
  // `received` [max_rows, d]. `rows` may be reused once every chunk's dispatch is finished.
  virtual void start_dispatch(const Route& route, int chunk, const Tensor& rows, const Tensor& received,
                              Stream* stream) = 0;
  // Waits until the chunk's rows are here.
  virtual void finish_dispatch(const Route& route, int chunk) = 0;
  // slot_rows [S of the chunk, d] = `rows` or `received`, in expert order. After finish_dispatch; again for
  // rows that were received before.
  virtual void gather(const Route& route, int chunk, const Tensor& rows, const Tensor& received,
                      const Tensor& slot_rows, Stream* stream) = 0;
  // slot_weights [S of the chunk] S = the weights of its slots.
  virtual void gather_weights(const Route& route, int chunk, const Tensor& slot_weights, Stream* stream) = 0;

  // Starts returning, for each row of the chunk, Σ over its slots, ascending, of (weighted ? weight : 1) ·
  // slot_rows [S of the chunk, d], which must stay as they are until finish_combine. After the chunk's
  // finish_dispatch; `received` may be the buffer that declare_shared planned for returning rows.
  virtual void start_combine(const Route& route, int chunk, const Tensor& slot_rows, bool weighted,
                             Stream* stream) = 0;
  // y [n, d] = residual + the rows that came back for each token, in ascending order of the ranks. residual
  // is optional and may be y.
  virtual void finish_combine(const Route& route, const Tensor& residual, const Tensor& y,
                              Stream* stream) = 0;
  // The same for a scalar per slot: scalars [n, k] S = the slots' slot_scalars [S of the chunk] S, summed
  // over the shards of an expert, 0 where a slot was dropped.
  virtual void start_scalars(const Route& route, int chunk, const Tensor& slot_scalars, Stream* stream) = 0;
  virtual void finish_scalars(const Route& route, const Tensor& scalars, Stream* stream) = 0;

  // Seconds since construction in which this rank started messages of rows or waited for them: what an
  // exchange costs beside packing.
  virtual double seconds_moving() const { return 0; }
};

class Communicator;

// Applies a capacity over the micro-batch of all ranks of `world`, decided together before any row moves: the
// one blocking collective of that mode. backend and world outlive it.
class CapacityLimiter {
 public:
  CapacityLimiter(Backend& backend, Communicator& world, int experts, int top_k, const CapacityRule& rule)
      : backend_(backend), world_(world), experts_(experts), top_k_(top_k), rule_(rule) {}

  bool limits() const { return rule_.factor > 0; }
  // Slots an expert takes of `tokens` tokens over the world.
  std::int64_t room(std::int64_t tokens) const;
  void declare(MemoryPlan& memory, Route* route, std::int64_t n, const std::string& name);
  // Sets route->kept and route->dropped.
  void apply(const Tensor& topk, const Tensor& weights, Route* route);

 private:
  Backend& backend_;
  Communicator& world_;
  int experts_, top_k_;
  CapacityRule rule_;
  Tensor all_topk_, all_weights_, own_kept_;  // in host memory
};

// Every rank holds every expert: nothing moves, chunk 0 is the only one. backend and world must outlive the
// exchange.
std::unique_ptr<RowExchange> make_local_row_exchange(Backend& backend, Communicator& world, int experts,
                                                     int top_k, const CapacityRule& capacity);

}  // namespace hybridmoe
