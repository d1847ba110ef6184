// Norms of the heads and RoPE. A group of lanes has one head of one token; a lane has pairs of vectors, one
// of the head's first half and the one that RoPE turns with it.
#include <algorithm>
#include <numeric>

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
  // In 32 bits, where a remainder is a few instructions: no memory holds more tokens, or heads of them.
  HYBRIDMOE_DEVICE std::int64_t angle(std::int64_t t) const {
    const std::uint32_t of_period = static_cast<std::uint32_t>(t) % static_cast<std::uint32_t>(period);
    return (first_position + of_period) * (head_dim / 2);
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
    constexpr int V = W < 4 ? W : 4;  // floats of an access
    const std::int64_t from = angle(t) + i;
    HYBRIDMOE_UNROLL
    for (int first = 0; first < W; first += V) {
      const Vector<float, V> cosines = load<float, V>(cosine + from + first);
      const Vector<float, V> sines = load<float, V>(sine + from + first);
      HYBRIDMOE_UNROLL
      for (int v = 0; v < V; ++v) {
        const int j = first + v;
        const float c = cosines.value[v], s = direction * sines.value[v];
        const float turned = a[j] * c - b[j] * s;
        b[j] = b[j] * c + a[j] * s;
        a[j] = turned;
      }
    }
  }
  // The upstream gradient, before RoPE.
  HYBRIDMOE_DEVICE void read_gradient(const C* dy_head, std::int64_t t, int i, float (&u)[W],
                                      float (&v)[W]) const {
    read(dy_head, i, u, v);
    turn(t, i, -1, u, v);
  }
  HYBRIDMOE_DEVICE void times_gain(int head, int i, float (&u)[W], float (&v)[W]) const {
    float a[W], b[W];
    read(gain_of(head), i, a, b);
    HYBRIDMOE_UNROLL
    for (int j = 0; j < W; ++j) u[j] *= a[j], v[j] *= b[j];
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
    const auto unit = static_cast<std::uint32_t>(block_x() * groups + thread_index() / lanes);
    const std::int64_t t = unit / static_cast<std::uint32_t>(heads.heads);
    const int head = static_cast<int>(unit - t * heads.heads);
    const bool active = t < heads.n;  // all lanes take part in the sum
    const C* x = active ? heads.x[t] + head * heads.head_dim : nullptr;
    const bool kept = heads.gain != nullptr && !heads.full_width && lanes * W >= heads.half();
    float a[W] = {}, b[W] = {};
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
      if (!kept) heads.read(x, i, a, b);  // else they are still there
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

// Block (x, y) has heads y * together .. and every grid_x-th round of tokens: a group of lanes keeps its
// head, its neighbours have the heads beside that one, which share the token's cosines and sines. A thread
// sums its part of dgain in shared memory; in the end the groups of a head, or of all heads that share a
// gain, are added up.
template <class C, int W>
struct HeadBackwardKernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerProcessor = 3;
  Heads<C, W> heads;
  int together;  // heads of a block; divides the number of heads and that of groups
  Rows<const C> dy;
  const float* rstd;
  const float* dot;  // FullWidth
  float width;
  Rows<C> dx;
  float* partial;  // [grid_x, heads, head_dim] with a gain for each head, else [blocks, head_dim]

  static std::size_t shared_bytes(const Heads<C, W>& heads) {
    return divide_up(Heads<C, W>::half_of(heads.head_dim), heads.lanes * W) * 2 * W * kThreads *
           sizeof(float);
  }

  HYBRIDMOE_DEVICE void operator()() const {
    const int lanes = heads.lanes, groups = kThreads / lanes, lane = thread_index() % lanes;
    const int group = thread_index() / lanes, head_dim = heads.head_dim, tokens = groups / together;
    const int head = static_cast<int>(block_y()) * together + group % together;
    const bool norm = heads.gain != nullptr, at_once = lanes * W >= heads.half();
    float* own = shared_memory<float>() + thread_index();  // neighbouring threads use neighbouring banks
    for (int i = lane * W, k = 0; norm && i < heads.half(); i += lanes * W, k += 2 * W)
      for (int j = 0; j < 2 * W; ++j) own[(k + j) * kThreads] = 0;
    const std::int64_t rounds = (heads.n + tokens - 1) / tokens;
    for (std::int64_t round = block_x(); round < rounds; round += grid_x()) {
      const std::int64_t t = round * tokens + group / together;
      const bool active = t < heads.n;
      const C* g = active ? dy[t] + head * head_dim : nullptr;
      C* result = active ? dx[t] + head * head_dim : nullptr;
      float u[W] = {}, v[W] = {}, a[W] = {}, b[W] = {};
      if (!norm) {
        for (int i = lane * W; active && i < heads.half(); i += lanes * W) {
          heads.read_gradient(g, t, i, u, v);
          heads.write(result, i, u, v);
        }
        continue;
      }
      const C* x = active ? heads.x[t] + head * head_dim : nullptr;
      const float r = active ? rstd[heads.full_width ? t : t * heads.heads + head] : 0;
      float product = 0;
      for (int i = lane * W, k = 0; active && i < heads.half(); i += lanes * W, k += 2 * W) {
        heads.read(x, i, a, b);  // first: it need not wait for what turns the gradient
        heads.read_gradient(g, t, i, u, v);
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) {
          own[(k + j) * kThreads] += u[j] * a[j] * r;
          own[(k + W + j) * kThreads] += v[j] * b[j] * r;
        }
        heads.times_gain(head, i, u, v);
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) product += u[j] * a[j] + v[j] * b[j];
      }
      if (!heads.full_width) product = over_lanes<Plus>(product, lanes);
      if (active && heads.full_width) product = dot[t];
      const float pull = r * r * r * (product / width);
      for (int i = lane * W; active && i < heads.half(); i += lanes * W) {
        if (!at_once) {  // else they are still there
          heads.read_gradient(g, t, i, u, v);
          heads.times_gain(head, i, u, v);
          heads.read(x, i, a, b);
        }
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) u[j] = r * u[j] - pull * a[j], v[j] = r * v[j] - pull * b[j];
        heads.write(result, i, u, v);
      }
    }
    if (!norm) return;
    sync_block();
    write_sums(shared_memory<float>());
  }

 private:
  HYBRIDMOE_DEVICE void write_sums(const float* sums) const {
    const int lanes = heads.lanes, groups = kThreads / lanes, head_dim = heads.head_dim, half = heads.half();
    const int gains = heads.full_width ? together : 1;
    const std::int64_t block = block_x() * (heads.heads / together) + block_y();
    for (int c = thread_index(); c < gains * head_dim; c += kThreads) {
      const int i = c % head_dim, second = i >= half ? 1 : 0, of_half = i - second * half;
      const int step = of_half / (lanes * W), lane = of_half / W % lanes;
      const float* element = sums + ((2 * step + second) * W + of_half % W) * kThreads + lane;
      float sum = 0;
      for (int group = c / head_dim; group < groups; group += gains) sum += element[group * lanes];
      partial[block * gains * head_dim + c] = sum;
    }
  }
};

