// Causal grouped-query attention.
#include "core/cuda/attention_rows.h"
#include "core/cuda/attention_tiles_backward.h"
#include "core/cuda/cuda_backend.h"
#include "core/cuda/partials.h"

namespace hybridmoe::cuda {
namespace {

// Calls body(Constant<D>()) for the head sizes that there are tiles for; false: not this one, or not these
// tensors.
template <class Body>
bool with_tiles(const AttentionForward& op, std::initializer_list<const Tensor*> others, const Body& body) {
  if (op.q.dtype != DType::BF16 || !in_vectors(op.head_dim, {&op.q, &op.k, &op.v, &op.o})) return false;
  for (const Tensor* other : others)
    if (!in_vectors(op.head_dim, {other})) return false;
  switch (op.head_dim) {
    case 32:
      return body(Constant<32>()), true;
    case 64:
      return body(Constant<64>()), true;
    case 128:
      return body(Constant<128>()), true;
    default:
      return false;
  }
}

// logit_max with the largest of maxima [rows, columns], whose first row it overwrites on the way: first over
// the rows, which many blocks share, then over the columns, which one block has.
void join_maxima(float* maxima, std::int64_t rows, std::int64_t columns, const Tensor& logit_max,
                 Stream* stream) {
  if (maxima == nullptr) return;
  join_partials<Larger>(maxima + columns, rows - 1, columns, maxima, stream);
  join_partials<Larger>(maxima, columns, 1, elements<double>(logit_max), stream);
}

}  // namespace

void CudaBackend::attention_forward(const AttentionForward& op, Stream* stream) {
  const AttentionShape shape(op);
  const std::int64_t rows = shape.batch * shape.heads, units = rows * shape.queries;
  if (units == 0) return;
  // Of every query, or of every block of them.
  float* maxima = op.logit_max.empty() ? nullptr : workspace<float>(units, stream);
  if (device_->attention_forward(op, maxima, stream))
    return join_maxima(maxima, rows, shape.queries, op.logit_max, stream);
  std::int64_t columns = shape.queries;
  const bool in_tiles = with_tiles(op, {}, [&]<int D>(Constant<D>) {
    using Kernel = AttentionTilesForward<D>;
    columns = divide_up(shape.queries, Kernel::kQueries);
    launch(Kernel{shape, Rows<const BFloat16>(op.q), Rows<const BFloat16>(op.k), Rows<const BFloat16>(op.v),
                  Rows<BFloat16>(op.o), elements<float>(op.lse), maxima},
           {.x = columns, .y = rows, .threads = Kernel::kThreads, .shared_bytes = Kernel::kSharedBytes},
           stream);
  });
  if (!in_tiles)
    with_type(compute_type_, [&]<class C>(C) {
      using Kernel = AttentionRowsForward<C>;
      launch(Kernel{shape, Rows<const C>(op.q), Rows<const C>(op.k), Rows<const C>(op.v), Rows<C>(op.o),
                    elements<float>(op.lse), maxima},
             {.x = divide_up(units, kAttentionWarps),
              .threads = Kernel::kThreads,
              .shared_bytes = WarpVectors::bytes(2, shape.head_dim)},
             stream);
    });
  join_maxima(maxima, rows, columns, op.logit_max, stream);
}

void CudaBackend::attention_backward(const AttentionBackward& op, Stream* stream) {
  const AttentionForward& f = op.forward;
  const AttentionShape shape(f);
  const std::int64_t units = shape.batch * shape.heads * shape.queries;
  if (units == 0 || device_->attention_backward(op, stream)) return;
  auto *lse = elements<const float>(f.lse), *delta = elements<const float>(op.delta);
  const bool vectors = in_vectors(f.head_dim, {&f.o, &op.do_});
  with_vectors(compute_type_, vectors, [&]<class C, int W>(C, Constant<W>) {
    using Delta = AttentionDelta<C, W>;
    const int lanes = Delta::lanes_for(shape.head_dim);
    launch(Delta{shape, Rows<const C>(f.o), Rows<const C>(op.do_), elements<float>(op.delta), lanes},
           {.x = divide_up(units, Delta::kThreads / lanes), .threads = Delta::kThreads}, stream);
  });
  const bool in_tiles = with_tiles(f, {&op.do_, &op.dq, &op.dk, &op.dv}, [&]<int D>(Constant<D>) {
    const Rows<const BFloat16> q(f.q), k(f.k), v(f.v), d_o(op.do_);
    using Query = AttentionTilesBackwardQuery<D>;
    launch(Query{shape, q, k, v, d_o, lse, delta, Rows<BFloat16>(op.dq)},
           {.x = divide_up(shape.queries, Query::kQueries),
            .y = shape.batch * shape.heads,
            .threads = Query::kThreads,
            .shared_bytes = Query::kSharedBytes},
           stream);
    using Key = AttentionTilesBackwardKey<D>;
    launch(Key{shape, q, k, v, d_o, lse, delta, Rows<BFloat16>(op.dk), Rows<BFloat16>(op.dv)},
           {.x = divide_up(shape.keys, Key::kKeys),
            .y = shape.batch * shape.kv_heads,
            .threads = Key::kThreads,
            .shared_bytes = Key::kSharedBytes},
           stream);
  });
  if (in_tiles) return;
  with_type(compute_type_, [&]<class C>(C) {
    const Rows<const C> q(f.q), k(f.k), v(f.v), d_o(op.do_);
    using Query = AttentionRowsBackwardQuery<C>;
    launch(Query{shape, q, k, v, d_o, lse, delta, Rows<C>(op.dq)},
           {.x = divide_up(units, kAttentionWarps),
            .threads = Query::kThreads,
            .shared_bytes = WarpVectors::bytes(3, shape.head_dim)},
           stream);
    using Key = AttentionRowsBackwardKey<C>;
    launch(Key{shape, q, k, v, d_o, lse, delta, Rows<C>(op.dk), Rows<C>(op.dv)},
           {.x = divide_up(shape.batch * shape.kv_heads * shape.keys, kAttentionWarps),
            .threads = Key::kThreads,
            .shared_bytes = WarpVectors::bytes(4, shape.head_dim)},
           stream);
  });
}

}  // namespace hybridmoe::cuda
