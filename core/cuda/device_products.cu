#include <cublasLt.h>
#include <map>
#include <tuple>

#include "core/cuda/launch.h"
#include "core/cuda/library_products.h"

namespace hybridmoe::cuda {
namespace {

void check_cublas(cublasStatus_t status, const char* what) {
  require(status == CUBLAS_STATUS_SUCCESS, "cuBLASLt: ", what, " failed: ", cublasLtGetStatusString(status));
}

cudaDataType_t type_of(DType dtype) { return dtype == DType::BF16 ? CUDA_R_16BF : CUDA_R_32F; }

// The largest power of two up to 256 that divides the address: algorithms differ in what they need.
unsigned alignment_of(const Tensor& matrix) {
  const auto address = reinterpret_cast<std::uintptr_t>(matrix.data);
  unsigned alignment = 256;
  while (address % alignment != 0) alignment /= 2;
  return alignment;
}

// What an algorithm is chosen by.
using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                       bool, bool, bool, DType, DType, unsigned, unsigned, unsigned>;

// Descriptors and the algorithm of a shape. The library's matrices are column-major: ours, row-major, are
// their transposes, and cᵀ = bᵀ aᵀ.
struct Plan {
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t left = nullptr, right = nullptr, result = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
  bool found = false;

  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    cublasLtMatmulDescDestroy(operation);
    cublasLtMatrixLayoutDestroy(left);
    cublasLtMatrixLayoutDestroy(right);
    cublasLtMatrixLayoutDestroy(result);
  }
};

// A row-major [rows, columns] matrix as the library sees it.
cublasLtMatrixLayout_t layout_of(const Tensor& matrix, std::int64_t rows, std::int64_t columns) {
  cublasLtMatrixLayout_t layout = nullptr;
  check_cublas(cublasLtMatrixLayoutCreate(&layout, type_of(matrix.dtype), static_cast<std::uint64_t>(columns),
                                          static_cast<std::uint64_t>(rows), matrix_stride(matrix)),
               "describing a matrix");
  return layout;
}

}  // namespace

struct LibraryProducts::State {
  static constexpr std::size_t kWorkspace = 32 << 20;

  State(DeviceRuntime& its_device, int its_candidate) : device(its_device), candidate(its_candidate) {
    check_cublas(cublasLtCreate(&library), "starting");
    workspace = device.allocate(kWorkspace);
  }
  ~State() {
    device.release(workspace, kWorkspace);
    cublasLtDestroy(library);
  }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  const Plan& plan_of(const Product& p);
  void choose(const Product& p, Plan& plan) const;

  DeviceRuntime& device;
  int candidate;
  cublasLtHandle_t library = nullptr;
  void* workspace = nullptr;  // of the main stream
  std::map<Key, Plan> plans;
};

void LibraryProducts::State::choose(const Product& p, Plan& plan) const {
  check_cublas(cublasLtMatmulDescCreate(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F),
               "describing a product");
  const cublasOperation_t left = p.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
                          right = p.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
    check_cublas(cublasLtMatmulDescSetAttribute(plan.operation, attribute, &value, sizeof value),
                 "describing a product");
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, left);
  set(CUBLASLT_MATMUL_DESC_TRANSB, right);
  plan.left = p.b_transposed ? layout_of(p.b, p.n, p.k) : layout_of(p.b, p.k, p.n);
  plan.right = p.a_transposed ? layout_of(p.a, p.k, p.m) : layout_of(p.a, p.m, p.k);
  plan.result = layout_of(p.c, p.m, p.n);

  cublasLtMatmulPreference_t preference = nullptr;
  check_cublas(cublasLtMatmulPreferenceCreate(&preference), "choosing an algorithm");
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    check_cublas(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value),
                 "choosing an algorithm");
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspace);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(p.b));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(p.a));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(p.c));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(p.c));
  constexpr int kMost = 16;
  require(candidate < kMost, "cuBLASLt is asked for ", int{kMost}, " algorithms at most");
  cublasLtMatmulHeuristicResult_t proposed[kMost] = {};
  int count = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(library, plan.operation, plan.left, plan.right, plan.result, plan.result,
                                     preference, candidate + 1, proposed, &count);
  cublasLtMatmulPreferenceDestroy(preference);
  const cublasLtMatmulHeuristicResult_t& taken = proposed[candidate < count ? candidate : 0];
  plan.found = status == CUBLAS_STATUS_SUCCESS && count > 0 && taken.state == CUBLAS_STATUS_SUCCESS;
  plan.algorithm = taken.algo;
}

const Plan& LibraryProducts::State::plan_of(const Product& p) {
  const Key key{p.m,
                p.n,
                p.k,
                matrix_stride(p.a),
                matrix_stride(p.b),
                matrix_stride(p.c),
                p.a_transposed,
                p.b_transposed,
                p.accumulate,
                p.a.dtype,
                p.c.dtype,
                alignment_of(p.a),
                alignment_of(p.b),
                alignment_of(p.c)};
  const auto [place, added] = plans.try_emplace(key);
  if (added) choose(p, place->second);
  return place->second;
}

LibraryProducts::LibraryProducts(DeviceRuntime& device, int candidate)
    : state_(std::make_unique<State>(device, candidate)) {}
LibraryProducts::~LibraryProducts() = default;

bool LibraryProducts::multiply(const Product& p, Stream* stream) {
  if (p.grouped != Product::Groups::None || native(stream) != main_stream_of_process()) return false;
  const Plan& plan = state_->plan_of(p);
  if (!plan.found) return false;
  const float one = 1, kept = p.accumulate ? 1 : 0;
  check_cublas(cublasLtMatmul(state_->library, plan.operation, &one, p.b.data, plan.left, p.a.data,
                              plan.right, &kept, p.c.data, plan.result, p.c.data, plan.result,
                              &plan.algorithm, state_->workspace, State::kWorkspace, native(stream)),
               "multiplying");
  return true;
}

}  // namespace hybridmoe::cuda
