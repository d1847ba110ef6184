// What the norms share: RMSNorm of one row and its gradient, and sums over rows that every thread collects
// for itself and that are added up in the order of the threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/cpu/scratch.h"
#include "core/cpu/vector_math.h"
#include "core/tensor.h"

namespace hybridmoe::cpu {

template <class C>
C* row_of(const Tensor& matrix, std::int64_t row) {
  return matrix.ptr<C>() + row * matrix.row_stride();
}
template <class C>
C* optional_row(const Tensor& matrix, std::int64_t row) {
  return matrix.empty() ? nullptr : row_of<C>(matrix, row);
}

// sum = a + b, rounded to C; may be a or b.
template <class C>
void add_rows(const C* a, const C* b, C* sum, std::int64_t d) {
#pragma omp simd
  for (std::int64_t i = 0; i < d; ++i) sum[i] = from_float<C>(to_float(a[i]) + to_float(b[i]));
}

template <class C>
float sum_of_squares(const C* x, std::int64_t d) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < d; ++i) sum += to_float(x[i]) * to_float(x[i]);
  return sum;
}

inline float rstd_of(float squares, std::int64_t d, double eps) {
  return 1.f / std::sqrt(squares / static_cast<float>(d) + static_cast<float>(eps));
}

// y = x · rstd ⊙ gain.
template <class C, class Y>
void scale_row(const C* x, float rstd, const C* gain, Y* y, std::int64_t d) {
#pragma omp simd
  for (std::int64_t i = 0; i < d; ++i) y[i] = from_float<Y>(to_float(x[i]) * rstd * to_float(gain[i]));
}

// With u = dy ⊙ gain: dx = rstd u - rstd³/d x (u·x) + skip; dgain += dy ⊙ x rstd. dx may be dy or skip.
template <class D, class C>
void norm_backward_row(const D* dy, const C* x, const C* gain, float rstd, const C* skip, C* dx, float* dgain,
                       std::int64_t d) {
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (std::int64_t i = 0; i < d; ++i) {
    const float product = to_float(dy[i]) * to_float(x[i]);
    dot += product * to_float(gain[i]);
    dgain[i] += product * rstd;
  }
  const float back = rstd * rstd * rstd / static_cast<float>(d) * dot;
  if (skip != nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < d; ++i) {
      const float u = to_float(dy[i]) * to_float(gain[i]);
      dx[i] = from_float<C>(rstd * u - back * to_float(x[i]) + to_float(skip[i]));
    }
  } else {
#pragma omp simd
    for (std::int64_t i = 0; i < d; ++i) {
      const float u = to_float(dy[i]) * to_float(gain[i]);
      dx[i] = from_float<C>(rstd * u - back * to_float(x[i]));
    }
  }
}

// A vector of sums per thread, at the front of the thread's scratch block.
class PartialSums {
 public:
  // All zero; `rest_bytes` of scratch remain for the operator behind them.
  PartialSums(Scratch& scratch, int threads, std::int64_t width, std::int64_t rest_bytes = 0)
      : scratch_(scratch), threads_(threads), bytes_((width * 4 + 63) / 64 * 64) {
    scratch.reserve(threads, bytes_ + rest_bytes);
    for (int thread = 0; thread < threads; ++thread) std::fill_n(of(thread), width, 0.f);
  }
  float* of(int thread) const { return reinterpret_cast<float*>(scratch_.block(thread)); }
  std::byte* rest(int thread) const { return scratch_.block(thread) + bytes_; }

  // target[i] += elements begin + i of every thread's sums, i < count.
  void add_to(float* target, std::int64_t begin, std::int64_t count) const {
    for (int thread = 0; thread < threads_; ++thread) {
      const float* part = of(thread) + begin;
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) target[i] += part[i];
    }
  }

 private:
  const Scratch& scratch_;
  int threads_;
  std::int64_t bytes_;
};

}  // namespace hybridmoe::cpu
