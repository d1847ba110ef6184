// Norms of the heads and RoPE. A group of lanes has one head of one token; a lane has pairs of vectors, one
// of the head's first half and the one that RoPE turns with it.
#include <algorithm>

#include "core/cuda/partials.h"

namespace hybridmoe::cuda {
namespace {

// What all kernels of this file know of the forward call.
template <class C, int W>
struct Heads {
  Rows<const C> x;
  const C* gain;  // null: no norm
  bool full_width;
  const float *cosine, *sine;  // null: no RoPE
  std::int64_t first_position, period;
  std::int64_t n;
  int heads, head_dim;
  int lanes;  // of a head; a power of two

  explicit Heads(const HeadNormRopeForward& op, std::int64_t rows)
      : x(op.x),
        gain(op.norm == HeadNormKind::None ? nullptr : elements<const C>(op.gain)),
        full_width(op.norm == HeadNormKind::FullWidth),
        cosine(elements<const float>(op.rope_cos)),
        sine(elements<const float>(op.rope_sin)),
        first_position(op.first_position),
        period(op.period),
        n(rows),
        heads(op.heads),
        head_dim(op.head_dim),
        lanes(1) {
    while (lanes < kWarp && lanes * W < half_of(head_dim)) lanes *= 2;
  }
  static int half_of(int width) { return (width + 1) / 2; }

  // Of a width that is odd, which RoPE never sees, the first half is the longer one.
  HYBRIDMOE_DEVICE int half() const { return (head_dim + 1) / 2; }
  HYBRIDMOE_DEVICE bool in_second(int i) const { return half() + i < head_dim; }
  HYBRIDMOE_DEVICE const C* gain_of(int head) const { return gain + (full_width ? head * head_dim : 0); }
  HYBRIDMOE_DEVICE std::int64_t angle(std::int64_t t) const {
    return (first_position + t % period) * (head_dim / 2);
  }

  // Elements i .. i + W of both halves of a head.
  HYBRIDMOE_DEVICE void read(const C* head, int i, float (&a)[W], float (&b)[W]) const {
    const Vector<C, W> first = load<C, W>(head + i);
    Vector<C, W> second = {};
    if (in_second(i)) second = load<C, W>(head + half() + i);
    HYBRIDMOE_UNROLL
    for (int j = 0; j < W; ++j) a[j] = to_float(first.value[j]), b[j] = to_float(second.value[j]);
  }
  HYBRIDMOE_DEVICE void write(C* head, int i, const float (&a)[W], const float (&b)[W]) const {
    Vector<C, W> first, second;
    HYBRIDMOE_UNROLL
    for (int j = 0; j < W; ++j) first.value[j] = rounded<C>(a[j]), second.value[j] = rounded<C>(b[j]);
    store<C, W>(head + i, first);
    if (in_second(i)) store<C, W>(head + half() + i, second);
  }
  // direction 1: RoPE; -1: back.
  HYBRIDMOE_DEVICE void turn(std::int64_t t, int i, float direction, float (&a)[W], float (&b)[W]) const {
    if (cosine == nullptr) return;
    HYBRIDMOE_UNROLL
    for (int j = 0; j < W; ++j) {
      const float c = cosine[angle(t) + i + j], s = direction * sine[angle(t) + i + j];
      const float turned = a[j] * c - b[j] * s;
      b[j] = b[j] * c + a[j] * s;
      a[j] = turned;
    }
  }
  // The upstream gradient times the gain, before RoPE; g are what it was before that product.
  HYBRIDMOE_DEVICE void read_gradient(const C* dy_head, std::int64_t t, int head, int i, float (&u)[W],
                                      float (&v)[W], float (&gu)[W], float (&gv)[W]) const {
    read(dy_head, i, gu, gv);
    turn(t, i, -1, gu, gv);
    float a[W], b[W];
    read(gain_of(head), i, a, b);
    HYBRIDMOE_UNROLL
    for (int j = 0; j < W; ++j) u[j] = gu[j] * a[j], v[j] = gv[j] * b[j];
  }
};

// A block of threads has block_threads / lanes groups, each at one (token, head).
template <class C, int W>
struct HeadForwardKernel {
  static constexpr int kThreads = 256;
  Heads<C, W> heads;
  const float* sumsq;  // FullWidth
  float width, eps;    // elements that a sum of squares counts
  Rows<C> y;
  float* rstd;

