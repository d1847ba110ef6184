// A device that does nothing, for tests of what is asked of one: they override what they look at.
#pragma once

#include "core/cuda/device.h"

namespace hybridmoe::cuda {

class IdleDevice : public DeviceRuntime {
 public:
  std::string name() const override { return "an idle device"; }
  Device kind() const override { return Device::CUDA; }
  int processors() const override { return 1; }
  bool runs_wgmma() const override { return false; }
  void* allocate(std::size_t) override { return nullptr; }
  void release(void*, std::size_t) noexcept override {}
  void* allocate_shared(std::size_t) override { return nullptr; }
  void release_shared(void*, std::size_t) noexcept override {}
  std::int64_t granule() const override { return 0; }
  void* reserve(std::size_t) override { return nullptr; }
  void map(void*, std::size_t) override {}
  void release_reserved(void*, std::size_t) noexcept override {}
  Stream* main_stream() override { return nullptr; }
  bool finished(Stream*) override { return true; }
  void synchronize(Stream*) override {}
  void mark(Stream*) override {}
  bool reached_mark() override { return true; }
  void await_mark() override {}
  void copy(void*, const void*, std::size_t, Stream*) override {}
  void fill_zero(void*, std::size_t, Stream*) override {}
  bool multiply(const Product&, Stream*) override { return false; }
  bool attention_forward(const AttentionForward&, float*, Stream*) override { return false; }
  bool attention_backward(const AttentionBackward&, Stream*) override { return false; }
};

}  // namespace hybridmoe::cuda
