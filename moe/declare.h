// Short words for declaring whole (unsplit) parameters of one layer.
#pragma once

#include <string>
#include <utility>

#include "core/parameter_store.h"

namespace hybridmoe {

class Declare {
 public:
  Declare(ParameterStore& parameters, Communicator* replicas, int layer, int stage, bool decay_gains)
      : parameters_(parameters),
        replicas_(replicas),
        layer_(layer),
        stage_(stage),
        decay_gains_(decay_gains) {}

  ParameterStore::Id gain(const std::string& name, std::int64_t width, TensorKind kind) {
    ParameterSpec spec = base(name, {width}, {{0, width, kind}});
    spec.decay = decay_gains_;
    return parameters_.add(std::move(spec));
  }
  ParameterStore::Id matrix(const std::string& name, const Shape& shape, double std, TensorKind kind,
                            bool decay = true) {
    return runs(name, shape, std, {{0, shape.elements(), kind}}, decay);
  }
  ParameterStore::Id runs(const std::string& name, const Shape& shape, double std,
                          std::vector<GlobalRun> runs, bool decay = true) {
    ParameterSpec spec = base(name, shape, std::move(runs));
    spec.init_std = std;
    spec.decay = decay;
    return parameters_.add(std::move(spec));
  }
  // Fused gate and up projections of `experts` experts, [E, 2F, d]: each expert's gate rows, then its up
  // rows.
  ParameterStore::Id gate_up(const std::string& name, std::int64_t experts, std::int64_t hidden,
                             std::int64_t d, double std, TensorKind gate, TensorKind up) {
    std::vector<GlobalRun> pieces;
    for (std::int64_t e = 0; e < experts; ++e) {
      const std::int64_t begin = e * 2 * hidden * d, middle = begin + hidden * d;
      pieces.push_back({begin, middle, gate});
      pieces.push_back({middle, middle + hidden * d, up});
    }
    return runs(name, {experts, 2 * hidden, d}, std, std::move(pieces));
  }

 private:
  ParameterSpec base(const std::string& name, const Shape& shape, std::vector<GlobalRun> pieces) {
    ParameterSpec spec;
    spec.name = name;
    spec.global_shape = spec.local_shape = shape;
    spec.runs = std::move(pieces);
    spec.layer = layer_;
    spec.ready_stage = stage_;
    spec.replicas = replicas_;
    return spec;
  }
  ParameterStore& parameters_;
  Communicator* replicas_;
  int layer_, stage_;
  bool decay_gains_;
};

}  // namespace hybridmoe
