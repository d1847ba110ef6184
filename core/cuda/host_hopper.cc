#include "core/cuda/host_hopper.h"

#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "core/cuda/hopper.h"
#include "core/error.h"

namespace hybridmoe::cuda::host {
namespace {

constexpr int kM = 64, kN = 256, kK = 16;      // of a product
constexpr std::uint32_t kFirstAddress = 0x80;  // of shared memory: as the executor aligns it
constexpr int kRowBytes = 128;                 // of the swizzle

// The 128-byte swizzle: which 16 bytes of a row of 128 are meant depends on the row.
std::uint32_t swizzled(std::uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

std::byte* at_address(std::uint32_t address, std::size_t bytes) {
  require(address >= kFirstAddress && address - kFirstAddress + bytes <= shared_bytes(),
          "an address outside of shared memory: ", address);
  return static_cast<std::byte*>(shared_memory()) + (address - kFirstAddress);
}

struct BoxCopy {
  std::uint32_t to;
  TensorMap map;
  std::array<int, 3> at;

  int bytes() const { return map.box[0] * map.box[1] * 2; }
  void arrive() const;
};

struct Phases {
  int arrivals = 0, missing = 0;  // of a phase, of the present one
  std::int64_t bytes = 0;         // expected and not yet arrived
  std::uint32_t parity = 0;       // of the present phase
  int waiting = 0;                // threads
  bool fenced = false;
  std::vector<BoxCopy> copies;

  void close_if_complete() {
    if (missing > 0 || bytes != 0) return;
    parity ^= 1;
    missing = arrivals;
  }
};

struct Descriptors {
  std::uint64_t a, b;
  bool a_transposed, b_transposed, add;
  bool operator==(const Descriptors&) const = default;
};

// The operands of a product as numbers.
struct Operands {
  std::array<float, kM * kK> a;  // [m][k]
  std::array<float, kK * kN> b;  // [k][n]
};

// A product that a warpgroup has begun; read when its first thread issues it.
struct Product {
  Descriptors descriptors;
  std::unique_ptr<Operands> issued;
  bool last_of_group = false;
};

struct Issuer {
  float* sum = nullptr;  // of the products under way
  std::array<float, 128> held;
  std::int64_t issued = 0, committed = 0, committed_groups = 0, done_groups = 0;
  bool fenced = false, waiting = false;
  std::vector<void*> clears;
};

struct Warpgroup {
  std::deque<Product> products;  // under way
  std::int64_t done = 0;         // products that are not in the list any more
};

struct NamedBarrier {
  int come = 0, times = 0;
};

class Hopper final : public Background {
 public:
  void block_begins() override {
    barriers.clear();
    named.clear();
    warpgroups = std::vector<Warpgroup>(static_cast<std::size_t>(block_threads() / kWarpgroup));
    issuers = std::vector<Issuer>(static_cast<std::size_t>(block_threads()));
  }
  bool go_on() override;
  void block_ends() override;
  void finish_group(int warpgroup);

  Phases& phases(std::uint64_t* barrier) {
    const auto found = barriers.find(barrier);
    require(found != barriers.end(), "a barrier that was not initialised");
    return found->second;
  }
  Issuer& issuer() { return issuers[thread_index()]; }
  Warpgroup& warpgroup() { return warpgroups[thread_index() / kWarpgroup]; }

  std::map<std::uint64_t*, Phases> barriers;
  std::map<int, NamedBarrier> named;
  std::vector<Warpgroup> warpgroups;
  std::vector<Issuer> issuers;
};

Hopper& hopper() {
  thread_local Hopper instance;
  attach(instance);
  return instance;
}

void BoxCopy::arrive() const {
  for (int y = 0; y < map.box[1]; ++y) {
    for (int x = 0; x < map.box[0]; ++x) {
      const std::int64_t column = at[0] + x, row = at[1] + y;
      const bool inside = column >= 0 && column < map.size[0] && row >= 0 && row < map.size[1] &&
                          at[2] >= 0 && at[2] < map.size[2];
      std::byte* place = at_address(swizzled(to + y * kRowBytes + 2 * x), 2);
      if (!inside) {
        std::memset(place, 0, 2);
        continue;
      }
      const auto* from =
          static_cast<const std::byte*>(map.base) + at[2] * map.stride[1] + row * map.stride[0] + 2 * column;
      std::memcpy(place, from, 2);
    }
  }
}

float element(std::uint32_t address) {
  std::uint16_t half;
  std::memcpy(&half, at_address(address, 2), 2);
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The fields of a matrix descriptor.
struct Layout {
  std::uint32_t start, leading, stride;
  bool transposed;

  Layout(std::uint64_t descriptor, bool is_transposed) : transposed(is_transposed) {
    const auto field = [&](int bit) { return static_cast<std::uint32_t>(descriptor >> bit & 0x3fff) << 4; };
    start = field(0), leading = field(16), stride = field(32);
    require(descriptor >> 62 == 1, "a matrix descriptor without the 128-byte swizzle");
    require((descriptor >> 49 & 7) == 0, "a matrix descriptor with a base offset");
  }
  // Of element (row, k), row being m or n. As stored rows lie along k, 128 bytes each; transposed they lie
  // along m or n, 64 elements, then the next 64 of them `leading` bytes further.
  std::uint32_t address(int row, int k) const {
    const int offset = transposed ? row % 64 * 2 + k % 8 * kRowBytes : row % 8 * kRowBytes + 2 * k;
    const std::uint32_t outer = transposed ? row / 64 * leading + k / 8 * stride : row / 8 * stride;
    return swizzled(start + outer + offset);
  }
};

std::unique_ptr<Operands> read_operands(const Descriptors& d) {
  auto operands = std::make_unique<Operands>();
  const Layout a(d.a, d.a_transposed), b(d.b, d.b_transposed);
  for (int m = 0; m < kM; ++m)
    for (int k = 0; k < kK; ++k) operands->a[m * kK + k] = element(a.address(m, k));
  for (int n = 0; n < kN; ++n)
    for (int k = 0; k < kK; ++k) operands->b[k * kN + n] = element(b.address(n, k));
  return operands;
}

// sum [64, 256] = or += a · b, in the fragments of the accumulator: lane l of warp w holds, for rows 16 w + l
// / 4 and 8 further, columns 8 j + 2 (l % 4) and the next at 4 j and 4 j + 2.
void add_product(const Operands& operands, bool add, Issuer* threads) {
  std::array<float, kN> row;
  for (int m = 0; m < kM; ++m) {
    const auto place = [&](int n) -> float& {
      const int thread = m / 16 * 32 + m % 8 * 4 + n % 8 / 2;
      return threads[thread].held[n / 8 * 4 + m % 16 / 8 * 2 + n % 2];
    };
    for (int n = 0; n < kN; ++n) row[n] = add ? place(n) : 0;
    for (int k = 0; k < kK; ++k) {
      const float left = operands.a[m * kK + k];
      const float* right = &operands.b[k * kN];
      for (int n = 0; n < kN; ++n) row[n] += left * right[n];
    }
    for (int n = 0; n < kN; ++n) place(n) = row[n];
  }
}

// The products of the oldest group, for all threads of the warpgroup.
void Hopper::finish_group(int index) {
  Warpgroup& group = warpgroups[index];
  Issuer* threads = &issuers[index * kWarpgroup];
  for (bool last = false; !last;) {
    const Product product = std::move(group.products.front());
    group.products.pop_front();
    ++group.done;
    last = product.last_of_group;
    const auto now = read_operands(product.descriptors);
    require(std::memcmp(now.get(), product.issued.get(), sizeof(Operands)) == 0,
            "shared memory changed while a product read it");
    add_product(*now, product.descriptors.add, threads);
  }
  for (int t = 0; t < kWarpgroup; ++t) {
    Issuer& thread = threads[t];
    ++thread.done_groups;
    for (int i = 0; i < 128; ++i) {
      std::uint32_t bits;
      std::memcpy(&bits, &thread.sum[i], 4);
      require(bits == 0xffffffffu, "an accumulator was changed while products were under way");
    }
    if (thread.issued > group.done) continue;  // more products are to come
    std::memcpy(thread.sum, thread.held.data(), sizeof thread.held);
    thread.sum = nullptr;
  }
}

bool Hopper::go_on() {
  for (int w = 0; w < std::ssize(warpgroups); ++w) {
    Issuer* threads = &issuers[w * kWarpgroup];
    int waiting = 0;
    for (int t = 0; t < kWarpgroup; ++t) waiting += threads[t].waiting;
    if (waiting == 0) continue;
    // One warp may be ahead of the others, but all must issue the same.
    bool all = waiting == kWarpgroup;
    for (int t = 0; t < kWarpgroup; ++t) all = all && threads[t].committed == threads[0].committed;
    if (!all) continue;
    finish_group(w);
    return true;
  }
  for (auto& [address, phases] : barriers) {
    if (phases.waiting == 0 || phases.copies.empty()) continue;
    for (const BoxCopy& copy : phases.copies) {
      copy.arrive();
      phases.bytes -= copy.bytes();
    }
    phases.copies.clear();
    phases.close_if_complete();
    return true;
  }
  return false;
}

void Hopper::block_ends() {
  for (const auto& [address, phases] : barriers) {
    require(phases.copies.empty(), "a block returned before its copies had arrived");
  }
  for (const Warpgroup& group : warpgroups) {
    require(group.products.empty(), "a block returned before it waited for its products");
  }
}

}  // namespace

std::uint32_t shared_address(const void* memory) {
  const auto offset = static_cast<const std::byte*>(memory) - static_cast<const std::byte*>(shared_memory());
  if (offset < 0 || static_cast<std::size_t>(offset) > shared_bytes()) return 0xffffffffu;
  return kFirstAddress + static_cast<std::uint32_t>(offset);
}

void init_barrier(std::uint64_t* barrier, int arrivals) {
  require(shared_address(barrier) % 8 == 0, "a barrier that is not 8-byte aligned in shared memory");
  Phases phases;
  phases.arrivals = phases.missing = arrivals;
  require(hopper().barriers.emplace(barrier, phases).second, "a barrier was initialised twice");
}

void fence_barrier_init() {
  for (auto& [address, phases] : hopper().barriers) phases.fenced = true;
}

void arrive(std::uint64_t* barrier, int expected_bytes) {
  Phases& phases = hopper().phases(barrier);
  require(phases.missing > 0, "more arrivals at a barrier than its ", phases.arrivals);
  --phases.missing;
  phases.bytes += expected_bytes;
  phases.close_if_complete();
}

void wait_for_phase(std::uint64_t* barrier, std::uint32_t parity) {
  Phases& phases = hopper().phases(barrier);
  ++phases.waiting;
  wait_until([&] { return phases.parity != parity; });
  --phases.waiting;
}

void sync_threads(int id, int threads) {
  NamedBarrier& barrier = hopper().named[id];
  const int before = barrier.times;
  if (++barrier.come == threads) {
    barrier.come = 0;
    ++barrier.times;
    return;
  }
  wait_until([&] { return barrier.times != before; });
}

void copy_box(void* to, const TensorMap& map, const int (&at)[3], std::uint64_t* barrier) {
  Phases& phases = hopper().phases(barrier);
  require(phases.fenced, "a copy uses a barrier whose initialisation was not fenced");
  const std::uint32_t address = shared_address(to);
  require(address % kRowBytes == 0, "a copy to an address that is no multiple of 128");
  const BoxCopy copy{address, map, {at[0], at[1], at[2]}};
  std::memset(at_address(address, static_cast<std::size_t>(copy.bytes())), 0xff,
              static_cast<std::size_t>(copy.bytes()));
  phases.copies.push_back(copy);
}

void clear_chunk(void* to) {
  require(shared_address(to) % 16 == 0, "a chunk that is not 16-byte aligned in shared memory");
  hopper().issuer().clears.push_back(to);
}

void fence_async_proxy() {
  for (void* chunk : hopper().issuer().clears) std::memset(chunk, 0, 16);
  hopper().issuer().clears.clear();
}

void fence_accumulators() { hopper().issuer().fenced = true; }

void multiply_m64n256k16(float (&sum)[128], std::uint64_t a, std::uint64_t b, bool a_transposed,
                         bool b_transposed, bool add) {
  Issuer& thread = hopper().issuer();
  Warpgroup& group = hopper().warpgroup();
  require(thread.fenced, "a product whose accumulators and registers were not fenced");
  require(thread.sum == nullptr || thread.sum == sum, "products with two accumulators are under way");
  if (thread.sum == nullptr) {
    thread.sum = sum;
    std::memcpy(thread.held.data(), sum, sizeof sum);
    std::memset(sum, 0xff, sizeof sum);
  }
  const Descriptors descriptors{a, b, a_transposed, b_transposed, add};
  const auto index = static_cast<std::size_t>(thread.issued++ - group.done);
  if (index == group.products.size()) {
    group.products.push_back({descriptors, read_operands(descriptors)});
  } else {
    require(group.products[index].descriptors == descriptors, "threads of a warpgroup issue other products");
  }
}

void commit_products() {
  Issuer& thread = hopper().issuer();
  require(thread.issued > thread.committed, "a group of no products");
  thread.committed = thread.issued;
  thread.fenced = false;
  ++thread.committed_groups;
  Product& last =
      hopper().warpgroup().products[static_cast<std::size_t>(thread.issued - 1 - hopper().warpgroup().done)];
  last.last_of_group = true;
}

void wait_for_products(int left) {
  Issuer& thread = hopper().issuer();
  require(thread.issued == thread.committed, "a wait for products that were not committed");
  thread.waiting = thread.committed_groups - thread.done_groups > left;
  wait_until([&] { return thread.committed_groups - thread.done_groups <= left; });
  thread.waiting = false;
}

}  // namespace hybridmoe::cuda::host

namespace hybridmoe::cuda {

TensorMap make_tensor_map(const Boxes& boxes) {
  const auto address = reinterpret_cast<std::uintptr_t>(boxes.data);
  require(address % 16 == 0 && boxes.row_stride % 8 == 0 && boxes.matrix_stride % 8 == 0,
          "a map of memory at ", address, ", strides ", boxes.row_stride, " and ", boxes.matrix_stride,
          " elements: multiples of 16 bytes were expected");
  require(boxes.columns > 0 && boxes.rows > 0 && boxes.matrices > 0 && boxes.columns <= boxes.row_stride &&
              boxes.rows * boxes.row_stride <= boxes.matrix_stride && boxes.box_rows > 0 &&
              boxes.box_rows <= 256,
          "a map of ", boxes.matrices, " matrices [", boxes.rows, ", ", boxes.columns, "], boxes of ",
          boxes.box_rows, " rows");
  return {.base = boxes.data,
          .size = {boxes.columns, boxes.rows, boxes.matrices},
          .stride = {2 * boxes.row_stride, 2 * boxes.matrix_stride},
          .box = {kSwizzleBytes / 2, boxes.box_rows}};
}

}  // namespace hybridmoe::cuda
