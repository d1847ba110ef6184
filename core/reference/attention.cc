// Causal grouped-query attention, one query at a time: the scores of one query are the only temporary.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/reference/reference.h"

namespace hybridmoe::reference {
namespace {

// One query of one head, and the run of keys it sees.
struct Query {
  std::int64_t row;          // of q, o, do, dq
  std::int64_t column;       // first of the head in those rows
  std::int64_t kv_column;    // first of the head in rows of k and v
  std::int64_t statistic;    // in lse and delta
  std::int64_t first_key;    // row of k and v
  std::int64_t visible = 0;  // keys
};

template <class F>
void for_each_query(const AttentionForward& op, const F& f) {
  const std::int32_t* doc_start = op.doc_start.empty() ? nullptr : op.doc_start.ptr<std::int32_t>();
  for (std::int64_t b = 0; b < op.batch; ++b) {
    for (std::int64_t h = 0; h < op.heads; ++h) {
      for (std::int64_t i = 0; i < op.queries; ++i) {
        Query query;
        query.row = b * op.queries + i;
        query.column = h * op.head_dim;
        query.kv_column = h * op.kv_heads / op.heads * op.head_dim;
        query.statistic = (b * op.heads + h) * op.queries + i;
        const std::int64_t first = doc_start == nullptr ? 0 : doc_start[query.row];
        query.first_key = b * op.keys + first;
        query.visible = op.first_query + i + 1 - first;
        f(query);
      }
    }
  }
}

// Scaled q·k of the visible keys.
void scores_of(const AttentionForward& op, const Query& query, const double* q, const Rows& k,
               std::vector<double>& scores) {
  scores.resize(query.visible);
  for (std::int64_t j = 0; j < query.visible; ++j) {
    scores[j] = op.scale * dot(q, k[query.first_key + j] + query.kv_column, op.head_dim);
  }
}

void zero_rows(const Tensor& tensor) {
  const Rows rows(tensor);
  for (std::int64_t i = 0; i < tensor.rows(); ++i) std::fill(rows[i], rows[i] + tensor.shape[1], 0.0);
}

}  // namespace

void ReferenceBackend::attention_forward(const AttentionForward& op, Stream*) {
  const Rows q(op.q), k(op.k), v(op.v), o(op.o);
  double* lse = elements_of(op.lse);
  double* logit_max = elements_of(op.logit_max);
  std::vector<double> scores;
  for_each_query(op, [&](const Query& query) {
    scores_of(op, query, q[query.row] + query.column, k, scores);
    const double top = *std::max_element(scores.begin(), scores.end());
    double total = 0;
    for (const double score : scores) total += std::exp(score - top);
    double* out = o[query.row] + query.column;
    std::fill(out, out + op.head_dim, 0.0);
    for (std::int64_t j = 0; j < query.visible; ++j) {
      const double* value = v[query.first_key + j] + query.kv_column;
      add_scaled(std::exp(scores[j] - top) / total, value, out, op.head_dim);
    }
    if (lse != nullptr) lse[query.statistic] = top + std::log(total);
    if (logit_max != nullptr) *logit_max = std::max(*logit_max, top);
  });
}

void ReferenceBackend::attention_backward(const AttentionBackward& op, Stream*) {
  const AttentionForward& f = op.forward;
  const Rows q(f.q), k(f.k), v(f.v), o(f.o), d_o(op.do_), dq(op.dq), dk(op.dk), dv(op.dv);
  const double* lse = elements_of(f.lse);
  double* delta = elements_of(op.delta);
  zero_rows(op.dq);
  zero_rows(op.dk);
  zero_rows(op.dv);
  std::vector<double> scores;
  for_each_query(f, [&](const Query& query) {
    const double* q_head = q[query.row] + query.column;
    const double* do_head = d_o[query.row] + query.column;
    scores_of(f, query, q_head, k, scores);
    delta[query.statistic] = dot(do_head, o[query.row] + query.column, f.head_dim);
    for (std::int64_t j = 0; j < query.visible; ++j) {
      const std::int64_t key = query.first_key + j, column = query.kv_column;
      const double p = std::exp(scores[j] - lse[query.statistic]);
      add_scaled(p, do_head, dv[key] + column, f.head_dim);
      const double dp = dot(do_head, v[key] + column, f.head_dim);
      const double ds = f.scale * p * (dp - delta[query.statistic]);
      add_scaled(ds, k[key] + column, dq[query.row] + query.column, f.head_dim);
      add_scaled(ds, q_head, dk[key] + column, f.head_dim);
    }
  });
}

}  // namespace hybridmoe::reference
