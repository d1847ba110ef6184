// One row of RMSNorm, shared by the norms of the residual stream, of the heads and of the router.
#pragma once

#include <cstdint>

namespace hybridmoe::reference {

// (sumsq / width + eps)^-½
double reciprocal_rms(double sumsq, std::int64_t width, double eps);

// Writes x + branch to sum and returns it; without `sum` the row to normalise is x itself. sum may be x.
const double* residual_sum_row(const double* x, const double* branch, double* sum, std::int64_t width);

// u·x with u = dy ⊙ gain.
double norm_backward_dot(const double* dy, const double* gain, const double* x, std::int64_t width);

// dx = backward of the norm at dy, + skip when given; dgain +=. mean_dot is u·x divided by the width that the
// statistics count. dx may be dy or skip.
void norm_backward_row(const double* dy, const double* gain, const double* x, double rstd, double mean_dot,
                       const double* skip, std::int64_t width, double* dx, double* dgain);

}  // namespace hybridmoe::reference
