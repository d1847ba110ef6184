// bench_cuda [SECONDS]: every operator of the CUDA backend at the sizes of OLMoE-1B-7B (arXiv 2409.02060),
// 32,768 tokens, next to the measured limits of the device; attention through cuDNN as well, where it is.
// Needs neither protobuf nor glog, oneDNN or MPI.
#include <cstdio>
#include <cstdlib>
#include <iostream>

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

}  // namespace
}  // namespace hybridmoe

int main(int argc, char** argv) {
  using namespace hybridmoe;
  try {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 0.2;
    for (const DType type : {DType::BF16, DType::F32}) {
      const auto backend = make_cuda_backend({.compute_type = type});
      const MachineLimits limits{measure_product_limit(*backend, seconds),
                                 measure_copy_limit(*backend, seconds)};
      std::printf("%s, %s: products %.1f TFLOP/s, copying %.2f TB/s\n", backend->name().c_str(),
                  name_of(type), limits.product_flops * 1e-12, limits.copy_bytes * 1e-12);
      std::fflush(stdout);
      OperatorBench bench;
      bench.seconds = seconds;
      // In fp32, which is for checking, a sixteenth of the tokens.
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
      bench_operators(*backend, limits, bench, std::cout);
      if (type == DType::BF16) bench_cudnn_attention(limits, bench);
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_cuda: %s\n", error.what());
    return 1;
  }
}
