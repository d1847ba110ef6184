// Loops over threads. The split depends on the sizes and the number of threads alone, never on timing, so the
// same call gives the same bits. Bodies must not throw.
#pragma once

#include <cstdint>
#include <omp.h>

namespace hybridmoe::cpu {

// body(begin, end, thread): a run of indices per thread, as equal as `grain` (the smallest run worth a
// thread) allows. Thread numbers without indices are not called.
template <class Body>
void parallel_ranges(int threads, std::int64_t count, std::int64_t grain, const Body& body) {
  const std::int64_t useful = (count + grain - 1) / grain;
  const int used = static_cast<int>(useful < threads ? useful : threads);
  if (used <= 1) {
    if (count > 0) body(std::int64_t{0}, count, 0);
    return;
  }
#pragma omp parallel num_threads(used)
  {
    const int thread = omp_get_thread_num();
    const int running = omp_get_num_threads();
    body(count * thread / running, count * (thread + 1) / running, thread);
  }
}

// The rows that make up about 64 KiB: less work than that does not pay for waking a thread.
inline std::int64_t row_grain(std::int64_t bytes_per_row) {
  const std::int64_t rows = 65536 / (bytes_per_row > 0 ? bytes_per_row : 1);
  return rows > 0 ? rows : 1;
}

}  // namespace hybridmoe::cpu
