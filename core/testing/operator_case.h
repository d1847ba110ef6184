// A case is one operator at one shape, described once: its operands, how to run it, and how much work it is.
// From that come the comparison of any backend with the reference, the check of a backward operator against
// finite differences of its forward operator (checks.h), and a benchmark (BoundCase). This library knows
// neither a test framework nor a particular backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/random.h"

namespace hybridmoe::testing {

// Types of core/operators/common.h; Compute and Statistics depend on the backend.
enum class ElementType { Compute, Statistics, Double, Int32, Int64 };
DType dtype_in(const Backend& backend, ElementType type);

enum class Role {
  Input,       // filled by the case; must not change
  Derived,     // an input that `prepare` computes from the others, as a forward pass would have left it
  Output,      // "=": poisoned before the run
  Accumulate,  // "+=" and "max=": filled before the run
  Scratch,     // workspace, and what only `prepare` and `loss` use: poisoned, not compared
};

// Value of element i; the stream of random numbers belongs to the operand.
using Fill = std::function<double(const Random&, std::int64_t i)>;
Fill normal(double scale = 1, double mean = 0);
Fill constant(double value);
Fill values(std::vector<double> list);
Fill below(std::uint64_t n);  // integers in [0, n)

struct Operand {
  std::string name;
  ElementType type = ElementType::Compute;
  Role role = Role::Input;
  Shape shape;
  Fill fill = {};
  std::int64_t row_gap = 0;   // elements between the rows of a matrix
  std::string alias = {};     // uses the memory of that operand where both have one type
  std::int64_t defined = -1;  // only the first elements have a defined value; -1: all
  // What an error may grow with, for the tolerance (see checks.h).
  double length = 1;      // terms summed up in one value
  int roundings = 0;      // how many times what it depends on was rounded to the compute type on the way
  double magnitude = 0;   // of the terms, where they may cancel in all elements at once
  bool consumed = false;  // an input that the operator may use as workspace
  double touched = 1;     // share of the memory that the operator must move

  Operand& gap(std::int64_t elements) { return row_gap = elements, *this; }
  Operand& alias_of(const std::string& other) { return alias = other, *this; }
  Operand& define_first(std::int64_t elements) { return defined = elements, *this; }
  Operand& error(double terms, int rounded = 0) { return length = terms, roundings = rounded, *this; }
  Operand& terms_of(double size) { return magnitude = size, *this; }
  Operand& consume() { return consumed = true, *this; }
  Operand& touch(double share) { return touched = share, *this; }
};

class TensorSet;

struct OperatorCase {
  using Run = std::function<void(Backend&, const TensorSet&)>;

  explicit OperatorCase(std::string case_name) : name(std::move(case_name)) {}

  std::string name;  // "linear_forward/33x7x5": operator/shape
  std::vector<Operand> operands;
  Run run;
  Run prepare = {};  // computes the derived operands; deterministic, may be called again
  double flops = 0;  // multiplications and additions that the result needs; causal attention counts half

  // For a backward operator: a scalar function of the inputs, read from the tensors (on the host, f64) after
  // `prepare`, and which operand is its gradient with respect to which input.
  std::function<double(const TensorSet&)> loss = {};
  struct Gradient {
    std::string input, gradient;
  };
  std::vector<Gradient> gradients = {};

  // Where a discrete choice may fall either way within rounding: checks the choice in `actual`, makes
  // `expected` follow it, and returns what is wrong with it ("" when nothing is). `tolerance` is relative.
  std::function<std::string(TensorSet& expected, const TensorSet& actual, double tolerance)> reconcile = {};

  // The references stay valid until the next operand is added.
  Operand& input(const std::string& operand, ElementType type, const Shape& shape, Fill fill);
  Operand& derived(const std::string& operand, ElementType type, const Shape& shape);
  Operand& output(const std::string& operand, ElementType type, const Shape& shape);
  Operand& accumulate(const std::string& operand, ElementType type, const Shape& shape, Fill fill = normal());
  Operand& scratch(const std::string& operand, ElementType type, const Shape& shape);

 private:
  Operand& append(Operand operand);
};

// Bytes that the operator must move at least: inputs once, outputs once, accumulated outputs twice.
double moved_bytes(const OperatorCase& c, const Backend& backend);

// A backend to run cases on.
struct Target {
  Backend* backend;
  explicit Target(Backend& target_backend) : backend(&target_backend) {}
  // Between its memory and the host's; done on return.
  void copy(void* to, const void* from, std::size_t bytes) const;
};

// The operands of a case in a backend's memory and types, with an image of each on the host. Every byte that
// no fill writes is 0xff: NaN in all floating-point types, -1 in integers. Behind each operand lies a margin.
class TensorSet {
 public:
  TensorSet(const OperatorCase& c, const Target& target);
  ~TensorSet();
  TensorSet(const TensorSet&) = delete;
  TensorSet& operator=(const TensorSet&) = delete;

  // The tensor on the backend's device; empty when the case has no such operand.
  Tensor operator[](const std::string& operand) const;
  bool shares_memory(const std::string& operand) const;  // with another operand

  // Element i, row by row, of the host image.
  double get(const std::string& operand, std::int64_t i) const;
  void set(const std::string& operand, std::int64_t i, double value);
  // The element's bits, for comparisons to the bit.
  std::vector<unsigned char> bytes_of(const std::string& operand) const;
  // Whether the gaps between rows and the margin still hold what they held at first.
  bool margins_intact(const std::string& operand) const;

  void fill_inputs();  // all fills into the images
  void assign_inputs(
      const TensorSet& other);  // images of inputs, derived and accumulated operands, converted
  void upload();
  void download();

 private:
  struct Slot {
    const Operand* operand = nullptr;
    DType dtype = DType::F64;
    std::vector<unsigned char> image;
    void* memory = nullptr;
    int alias = -1;  // slot whose memory is used
    bool shared = false;
  };
  int find(const std::string& operand) const;  // -1: no such operand
  const Slot& storage(int slot) const { return slots_[slots_[slot].alias < 0 ? slot : slots_[slot].alias]; }
  std::int64_t position(const Slot& slot, std::int64_t i) const;  // byte of an element in the image
  void put(Slot& slot, std::int64_t i, double value);

  Target target_;
  std::string stream_;
  std::vector<Slot> slots_;
};

// A case bound to a backend, ready to be timed: filled, prepared on that backend itself.
class BoundCase {
 public:
  BoundCase(const OperatorCase& c, const Target& target);
  // So many times, one behind the other; the work is done on return. Accumulated operands keep growing.
  void run(int times = 1);

 private:
  OperatorCase case_;
  Target target_;
  TensorSet tensors_;
};

}  // namespace hybridmoe::testing
