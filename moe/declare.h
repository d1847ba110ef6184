// Short words for declaring the parameters of one layer, whole or this rank's part of them.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/parameter_store.h"

namespace hybridmoe {

// The i-th of n parts of `total` things, which need not divide.
struct Part {
  std::int64_t begin = 0, end = 0;
  std::int64_t size() const { return end - begin; }
};
inline Part part_of(std::int64_t total, std::int64_t i, std::int64_t n) {
  return {total * i / n, total * (i + 1) / n};
}

// Rows [begin, end) of a parameter seen as a matrix of rows as wide as its last extent.
struct RowPiece {
  std::int64_t begin = 0, end = 0;
  TensorKind kind = TensorKind::Qkv;
};

class Declare {
 public:
  Declare(ParameterStore& parameters, int layer, int stage, bool decay_gains)
      : parameters_(parameters), layer_(layer), stage_(stage), decay_gains_(decay_gains) {}

  // Elements `part` of a gain [width].
  ParameterStore::Id gain(const std::string& name, std::int64_t width, const Part& part, TensorKind kind,
                          Communicator* replicas) {
    ParameterSpec spec = base(name, {width}, {part.size()}, replicas);
    spec.runs = {{part.begin, part.end, kind}};
    spec.decay = decay_gains_;
    return parameters_.add(std::move(spec));
  }
  ParameterStore::Id gain(const std::string& name, std::int64_t width, TensorKind kind,
                          Communicator* replicas) {
    return gain(name, width, {0, width}, kind, replicas);
  }

  struct Matrix {
    std::string name;
    Shape shape;                   // of the whole parameter
    Shape local_shape;             // of the pieces
    std::vector<RowPiece> pieces;  // in the order in which they are stored
    double init_std = 0;
    Communicator* replicas = nullptr;
    bool decay = true;
    std::string part = {};
  };
  ParameterStore::Id matrix(const Matrix& matrix) {
    const std::int64_t width = matrix.shape[matrix.shape.rank - 1];
    ParameterSpec spec = base(matrix.name, matrix.shape, matrix.local_shape, matrix.replicas);
    spec.part = matrix.part;
    for (const RowPiece& piece : matrix.pieces) {
      const GlobalRun run{piece.begin * width, piece.end * width, piece.kind};
      GlobalRun* const last = spec.runs.empty() ? nullptr : &spec.runs.back();
      if (last != nullptr && last->end == run.begin && last->kind == run.kind) {
        last->end = run.end;
      } else {
        spec.runs.push_back(run);
      }
    }
    spec.init_std = matrix.init_std;
    spec.decay = matrix.decay;
    return parameters_.add(std::move(spec));
  }

 private:
  ParameterSpec base(const std::string& name, const Shape& shape, const Shape& local_shape,
                     Communicator* replicas) {
    ParameterSpec spec;
    spec.name = name;
    spec.global_shape = shape;
    spec.local_shape = local_shape;
    spec.layer = layer_;
    spec.ready_stage = stage_;
    spec.replicas = replicas;
    return spec;
  }
  ParameterStore& parameters_;
  int layer_, stage_;
  bool decay_gains_;
};

}  // namespace hybridmoe