template <class C, int W>
struct RowSquaresKernel {
  static constexpr int kThreads = 256;
  Rows<const C> x;
  std::int64_t width;
  float* sumsq;

  HYBRIDMOE_DEVICE void operator()() const {
    float squares = 0;
    for (std::int64_t i = thread_index(); i < width / W; i += block_threads()) {
      const Vector<C, W> v = load<C, W>(x[block_x()] + i * W);
      HYBRIDMOE_UNROLL
      for (int j = 0; j < W; ++j) squares += to_float(v.value[j]) * to_float(v.value[j]);
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
    float u[W], v[W], a[W], b[W];
    float product = 0;
    for (int p = thread_index(); p < heads.heads * pairs; p += block_threads()) {
      const int head = p / pairs, i = p % pairs * W;
      heads.read_gradient(dy[t] + head * heads.head_dim, t, i, u, v);
      heads.times_gain(head, i, u, v);
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
  return in_vectors(op.head_dim / 2, {&op.x, &op.gain, &op.rope_cos, &op.rope_sin, &gradient, &result});
}

}  // namespace

void CudaBackend::head_norm_statistics(const HeadNormStatistics& op, Stream* stream) {
  const std::int64_t n = op.x.rows(), width = op.x.shape[1];
  if (n == 0) return;
  with_vectors(compute_type_, in_vectors(width, {&op.x}), [&]<class C, int W>(C, Constant<W>) {
    using Kernel = RowSquaresKernel<C, W>;
    launch(Kernel{Rows<const C>(op.x), width, elements<float>(op.sumsq)},
           {.x = n, .threads = threads_for(width / W, Kernel::kThreads), .shared_bytes = kScratchBytes},
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
    const int groups = Kernel::kThreads / heads.lanes, together = std::gcd(f.heads, groups);
    const std::int64_t rows = f.heads / together;  // of blocks
    const std::int64_t rounds = divide_up(n, groups / together);
    const std::int64_t columns =
        std::max<std::int64_t>(1, row_parts(rounds, 1, Kernel::kBlocksPerProcessor) / rows);
    const std::int64_t blocks = columns * rows, gains = full ? f.heads : 1;
    float* partial = norm ? workspace<float>(blocks * together * f.head_dim, stream) : nullptr;
    launch(Kernel{heads, together, Rows<const C>(op.dy), elements<const float>(f.rstd),
                  elements<const float>(op.dot), static_cast<float>(full ? f.full_width : f.head_dim),
                  Rows<C>(op.dx), partial},
           {.x = columns,
            .y = rows,
            .threads = Kernel::kThreads,
            .shared_bytes = norm ? Kernel::shared_bytes(heads) : 0},
           stream);
    if (!norm) return;
    join_partials<Plus>(partial, full ? columns : blocks, gains * f.head_dim, elements<float>(op.dgain),
                        stream);
  });
}

}  // namespace hybridmoe::cuda
