// RMSNorm on heads, per head or over the full width, with RoPE after it. Forward turns (a, b) = (x[i], x[i +
// h/2]) by the angle of its position, backward turns back first.
#include "core/cpu/cpu_backend.h"
#include "core/cpu/parallel.h"
#include "core/cpu/row_norm.h"

namespace hybridmoe::cpu {
namespace {

// The angles of a row, or null without RoPE.
struct Angles {
  const float* cosine = nullptr;
  const float* sine = nullptr;
};

Angles angles_of(const HeadNormRopeForward& op, std::int64_t row) {
  if (op.rope_cos.empty()) return {};
  const std::int64_t position = op.first_position + row % op.period;
  return {row_of<float>(op.rope_cos, position), row_of<float>(op.rope_sin, position)};
}

// y = RoPE(x · rstd ⊙ gain) of one head, or RoPE(x). y may be x.
template <bool kNorm, class C>
void turn_head(const C* x, float rstd, const C* gain, const Angles& angles, C* y, std::int64_t head_dim) {
  const auto scaled = [&](std::int64_t i) {
    return kNorm ? to_float(x[i]) * rstd * to_float(gain[i]) : to_float(x[i]);
  };
  if (angles.cosine == nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < head_dim; ++i) y[i] = from_float<C>(scaled(i));
    return;
  }
  const std::int64_t half = head_dim / 2;
#pragma omp simd
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = scaled(i), b = scaled(i + half);
    y[i] = from_float<C>(a * angles.cosine[i] - b * angles.sine[i]);
    y[i + half] = from_float<C>(b * angles.cosine[i] + a * angles.sine[i]);
  }
}

// g = dy turned back.
template <class C>
void turn_back(const C* dy, const Angles& angles, float* g, std::int64_t head_dim) {
  if (angles.cosine == nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < head_dim; ++i) g[i] = to_float(dy[i]);
    return;
  }
  const std::int64_t half = head_dim / 2;
#pragma omp simd
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = to_float(dy[i]), b = to_float(dy[i + half]);
    g[i] = a * angles.cosine[i] + b * angles.sine[i];
    g[i + half] = b * angles.cosine[i] - a * angles.sine[i];
  }
}

// Σ g ⊙ gain ⊙ x
template <class C>
float weighted_dot(const float* g, const C* gain, const C* x, std::int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < count; ++i) sum += g[i] * to_float(gain[i]) * to_float(x[i]);
  return sum;
}

template <class C>
void forward(const HeadNormRopeForward& op, int threads) {
  const std::int64_t width = std::int64_t{op.heads} * op.head_dim;
  const C* gain = op.norm == HeadNormKind::None ? nullptr : op.gain.ptr<C>();
  const auto turn = gain == nullptr ? turn_head<false, C> : turn_head<true, C>;
  parallel_ranges(threads, op.x.rows(), row_grain(width * 2 * sizeof(C)),
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t t = begin; t < end; ++t) {
                      const C* x = row_of<C>(op.x, t);
                      const Angles angles = angles_of(op, t);
                      float rstd = 1;
                      if (op.norm == HeadNormKind::FullWidth) {
                        rstd = rstd_of(op.sumsq.ptr<float>()[t], op.full_width, op.eps);
                        op.rstd.ptr<float>()[t] = rstd;
                      }
                      for (std::int64_t head = 0; head < op.heads; ++head) {
                        const std::int64_t first = head * op.head_dim;
                        if (op.norm == HeadNormKind::PerHead) {
                          rstd = rstd_of(sum_of_squares(x + first, op.head_dim), op.head_dim, op.eps);
                          op.rstd.ptr<float>()[t * op.heads + head] = rstd;
                        }
                        const C* head_gain = op.norm == HeadNormKind::FullWidth ? gain + first : gain;
                        turn(x + first, rstd, head_gain, angles, row_of<C>(op.y, t) + first, op.head_dim);
                      }
                    }
                  });
}

// dx = rstd u - back x with u = g ⊙ gain; dgain += g ⊙ x rstd.
template <class C>
void norm_back(const float* g, const C* x, const C* gain, float rstd, float back, C* dx, float* dgain,
               std::int64_t count) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = to_float(x[i]);
    dgain[i] += g[i] * value * rstd;
    dx[i] = from_float<C>(rstd * g[i] * to_float(gain[i]) - back * value);
  }
}

