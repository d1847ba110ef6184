// What hopper.h maps to on the host executor: barriers with phases, bulk copies of boxes and warpgroup
// products that are under way until they are waited for. Addresses are decoded as the hardware does (PTX ISA,
// "Matrix Descriptor Format", "Asynchronous warpgroup level matrix shared memory layout"), so that a wrong
// descriptor or index gives wrong numbers here too.
//
// Everything happens as badly timed as it may: what a copy will write is NaN from its start on and arrives
// when no thread can go on without it; accumulators are NaN from the first product on; operands must hold the
// same when a product is issued and when it is done. What a GPU would not define, or would hang on, throws
// Error.
#pragma once

#include <cstdint>

namespace hybridmoe::cuda {

// A matrix or several, of 16-bit elements, and the box of it that one copy brings into shared memory.
struct TensorMap {
  const void* base = nullptr;
  std::int64_t size[3] = {};    // elements of a row, rows, matrices
  std::int64_t stride[2] = {};  // bytes between rows, between matrices
  int box[2] = {};              // elements of a row, rows
};

namespace host {

void init_barrier(std::uint64_t* barrier, int arrivals);
void fence_barrier_init();
void arrive(std::uint64_t* barrier, int expected_bytes);
void wait_for_phase(std::uint64_t* barrier, std::uint32_t parity);
void sync_threads(int id, int threads);
void copy_box(void* to, const TensorMap& map, const int (&at)[3], std::uint64_t* barrier);

// Zeros that products and copies see after the thread's next fence_async_proxy.
void clear_chunk(void* to);  // 16 bytes
void fence_async_proxy();

std::uint32_t shared_address(const void* memory);  // 0xffffffff: not in shared memory
void fence_accumulators();
// sum [64, 256] of the thread's warpgroup += a · b; `add` false: =.
void multiply_m64n256k16(float (&sum)[128], std::uint64_t a, std::uint64_t b, bool a_transposed,
                         bool b_transposed, bool add);
void commit_products();
void wait_for_products(int left);

}  // namespace host
}  // namespace hybridmoe::cuda
