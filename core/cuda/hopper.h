// The part of the thin layer (portable.h) that only Hopper has, compute capability 9.x and code for sm_90a:
// barriers with phases (mbarrier), bulk copies of boxes into swizzled shared memory, products of a warpgroup
// (wgmma), and the registers of a warpgroup. Under a plain C++ compiler the same functions are emulated
// (host_hopper.h). The formats are those of the PTX ISA: "mbarrier", "cp.async.bulk.tensor", "wgmma",
// "setmaxnreg".
//
// In code for other devices everything here traps: a kernel of it must not be chosen there.
#pragma once

#include "core/cuda/portable.h"

#ifdef __CUDACC__
#include <cuda.h>
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HYBRIDMOE_HOPPER(...) asm volatile(__VA_ARGS__)
#else
#define HYBRIDMOE_HOPPER(...) __trap()
#endif
#else
#include "core/cuda/host_hopper.h"
#endif

namespace hybridmoe::cuda {

constexpr int kWarpgroup = 128;     // threads
constexpr int kSwizzleBytes = 128;  // a row of a box; 8 of them are the period of the swizzle

// A barrier in shared memory, 8 bytes. Its phases have parities 0, 1, 0, ...; one ends when all its arrivals
// have come and all bytes that they expect. A new barrier is in a phase of parity 0, as if one of 1 had
// ended.
using Barrier = std::uint64_t;

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#endif

// Describes bf16 matrices for copy_box: `matrices` of them, [rows, columns] each, `row_stride` elements
// between rows and `matrix_stride` between matrices, and boxes of [box_rows, 64]. The memory begins at a
// multiple of 16 bytes, strides are multiples of 8 elements, box_rows at most 256. Throws Error when the
// driver refuses. A kernel takes it as a member: that is a __grid_constant__ parameter there (launch.h).
struct Boxes {
  const void* data;
  std::int64_t columns, rows, matrices, row_stride, matrix_stride;
  int box_rows;
};
TensorMap make_tensor_map(const Boxes& boxes);

#ifdef __CUDACC__

HYBRIDMOE_DEVICE std::uint32_t shared_address(const void* memory) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(memory));
}

