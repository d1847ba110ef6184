#include "core/backend.h"

#include <omp.h>
#include <oneapi/dnnl/dnnl.hpp>

#include "core/cpu/cpu_backend.h"

namespace hybridmoe {
namespace cpu {
namespace {

const char* instruction_set() {
  if (cpu_multiplies_bf16()) return "avx512_bf16";
  if (__builtin_cpu_supports("avx512f")) return "avx512";
  if (__builtin_cpu_supports("avx2")) return "avx2";
  return "sse2";
}

}  // namespace

CpuBackend::CpuBackend(const CpuBackendOptions& options)
    : options_(options),
      products_(options.compute_type, options.threads,
                options.compute_type == DType::BF16 && cpu_multiplies_bf16()),
      scratch_(options.threads) {}

std::string CpuBackend::name() const {
  const dnnl_version_t* version = dnnl::version();
  return cat("cpu (oneDNN ", version->major, ".", version->minor, ".", version->patch, ", ",
             instruction_set(), ", ", options_.threads, options_.threads == 1 ? " thread)" : " threads)");
}

}  // namespace cpu

bool cpu_multiplies_bf16() { return __builtin_cpu_supports("avx512bf16"); }

std::unique_ptr<Backend> make_cpu_backend(const CpuBackendOptions& options) {
  require(options.compute_type == DType::F32 || options.compute_type == DType::BF16,
          "the cpu backend computes in f32 or bf16, not ", name_of(options.compute_type),
          "; the reference backend computes in f64");
  require(options.threads >= 1, "the cpu backend needs at least 1 thread, not ", options.threads);
  return std::make_unique<cpu::CpuBackend>(options);
}

}  // namespace hybridmoe