template <class C>
void backward_row(const HeadNormRopeBackward& op, std::int64_t t, float* g, float* dgain) {
  const HeadNormRopeForward& f = op.forward;
  const C* x = row_of<C>(f.x, t);
  const C* dy = row_of<C>(op.dy, t);
  C* dx = row_of<C>(op.dx, t);
  const Angles angles = angles_of(f, t);
  for (std::int64_t head = 0; head < f.heads; ++head) {
    const std::int64_t first = head * f.head_dim;
    turn_back(dy + first, angles, g, f.head_dim);
    if (f.norm == HeadNormKind::None) {
#pragma omp simd
      for (std::int64_t i = 0; i < f.head_dim; ++i) dx[first + i] = from_float<C>(g[i]);
    } else if (f.norm == HeadNormKind::PerHead) {
      const C* gain = f.gain.ptr<C>();
      const float rstd = f.rstd.ptr<float>()[t * f.heads + head];
      const float dot = weighted_dot(g, gain, x + first, f.head_dim);
      const float back = rstd * rstd * rstd / static_cast<float>(f.head_dim) * dot;
      norm_back(g, x + first, gain, rstd, back, dx + first, dgain, f.head_dim);
    } else {
      const float rstd = f.rstd.ptr<float>()[t];
      const float back = rstd * rstd * rstd / static_cast<float>(f.full_width) * op.dot.ptr<float>()[t];
      norm_back(g, x + first, f.gain.ptr<C>() + first, rstd, back, dx + first, dgain + first, f.head_dim);
    }
  }
}

template <class C>
void backward(const HeadNormRopeBackward& op, int threads, Scratch& scratch) {
  const std::int64_t width = std::int64_t{op.forward.heads} * op.forward.head_dim;
  const std::int64_t gains = op.forward.norm == HeadNormKind::None ? 0 : op.forward.gain.elements();
  PartialSums dgain(scratch, threads, gains, op.forward.head_dim * 4);
  parallel_ranges(threads, op.dy.rows(), row_grain(width * 3 * sizeof(C)),
                  [&](std::int64_t begin, std::int64_t end, int thread) {
                    auto* g = reinterpret_cast<float*>(dgain.rest(thread));
                    for (std::int64_t t = begin; t < end; ++t) backward_row<C>(op, t, g, dgain.of(thread));
                  });
  if (gains > 0) dgain.add_to(op.dgain.ptr<float>(), 0, gains);
}

template <class C>
void statistics(const HeadNormStatistics& op, int threads) {
  const std::int64_t width = op.x.shape[1];
  parallel_ranges(threads, op.x.rows(), row_grain(width * sizeof(C)),
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t t = begin; t < end; ++t) {
                      op.sumsq.ptr<float>()[t] = sum_of_squares(row_of<C>(op.x, t), width);
                    }
                  });
}

template <class C>
void backward_statistics(const HeadNormBackwardStatistics& op, int threads, Scratch& scratch) {
  const HeadNormRopeForward& f = op.forward;
  scratch.reserve(threads, f.head_dim * 4);
  parallel_ranges(threads, op.dy.rows(), row_grain(op.dy.shape[1] * 2 * sizeof(C)),
                  [&](std::int64_t begin, std::int64_t end, int thread) {
                    auto* g = reinterpret_cast<float*>(scratch.block(thread));
                    for (std::int64_t t = begin; t < end; ++t) {
                      float dot = 0;
                      for (std::int64_t first = 0; first < op.dy.shape[1]; first += f.head_dim) {
                        turn_back(row_of<C>(op.dy, t) + first, angles_of(f, t), g, f.head_dim);
                        dot +=
                            weighted_dot(g, f.gain.ptr<C>() + first, row_of<C>(f.x, t) + first, f.head_dim);
                      }
                      op.dot.ptr<float>()[t] = dot;
                    }
                  });
}

}  // namespace

void CpuBackend::head_norm_statistics(const HeadNormStatistics& op, Stream*) {
  with_compute_type([&]<class C>(C) { statistics<C>(op, options_.threads); });
}

void CpuBackend::head_norm_backward_statistics(const HeadNormBackwardStatistics& op, Stream*) {
  with_compute_type([&]<class C>(C) { backward_statistics<C>(op, options_.threads, scratch_); });
}

void CpuBackend::head_norm_rope_forward(const HeadNormRopeForward& op, Stream*) {
  with_compute_type([&]<class C>(C) { forward<C>(op, options_.threads); });
  progress();
}

void CpuBackend::head_norm_rope_backward(const HeadNormRopeBackward& op, Stream*) {
  with_compute_type([&]<class C>(C) { backward<C>(op, options_.threads, scratch_); });
  progress();
}

}  // namespace hybridmoe::cpu