  HYBRIDMOE_DEVICE void operator()() const {
    const int lanes = heads.lanes, groups = block_threads() / lanes, lane = thread_index() % lanes;
    const std::int64_t unit = block_x() * groups + thread_index() / lanes;
    const std::int64_t t = unit / heads.heads;
    const int head = static_cast<int>(unit % heads.heads);
    const bool active = t < heads.n;  // all lanes take part in the sum
    const C* x = active ? heads.x[t] + head * heads.head_dim : nullptr;
    float a[W], b[W];
    float r = 1;
    if (heads.gain != nullptr) {
      float squares = 0;
      for (int i = lane * W; active && !heads.full_width && i < heads.half(); i += lanes * W) {
        heads.read(x, i, a, b);
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) squares += a[j] * a[j] + b[j] * b[j];
      }
      if (!heads.full_width) squares = over_lanes<Plus>(squares, lanes);
      if (active && heads.full_width) squares = sumsq[t];
      r = reciprocal_root(squares / width + eps);
      if (active && lane == 0) {
        if (!heads.full_width) rstd[unit] = r;
        if (heads.full_width && head == 0) rstd[t] = r;
      }
    }
    for (int i = lane * W; active && i < heads.half(); i += lanes * W) {
      heads.read(x, i, a, b);
      if (heads.gain != nullptr) {
        float ga[W], gb[W];
        heads.read(heads.gain_of(head), i, ga, gb);
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) a[j] *= r * ga[j], b[j] *= r * gb[j];
      }
      heads.turn(t, i, 1, a, b);
      heads.write(y[t] + head * heads.head_dim, i, a, b);
    }
  }
};

// Block (x, y) has head y and every grid_x-th round of tokens. Its part of dgain is summed per group of lanes
// in shared memory, then over the groups: partial [grid_x, heads, head_dim].
template <class C, int W>
struct HeadBackwardKernel {
  static constexpr int kThreads = 256;
  Heads<C, W> heads;
  Rows<const C> dy;
  const float* rstd;
  const float* dot;  // FullWidth
  float width;
  Rows<C> dx;
  float* partial;

  HYBRIDMOE_DEVICE void operator()() const {
    const int lanes = heads.lanes, groups = block_threads() / lanes, lane = thread_index() % lanes;
    const int group = thread_index() / lanes, head = static_cast<int>(block_y()), head_dim = heads.head_dim;
    const bool norm = heads.gain != nullptr;
    float* sums = shared_memory<float>();
    float* own = sums + group * head_dim;
    if (norm) {
      for (int i = thread_index(); i < groups * head_dim; i += block_threads()) sums[i] = 0;
      sync_block();
    }
    const std::int64_t rounds = (heads.n + groups - 1) / groups;
    for (std::int64_t round = block_x(); round < rounds; round += grid_x()) {
      const std::int64_t t = round * groups + group;
      const bool active = t < heads.n;
      const C* g = active ? dy[t] + head * head_dim : nullptr;
      C* result = active ? dx[t] + head * head_dim : nullptr;
      float u[W], v[W], gu[W], gv[W], a[W], b[W];
      if (!norm) {
        for (int i = lane * W; active && i < heads.half(); i += lanes * W) {
          heads.read(g, i, gu, gv);
          heads.turn(t, i, -1, gu, gv);
          heads.write(result, i, gu, gv);
        }
        continue;
      }
      const C* x = active ? heads.x[t] + head * head_dim : nullptr;
      const float r = active ? rstd[heads.full_width ? t : t * heads.heads + head] : 0;
      float product = 0;
      for (int i = lane * W; active && i < heads.half(); i += lanes * W) {
        heads.read_gradient(g, t, head, i, u, v, gu, gv);
        heads.read(x, i, a, b);
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) {
          product += u[j] * a[j] + v[j] * b[j];
          own[i + j] += gu[j] * a[j] * r;
          if (heads.in_second(i + j)) own[heads.half() + i + j] += gv[j] * b[j] * r;
        }
      }
      if (!heads.full_width) product = over_lanes<Plus>(product, lanes);
      if (active && heads.full_width) product = dot[t];
      const float pull = r * r * r * (product / width);
      for (int i = lane * W; active && i < heads.half(); i += lanes * W) {
        heads.read_gradient(g, t, head, i, u, v, gu, gv);
        heads.read(x, i, a, b);
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) u[j] = r * u[j] - pull * a[j], v[j] = r * v[j] - pull * b[j];
        heads.write(result, i, u, v);
      }
    }
    if (!norm) return;
    sync_block();
    for (int i = thread_index(); i < head_dim; i += block_threads()) {
      float sum = 0;
      for (int other = 0; other < groups; ++other) sum += sums[other * head_dim + i];
      partial[(block_x() * heads.heads + head) * head_dim + i] = sum;
    }
  }
};

template <class C>
struct RowSquaresKernel {
  static constexpr int kThreads = 256;
  Rows<const C> x;
  std::int64_t width;
  float* sumsq;

  HYBRIDMOE_DEVICE void operator()() const {
    float squares = 0;
    for (std::int64_t i = thread_index(); i < width; i += block_threads()) {
      const float value = to_float(x[block_x()][i]);
      squares += value * value;
    }
    squares = over_block<Plus>(squares, shared_memory<float>());
    if (thread_index() == 0) sumsq[block_x()] = squares;
  }
};

