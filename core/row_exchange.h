// What moves tokens to their experts and back. The model sees only this: where an expert lives, whether rows
// cross a process boundary and how often, is the exchange's affair. Deduplication needs the top-k before any
// row moves, so `plan` comes first; the same route is used by the forward pass, by recomputation and by the
// backward pass, which exchange no counts and decide nothing again.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/backend.h"
#include "core/memory_plan.h"
#include "core/tensor.h"

namespace hybridmoe {

// How many slots an expert takes; docs/model.md, "Capacity". The micro-batch is global: over all ranks.
struct CapacityRule {
  double factor = 0;  // 0: dropless
  bool by_position = false;
};

// The routing of one layer and micro-batch. Tensors lie in the memory plan; n, k and S as in
// core/operators/experts.h.
struct Route {
  Tensor kept;               // [n, k] I32: topk with -1 where a slot was dropped; aliases topk when dropless
  Tensor weights;            // [n, k] S, of the caller
  Tensor offsets;            // [local experts + 1] I64
  Tensor slot_source;        // [n * k] I32
  Tensor token_slots;        // [n, k] I32
  std::int64_t tokens = 0;   // n
  std::int64_t slots = 0;    // S on this rank
  std::int64_t dropped = 0;  // slots of this rank's tokens that found no room
};

class RowExchange {
 public:
  virtual ~RowExchange() = default;

  virtual int local_experts() const = 0;
  // The most slots this rank can receive for n local tokens.
  virtual std::int64_t max_slots(std::int64_t n) const = 0;
  // Plans the buffers of a route for up to n tokens.
  virtual void declare(MemoryPlan& memory, Route* route, std::int64_t n, const std::string& name) = 0;

  // Decides who goes where from topk [n, k] I32 and weights [n, k] S, which must outlive the route; sets
  // route->slots and route->dropped. Token t of rank r is token r · n + t of the micro-batch.
  virtual void plan(const Tensor& topk, const Tensor& weights, Route* route, Stream* stream) = 0;
  // slot_rows [S, d] = the rows [n, d] of this and other ranks' tokens, in expert order.
  virtual void dispatch(const Route& route, const Tensor& rows, const Tensor& slot_rows, Stream* stream) = 0;
  // slot_weights [S] S = the weights of the slots, in expert order.
  virtual void dispatch_weights(const Route& route, const Tensor& slot_weights, Stream* stream) = 0;
  // y [n, d] = residual + Σ over a token's slots, ascending, of (weighted ? weight : 1) · slot_rows.
  virtual void combine(const Route& route, const Tensor& slot_rows, bool weighted, const Tensor& residual,
                       const Tensor& y, Stream* stream) = 0;
  // scalars [n, k] S = the slots' slot_scalars [S] S, 0 where dropped.
  virtual void return_scalars(const Route& route, const Tensor& slot_scalars, const Tensor& scalars,
                              Stream* stream) = 0;
};

class Communicator;

// Every rank holds every expert: nothing moves. Capacity, though, is a rule over the micro-batch of all ranks
// of `world`, decided together (the one blocking collective of this mode). backend and world must outlive the
// exchange.
std::unique_ptr<RowExchange> make_local_row_exchange(Backend& backend, Communicator& world, int experts,
                                                     int top_k, const CapacityRule& capacity);

}  // namespace hybridmoe
