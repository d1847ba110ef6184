// The machine's limits as this process sees them, for lines that say which share of them was reached.
#pragma once

#include "core/backend.h"

namespace hybridmoe {

// Rate in floating-point operations per second of large products with weights, in the backend's compute type
// and with its threads: the best of linear_forward over a few shapes, repeated for about `seconds` (at least
// one round). Under mpirun every rank should measure at the same time. Allocates up to 16 MiB from the
// backend, 1 GiB from a device's, and releases them.
double measure_product_limit(Backend& backend, double seconds = 0.3);

// Bytes per second, read and written, of copying 64 MiB, on a device 1 GiB: the limit of operators that only
// move data. Allocates twice that and releases it.
double measure_copy_limit(Backend& backend, double seconds = 0.2);

}  // namespace hybridmoe
