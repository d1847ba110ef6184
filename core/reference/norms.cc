// RMSNorm on the residual stream and on the heads, and RoPE. In every backward pass, with r = rstd, x what
// was normalised and u = (gradient at the output) ⊙ gain:  dx = r·u − (r³/d)·x·(u·x),  dgain += gradient ⊙
// x·r.
#include "core/reference/norms.h"

#include <cmath>
#include <vector>

#include "core/reference/reference.h"

namespace hybridmoe::reference {

double reciprocal_rms(double sumsq, std::int64_t width, double eps) {
  return 1.0 / std::sqrt(sumsq / static_cast<double>(width) + eps);
}

double norm_backward_dot(const double* dy, const double* gain, const double* x, std::int64_t width) {
  double sum = 0;
  for (std::int64_t i = 0; i < width; ++i) sum += dy[i] * gain[i] * x[i];
  return sum;
}

void norm_backward_row(const double* dy, const double* gain, const double* x, double rstd, double mean_dot,
                       const double* skip, std::int64_t width, double* dx, double* dgain) {
  const double pull = rstd * rstd * rstd * mean_dot;
  for (std::int64_t i = 0; i < width; ++i) {
    const double upstream = dy[i];  // dx may be dy
    dgain[i] += upstream * x[i] * rstd;
    dx[i] = rstd * upstream * gain[i] - pull * x[i] + (skip != nullptr ? skip[i] : 0.0);
  }
}

const double* residual_sum_row(const double* x, const double* branch, double* sum, std::int64_t width) {
  if (sum == nullptr) return x;
  for (std::int64_t i = 0; i < width; ++i) sum[i] = x[i] + (branch != nullptr ? branch[i] : 0.0);
  return sum;
}

void ReferenceBackend::residual_norm_forward(const ResidualNormForward& op, Stream*) {
  const Rows x(op.x), branch(op.branch), sum(op.sum), y(op.y);
  const double* gain = elements_of(op.gain);
  double* rstd = elements_of(op.rstd);
  const std::int64_t d = op.x.shape[1];
  for (std::int64_t t = 0; t < op.x.rows(); ++t) {
    const double* row = residual_sum_row(x[t], branch[t], sum[t], d);
    rstd[t] = reciprocal_rms(dot(row, row, d), d, op.eps);
    for (std::int64_t i = 0; i < d; ++i) y[t][i] = row[i] * rstd[t] * gain[i];
  }
}

void ReferenceBackend::residual_norm_backward(const ResidualNormBackward& op, Stream*) {
  const Rows dy(op.dy), sum(op.sum), skip(op.skip), dsum(op.dsum);
  const double* gain = elements_of(op.gain);
  const double* rstd = elements_of(op.rstd);
  double* dgain = elements_of(op.dgain);
  const std::int64_t d = op.dy.shape[1];
  for (std::int64_t t = 0; t < op.dy.rows(); ++t) {
    const double mean_dot = norm_backward_dot(dy[t], gain, sum[t], d) / static_cast<double>(d);
    norm_backward_row(dy[t], gain, sum[t], rstd[t], mean_dot, skip[t], d, dsum[t], dgain);
  }
}

void ReferenceBackend::residual_statistics(const ResidualStatistics& op, Stream*) {
  const Rows x(op.x);
  for (std::int64_t t = 0; t < op.x.rows(); ++t) {
    for (std::int64_t i = 0; i < op.x.shape[1]; ++i) {
      *elements_of(op.squares) += x[t][i] * x[t][i];
      if (op.absmax.empty()) continue;
      double& absmax = *elements_of(op.absmax);
      absmax = std::max(absmax, std::abs(x[t][i]));  // a NaN compares as not larger
    }
  }
}

namespace {

// The row of sines or cosines for row t; null without RoPE.
const double* rope_row(const HeadNormRopeForward& op, const Tensor& table, std::int64_t t) {
  return Rows(table)[op.first_position + t % op.period];
}

// Turns the pairs (i, i + half) of one head by the angles, in place.
void rotate(const double* cosine, const double* sine, std::int64_t half, double* head) {
  for (std::int64_t i = 0; i < half; ++i) {
    const double a = head[i], b = head[i + half];
    head[i] = a * cosine[i] - b * sine[i];
    head[i + half] = b * cosine[i] + a * sine[i];
  }
}

// The same by the opposite angles.
void rotate_back(const double* cosine, const double* sine, std::int64_t half, double* head) {
  for (std::int64_t i = 0; i < half; ++i) {
    const double a = head[i], b = head[i + half];
    head[i] = a * cosine[i] + b * sine[i];
    head[i + half] = b * cosine[i] - a * sine[i];
  }
}

const double* head_gain(const HeadNormRopeForward& op, std::int64_t head) {
  return elements_of(op.gain) + (op.norm == HeadNormKind::FullWidth ? head * op.head_dim : 0);
}

// The gradient of one head before RoPE.
void unrotated(const HeadNormRopeForward& op, const double* dy, std::int64_t t, std::vector<double>& g) {
  g.assign(dy, dy + op.head_dim);
  if (!op.rope_cos.empty()) {
    rotate_back(rope_row(op, op.rope_cos, t), rope_row(op, op.rope_sin, t), op.head_dim / 2, g.data());
  }
}

}  // namespace

void ReferenceBackend::head_norm_statistics(const HeadNormStatistics& op, Stream*) {
  const Rows x(op.x);
  double* sumsq = elements_of(op.sumsq);
  for (std::int64_t t = 0; t < op.x.rows(); ++t) sumsq[t] = dot(x[t], x[t], op.x.shape[1]);
}

void ReferenceBackend::head_norm_rope_forward(const HeadNormRopeForward& op, Stream*) {
  const Rows x_rows(op.x), y_rows(op.y);
  const std::int64_t width = op.head_dim;
  double* rstd = elements_of(op.rstd);
  for (std::int64_t t = 0; t < op.x.rows(); ++t) {
    if (op.norm == HeadNormKind::FullWidth) {
      rstd[t] = reciprocal_rms(elements_of(op.sumsq)[t], op.full_width, op.eps);
    }
    for (std::int64_t h = 0; h < op.heads; ++h) {
      const double* x = x_rows[t] + h * width;
      double* y = y_rows[t] + h * width;
      if (op.norm == HeadNormKind::None) {
        for (std::int64_t i = 0; i < width; ++i) y[i] = x[i];
      } else {
        double& r = rstd[op.norm == HeadNormKind::FullWidth ? t : t * op.heads + h];
        if (op.norm == HeadNormKind::PerHead) r = reciprocal_rms(dot(x, x, width), width, op.eps);
        const double* gain = head_gain(op, h);
        for (std::int64_t i = 0; i < width; ++i) y[i] = x[i] * r * gain[i];
      }
      if (!op.rope_cos.empty()) {
        rotate(rope_row(op, op.rope_cos, t), rope_row(op, op.rope_sin, t), width / 2, y);
      }
    }
  }
}

void ReferenceBackend::head_norm_backward_statistics(const HeadNormBackwardStatistics& op, Stream*) {
  const HeadNormRopeForward& f = op.forward;
  const Rows x(f.x), dy(op.dy);
  double* result = elements_of(op.dot);
  std::vector<double> g;
  for (std::int64_t t = 0; t < op.dy.rows(); ++t) {
    result[t] = 0;
    for (std::int64_t h = 0; h < f.heads; ++h) {
      unrotated(f, dy[t] + h * f.head_dim, t, g);
      result[t] += norm_backward_dot(g.data(), head_gain(f, h), x[t] + h * f.head_dim, f.head_dim);
    }
  }
}

void ReferenceBackend::head_norm_rope_backward(const HeadNormRopeBackward& op, Stream*) {
  const HeadNormRopeForward& f = op.forward;
  const Rows x_rows(f.x), dy(op.dy), dx_rows(op.dx);
  const double* rstd = elements_of(f.rstd);
  const std::int64_t width = f.head_dim;
  const bool full = f.norm == HeadNormKind::FullWidth;
  std::vector<double> g;
  for (std::int64_t t = 0; t < op.dy.rows(); ++t) {
    for (std::int64_t h = 0; h < f.heads; ++h) {
      unrotated(f, dy[t] + h * width, t, g);
      double* dx = dx_rows[t] + h * width;
      if (f.norm == HeadNormKind::None) {
        std::copy(g.begin(), g.end(), dx);
        continue;
      }
      const double* x = x_rows[t] + h * width;
      const double* gain = head_gain(f, h);
      const double mean_dot = full ? elements_of(op.dot)[t] / static_cast<double>(f.full_width)
                                   : norm_backward_dot(g.data(), gain, x, width) / static_cast<double>(width);
      norm_backward_row(g.data(), gain, x, rstd[full ? t : t * f.heads + h], mean_dot, nullptr, width, dx,
                        elements_of(op.dgain) + (full ? h * width : 0));
    }
  }
}

}  // namespace hybridmoe::reference
