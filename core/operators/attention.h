// Causal grouped-query attention, tiled with online softmax: memory grows linearly with the sequence
// (arXiv 2205.14135). See core/operators/common.h for types and conventions.
#pragma once

#include "core/operators/common.h"

namespace hybridmoe {

// For each of `batch` sequences: query i has position first_query + i and sees keys doc_start[i] ..
// first_query + i. Query head h reads key/value head h · kv_heads / heads.
struct AttentionForward {
  Tensor q;     // [batch * queries, heads * head_dim] C, strided rows
  Tensor k, v;  // [batch * keys, kv_heads * head_dim] C, strided rows
  std::int32_t batch = 1;
  std::int32_t heads = 1, kv_heads = 1, head_dim = 1;
  std::int64_t queries = 1, keys = 1;  // per sequence; first_query + queries <= keys
  std::int64_t first_query = 0;
  Tensor doc_start = {};  // [batch * queries] I32, optional: first key that a query sees
  double scale = 1;       // of q·k, usually 1/sqrt(head_dim)
  Tensor o;               // [batch * queries, heads * head_dim] C =, strided rows
  Tensor lse = {};        // [batch, heads, queries] S =, needed by the backward pass
  Tensor logit_max = {};  // [1] F64, max=, optional: largest scaled q·k
};
struct AttentionBackward {
  AttentionForward forward;  // the forward call with first_query = 0, queries = keys; o and lse are read
  Tensor do_;                // [batch * queries, heads * head_dim] C, strided rows
  Tensor delta;              // [batch, heads, queries] S =, workspace: Σ do·o
  Tensor dq, dk, dv;         // like q, k, v, C =
};

class Attention {
 public:
  virtual ~Attention() = default;
  virtual void attention_forward(const AttentionForward&, Stream*) = 0;
  virtual void attention_backward(const AttentionBackward&, Stream*) = 0;
};

}  // namespace hybridmoe