// By one thread; then fence_barrier_init, then a block barrier before anybody uses it.
HYBRIDMOE_DEVICE void init_barrier(Barrier* barrier, int arrivals) {
  HYBRIDMOE_HOPPER("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                   : "memory");
}
// The copy engine sees barriers that the thread initialised.
HYBRIDMOE_DEVICE void fence_barrier_init() {
  HYBRIDMOE_HOPPER("fence.mbarrier_init.release.cluster;" ::: "memory");
  HYBRIDMOE_HOPPER("fence.proxy.async.shared::cta;" ::: "memory");
}
HYBRIDMOE_DEVICE void arrive(Barrier* barrier) {
  HYBRIDMOE_HOPPER("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                   : "memory");
}
// Arrives, and makes the phase wait for so many bytes of copies.
HYBRIDMOE_DEVICE void arrive_expecting(Barrier* barrier, int bytes) {
  HYBRIDMOE_HOPPER(
      "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity has ended; it is the present one or the one before.
HYBRIDMOE_DEVICE void wait_for_phase(Barrier* barrier, std::uint32_t parity) {
  std::uint32_t ended = 0;
  do {
    HYBRIDMOE_HOPPER(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (ended == 0);
}
// Waits until `threads` threads, whole warps, have come to barrier `id` of the block, 1 to 15.
HYBRIDMOE_DEVICE void sync_threads(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Copies the box whose first element is (column, row) of a matrix to `to`, a multiple of 128 bytes: row r of
// the box at 128 r, its chunks of 16 bytes swizzled by address. Elements outside of the matrix are zeros; the
// barrier gets the bytes of a whole box always.
HYBRIDMOE_DEVICE void copy_box(void* to, const TensorMap& map, int column, int row, int matrix,
                               Barrier* barrier) {
  HYBRIDMOE_HOPPER(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, "
      "%4}], "
      "[%5];" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(matrix), "r"(shared_address(barrier))
      : "memory");
}
HYBRIDMOE_DEVICE void prefetch_map(const TensorMap& map) {
  HYBRIDMOE_HOPPER("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// 16 bytes of zeros in shared memory, which products and copies see after the thread's next
// fence_async_proxy.
HYBRIDMOE_DEVICE void clear_chunk(void* to) { *static_cast<int4*>(to) = int4{0, 0, 0, 0}; }
HYBRIDMOE_DEVICE void fence_async_proxy() { HYBRIDMOE_HOPPER("fence.proxy.async.shared::cta;" ::: "memory"); }

// By all threads of a warpgroup, which begins at a multiple of 128 threads, as all that follows. Before the
// first product of a group: registers that were written before may be read by it.
HYBRIDMOE_DEVICE void fence_accumulators() { HYBRIDMOE_HOPPER("wgmma.fence.sync.aligned;" ::: "memory"); }
// sum [64, 256] += a [64, 16] · b [16, 256], from shared memory as the descriptors say, in the accumulator's
// fragments: lane l of warp w holds, for rows 16 w + l / 4 and the 8th behind it, columns 8 j + 2 (l % 4) and
// the next at 4 j and at 4 j + 2. `add` false: =. Transposed: stored along m (n) and not along k. Under way
// until wait_for_products; until then sum and the operands must be left alone.
template <bool kATransposed, bool kBTransposed>
HYBRIDMOE_DEVICE void multiply_m64n256k16(float (&sum)[128], std::uint64_t a, std::uint64_t b, bool add) {
#define HYBRIDMOE_SUMS(i)                                                                                 \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])
  HYBRIDMOE_HOPPER(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, add, 1, 1, %131, %132;\n"
      "}"
      : HYBRIDMOE_SUMS(0), HYBRIDMOE_SUMS(8), HYBRIDMOE_SUMS(16), HYBRIDMOE_SUMS(24), HYBRIDMOE_SUMS(32),
        HYBRIDMOE_SUMS(40), HYBRIDMOE_SUMS(48), HYBRIDMOE_SUMS(56), HYBRIDMOE_SUMS(64), HYBRIDMOE_SUMS(72),
        HYBRIDMOE_SUMS(80), HYBRIDMOE_SUMS(88), HYBRIDMOE_SUMS(96), HYBRIDMOE_SUMS(104), HYBRIDMOE_SUMS(112),
        HYBRIDMOE_SUMS(120)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kATransposed ? 1 : 0), "n"(kBTransposed ? 1 : 0));
#undef HYBRIDMOE_SUMS
}
// The products since the last commit become a group.
HYBRIDMOE_DEVICE void commit_products() { HYBRIDMOE_HOPPER("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until only the last kLeft groups may be under way. Whoever reads `sum` gives it too: nothing but that tells
// the compiler that the registers change here.
template <int kLeft>
HYBRIDMOE_DEVICE void wait_for_products() {
  HYBRIDMOE_HOPPER("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
HYBRIDMOE_DEVICE void wait_for_products(float (&sum)[128]) {
  wait_for_products<0>();
  HYBRIDMOE_UNROLL
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// The warpgroup gives registers back, or takes them: kRegisters a thread, a multiple of 8 from 24 to 256.
// Each role of a block is one branch, and the kernel is bound to one block a processor.
template <int kRegisters>
HYBRIDMOE_DEVICE void give_registers() {
  HYBRIDMOE_HOPPER("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
HYBRIDMOE_DEVICE void take_registers() {
  HYBRIDMOE_HOPPER("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#else

HYBRIDMOE_DEVICE std::uint32_t shared_address(const void* memory) { return host::shared_address(memory); }
HYBRIDMOE_DEVICE void init_barrier(Barrier* barrier, int arrivals) { host::init_barrier(barrier, arrivals); }
HYBRIDMOE_DEVICE void fence_barrier_init() { host::fence_barrier_init(); }
HYBRIDMOE_DEVICE void arrive(Barrier* barrier) { host::arrive(barrier, 0); }
HYBRIDMOE_DEVICE void arrive_expecting(Barrier* barrier, int bytes) { host::arrive(barrier, bytes); }
HYBRIDMOE_DEVICE void wait_for_phase(Barrier* barrier, std::uint32_t parity) {
  host::wait_for_phase(barrier, parity);
}
HYBRIDMOE_DEVICE void sync_threads(int id, int threads) { host::sync_threads(id, threads); }
HYBRIDMOE_DEVICE void copy_box(void* to, const TensorMap& map, int column, int row, int matrix,
                               Barrier* barrier) {
  host::copy_box(to, map, {column, row, matrix}, barrier);
}
HYBRIDMOE_DEVICE void prefetch_map(const TensorMap&) {}
HYBRIDMOE_DEVICE void clear_chunk(void* to) { host::clear_chunk(to); }
HYBRIDMOE_DEVICE void fence_async_proxy() { host::fence_async_proxy(); }
HYBRIDMOE_DEVICE void fence_accumulators() { host::fence_accumulators(); }
template <bool kATransposed, bool kBTransposed>
HYBRIDMOE_DEVICE void multiply_m64n256k16(float (&sum)[128], std::uint64_t a, std::uint64_t b, bool add) {
  host::multiply_m64n256k16(sum, a, b, kATransposed, kBTransposed, add);
}
HYBRIDMOE_DEVICE void commit_products() { host::commit_products(); }
template <int kLeft>
HYBRIDMOE_DEVICE void wait_for_products() {
  host::wait_for_products(kLeft);
}
HYBRIDMOE_DEVICE void wait_for_products(float (&)[128]) { host::wait_for_products(0); }
template <int>
HYBRIDMOE_DEVICE void give_registers() {}
template <int>
HYBRIDMOE_DEVICE void take_registers() {}

#endif

// Where an operand of a product lies, written by copy_box: 128-byte swizzle, 8 rows of 128 bytes (1024 bytes)
// after each other, `leading` bytes between boxes of 64 elements along m or n when it is transposed. `start`
// may be moved inside of a box: by 2 bytes an element along k, or by rows of 128 when it is transposed.
HYBRIDMOE_DEVICE std::uint64_t matrix_descriptor(std::uint32_t start, int leading) {
  const auto field = [](int bytes) { return static_cast<std::uint64_t>((bytes & 0x3ffff) >> 4); };
  constexpr std::uint64_t kSwizzle128 = 1;
  return field(static_cast<int>(start)) | field(leading) << 16 | field(8 * kSwizzleBytes) << 32 |
         kSwizzle128 << 62;
}

}  // namespace hybridmoe::cuda
