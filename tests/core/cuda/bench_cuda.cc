// bench_cuda [SECONDS]: every operator of the CUDA backend at the sizes of OLMoE-1B-7B (arXiv 2409.02060),
// 32,768 tokens, next to the measured limits of the device; attention through cuDNN as well, where it is, and
// the experts' products by every kernel. Needs neither protobuf nor glog, oneDNN or MPI.
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <sstream>

#include "core/cuda_plugin.h"
#include "core/limits.h"
#include "tools/operator_bench.h"

namespace hybridmoe {
namespace {

void bench_cudnn_attention(const MachineLimits& limits, OperatorBench bench) {
  try {
    const auto backend =
        make_cuda_backend({.compute_type = DType::BF16, .attention = AttentionKernels::Cudnn});
    std::printf("%s\n", backend->name().c_str());
    std::fflush(stdout);
    bench.filter = "attention_";
    bench_operators(*backend, limits, bench, std::cout);
  } catch (const Error& lacking) {
    std::printf("attention through cuDNN is unmeasured: %s\n", lacking.what());
  }
}

// In fp32, which is for checking, a sixteenth of the tokens.
OperatorBench bench_of(DType type, double seconds) {
  OperatorBench bench;
  bench.seconds = seconds;
  bench.size = {.sequences = type == DType::BF16 ? 8 : 1,
                .sequence_length = type == DType::BF16 ? 4096 : 2048,
                .d = 2048,
                .heads = 16,
                .kv_heads = 16,
                .head_dim = 128,
                .experts = 64,
                .top_k = 8,
                .hidden = 1024,
                .vocabulary = 50304,
                .loss_chunk = 4096};
  return bench;
}

MachineLimits limits_of(Backend& backend, double seconds) {
  const MachineLimits limits{measure_product_limit(backend, seconds), measure_copy_limit(backend, seconds)};
  std::printf("%s, %s: products %.1f TFLOP/s, copying %.2f TB/s\n", backend.name().c_str(),
              name_of(backend.compute_type()), limits.product_flops * 1e-12, limits.copy_bytes * 1e-12);
  std::fflush(stdout);
  return limits;
}

// The product of every expert by itself, one behind the other: the library's, of matrices large enough to
// fill the device each. (Over several streams they would overlap at their ends; the backend's library has
// one.)
void each_expert(Backend& backend, const testing::TensorSet& t, const std::string& name,
                 WeightLayout layout) {
  const Tensor weights = t[name.find("weight/") == std::string::npos ? "weight" : "dweight"];
  for (std::int64_t e = 0; e < weights.shape[0]; ++e) {
    const auto begin = static_cast<std::int64_t>(t.get("offsets", e)),
               end = static_cast<std::int64_t>(t.get("offsets", e + 1));
    const Tensor weight = weights.rows(e, e + 1).reshape({weights.shape[1], weights.shape[2]});
    const auto rows = [&](const char* operand) { return t[operand].rows(begin, end); };
    Stream* const stream = backend.main_stream();
    if (name.find("forward/") != std::string::npos) {
      backend.linear_forward({.x = rows("x"), .weight = weight, .y = rows("y"), .layout = layout}, stream);
    } else if (name.find("input/") != std::string::npos) {
      backend.linear_backward_input({.dy = rows("dy"), .weight = weight, .dx = rows("dx"), .layout = layout},
                                    stream);
    } else {
      backend.linear_backward_weight({.x = rows("x"), .dy = rows("dy"), .dweight = weight, .layout = layout},
                                     stream);
    }
  }
}

void bench_experts(Backend& backend, const char* how, bool each, const MachineLimits& limits,
                   const OperatorBench& bench) {
  std::printf("experts' products, %s:\n", how);
  std::fflush(stdout);
  for (testing::OperatorCase& c : testing::benchmark_cases(bench.size)) {
    if (c.name.find("linear_") != 0 || c.name.find("/experts_") == std::string::npos) continue;
    const WeightLayout layout =
        c.name.find("gate_up") != std::string::npos ? WeightLayout::OutputMajor : WeightLayout::InputMajor;
    if (each) {
      c.run = [name = c.name, layout](Backend& b, const testing::TensorSet& t) {
        each_expert(b, t, name, layout);
      };
    }
    bench_case(c, backend, limits, bench, std::cout);
  }
}

void bench_experts(double seconds) {
  const OperatorBench bench = bench_of(DType::BF16, seconds);
  MachineLimits limits;
  {
    const auto backend = make_cuda_backend({.grouped = GroupedKernels::Mma});
    limits = limits_of(*backend, seconds);
    bench_experts(*backend, "mma.sync", false, limits, bench);
    bench_experts(*backend, "cuBLASLt expert by expert", true, limits, bench);
  }
  std::unique_ptr<Backend> backend;
  try {
    backend = make_cuda_backend({.grouped = GroupedKernels::Wgmma});
  } catch (const Error& error) {
    std::printf("experts' products, wgmma: %s\n", error.what());
    return;
  }
  bench_experts(*backend, "wgmma", false, limits, bench);
}

// What the first algorithm that cuBLASLt proposes leaves to the best of its first eight.
void bench_proposals(double seconds) {
  constexpr int kCandidates = 8;
  const OperatorBench bench = bench_of(DType::BF16, seconds);
  struct Times {
    double first = 0, best = 0;
    int which = 0;
  };
  std::map<std::string, Times> times;
  for (int candidate = 0; candidate < kCandidates; ++candidate) {
    const auto backend = make_cuda_backend({.product_candidate = candidate});
    for (const testing::OperatorCase& c : testing::benchmark_cases(bench.size)) {
      if (c.name.find("linear_") != 0 || c.name.find("/experts_") != std::string::npos) continue;
      std::ostringstream nowhere;
      const double taken = bench_case(c, *backend, {1, 1}, bench, nowhere);
      Times& of_case = times[c.name];
      if (candidate == 0) of_case.first = of_case.best = taken;
      if (taken < of_case.best) of_case = {of_case.first, taken, candidate};
    }
  }
  std::printf("dense products: the algorithm that cuBLASLt proposes first, and the fastest of %d:\n",
              kCandidates);
  for (const auto& [name, t] : times)
    std::printf("%-44s %10.1f us, %10.1f us (number %d): %.1f%% slower\n", name.c_str(), t.first * 1e6,
                t.best * 1e6, t.which + 1, 100 * (t.first / t.best - 1));
  std::fflush(stdout);
}

}  // namespace
}  // namespace hybridmoe

int main(int argc, char** argv) {
  using namespace hybridmoe;
  try {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 0.2;
    for (const DType type : {DType::BF16, DType::F32}) {
      const auto backend = make_cuda_backend({.compute_type = type});
      const MachineLimits limits = limits_of(*backend, seconds);
      bench_operators(*backend, limits, bench_of(type, seconds), std::cout);
      if (type == DType::BF16) bench_cudnn_attention(limits, bench_of(type, seconds));
    }
    bench_experts(seconds);
    bench_proposals(seconds / 2);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_cuda: %s\n", error.what());
    return 1;
  }
}