template <class C, int W>
struct HeadDotKernel {
  static constexpr int kThreads = 256;
  Heads<C, W> heads;
  Rows<const C> dy;
  float* dot;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t t = block_x();
    const int pairs = heads.half() / W;
    float u[W], v[W], gu[W], gv[W], a[W], b[W];
    float product = 0;
    for (int p = thread_index(); p < heads.heads * pairs; p += block_threads()) {
      const int head = p / pairs, i = p % pairs * W;
      heads.read_gradient(dy[t] + head * heads.head_dim, t, head, i, u, v, gu, gv);
      heads.read(heads.x[t] + head * heads.head_dim, i, a, b);
      HYBRIDMOE_UNROLL
      for (int j = 0; j < W; ++j) product += u[j] * a[j] + v[j] * b[j];
    }
    product = over_block<Plus>(product, shared_memory<float>());
    if (thread_index() == 0) dot[t] = product;
  }
};

constexpr std::size_t kScratchBytes = 32 * sizeof(float);  // of over_block

// Accesses are as wide as half a head, unless something is not aligned.
bool halves_in_vectors(const HeadNormRopeForward& op, const Tensor& gradient, const Tensor& result) {
  if (op.head_dim % 2 != 0) return false;
  return in_vectors(op.head_dim / 2, {&op.x, &op.gain, &gradient, &result});
}

}  // namespace

void CudaBackend::head_norm_statistics(const HeadNormStatistics& op, Stream* stream) {
  if (op.x.rows() == 0) return;
  with_type(compute_type_, [&]<class C>(C) {
    using Kernel = RowSquaresKernel<C>;
    launch(Kernel{Rows<const C>(op.x), op.x.shape[1], elements<float>(op.sumsq)},
           {.x = op.x.rows(),
            .threads = threads_for(op.x.shape[1], Kernel::kThreads),
            .shared_bytes = kScratchBytes},
           stream);
  });
}

void CudaBackend::head_norm_rope_forward(const HeadNormRopeForward& op, Stream* stream) {
  const std::int64_t n = op.x.rows();
  if (n == 0) return;
  with_vectors(compute_type_, halves_in_vectors(op, {}, op.y), [&]<class C, int W>(C, Constant<W>) {
    using Kernel = HeadForwardKernel<C, W>;
    const Heads<C, W> heads(op, n);
    const bool full = op.norm == HeadNormKind::FullWidth;
    const std::int64_t units_per_block = Kernel::kThreads / heads.lanes;
    launch(
        Kernel{heads, elements<const float>(op.sumsq), static_cast<float>(full ? op.full_width : op.head_dim),
               static_cast<float>(op.eps), Rows<C>(op.y), elements<float>(op.rstd)},
        {.x = divide_up(n * op.heads, units_per_block), .threads = Kernel::kThreads}, stream);
  });
}

void CudaBackend::head_norm_backward_statistics(const HeadNormBackwardStatistics& op, Stream* stream) {
  const std::int64_t n = op.dy.rows();
  if (n == 0) return;
  with_vectors(compute_type_, halves_in_vectors(op.forward, op.dy, {}), [&]<class C, int W>(C, Constant<W>) {
    using Kernel = HeadDotKernel<C, W>;
    const Heads<C, W> heads(op.forward, n);
    launch(Kernel{heads, Rows<const C>(op.dy), elements<float>(op.dot)},
           {.x = n,
            .threads = threads_for(op.dy.shape[1] / 2 / W, Kernel::kThreads),
            .shared_bytes = kScratchBytes},
           stream);
  });
}

void CudaBackend::head_norm_rope_backward(const HeadNormRopeBackward& op, Stream* stream) {
  const HeadNormRopeForward& f = op.forward;
  const std::int64_t n = op.dy.rows();
  if (n == 0) return;
  const bool norm = f.norm != HeadNormKind::None, full = f.norm == HeadNormKind::FullWidth;
  with_vectors(compute_type_, halves_in_vectors(f, op.dy, op.dx), [&]<class C, int W>(C, Constant<W>) {
    using Kernel = HeadBackwardKernel<C, W>;
    const Heads<C, W> heads(f, n);
    const std::int64_t groups = Kernel::kThreads / heads.lanes;
    const std::int64_t blocks = std::max<std::int64_t>(1, row_parts(divide_up(n, groups), 4) / f.heads);
    float* partial = norm ? workspace<float>(blocks * f.heads * f.head_dim, stream) : nullptr;
    launch(Kernel{heads, Rows<const C>(op.dy), elements<const float>(f.rstd), elements<const float>(op.dot),
                  static_cast<float>(full ? f.full_width : f.head_dim), Rows<C>(op.dx), partial},
           {.x = blocks,
            .y = f.heads,
            .threads = Kernel::kThreads,
            .shared_bytes = norm ? groups * f.head_dim * sizeof(float) : 0},
           stream);
    if (!norm) return;
    const std::int64_t parts = full ? blocks : blocks * f.heads;
    join_partials<Plus>(partial, parts, full ? f.heads * f.head_dim : f.head_dim, elements<float>(op.dgain),
                        stream);
  });
}

}  // namespace hybridmoe::cuda
