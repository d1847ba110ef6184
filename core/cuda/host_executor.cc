#include "core/cuda/host_executor.h"

#include <array>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <vector>

#include "core/cuda/host_fibre.h"
#include "core/error.h"

namespace hybridmoe::cuda::host {
namespace {

constexpr int kLanes = 32, kMostThreads = 1024;
constexpr std::size_t kStackBytes = 128 << 10, kMostShared = 227 << 10;
// Shared memory begins here behind a multiple of 1024 bytes: a kernel may count on the 128 alone.
constexpr std::size_t kSharedAlignment = 128, kSharedPeriod = 1024;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// All guarded memory of the process.
struct Guarded {
  std::mutex mutex;
  std::map<void*, std::size_t> ranges;
  int open = 0;

  void protect(int protection) {
    for (const auto& [memory, bytes] : ranges)
      require(mprotect(memory, bytes, protection) == 0, "cannot change the protection of ", bytes, " bytes");
  }
};
Guarded& guarded() {
  static Guarded all;
  return all;
}

// What a thread waits for: that everybody of its warp or block has come as often as it, or a condition.
enum class State { Ready, InWarp, InBlock, InCondition, Done };

struct Fibre {
  Place place;
  bool alive = false;  // it waits for the next block where it has ended this one
  State state = State::Done;
  std::deque<std::vector<Copy>> groups;  // committed copies
  std::vector<Copy> started;
  const std::function<bool()>* condition = nullptr;
};

struct Warp {
  int waiting = 0;
  int parity = 0;  // the half of `slots` in use: a fast lane may be one exchange ahead
  alignas(64) std::array<std::byte, 2 * kLanes * kLaneBytes> slots;
};

class Executor {
 public:
  Executor()
      : stacks_(static_cast<char*>(mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))),
        fibres_(kMostThreads),
        warps_(kMostThreads / kLanes) {
    require(stacks_ != MAP_FAILED, "no memory for the stacks of the host executor");
  }
  ~Executor() { munmap(stacks_, kMostThreads * kStackBytes); }
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  void run(const Grid& grid, const std::function<void()>& kernel);
  void run_block();
  [[noreturn]] void enter() noexcept;  // a fibre's first and only function
  void wait(State state);

  Grid grid;
  std::int64_t x = 0, y = 0;
  int current = 0;
  std::vector<std::byte> shared;
  std::byte* shared_begin() {
    const auto address = reinterpret_cast<std::uintptr_t>(shared.data());
    return shared.data() + (kSharedPeriod - address % kSharedPeriod) + kSharedAlignment;
  }
  Background* background = nullptr;
  Fibre& fibre() { return fibres_[current]; }
  Warp& warp() { return warps_[current / kLanes]; }

 private:
  void start(int thread);
  bool release_warp(int warp);
  bool release_block();
  bool release_conditions();
  [[noreturn]] void stuck() const;

  char* stacks_;
  std::vector<Fibre> fibres_;
  std::vector<Warp> warps_;
  Place scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  std::exception_ptr failure_;
  bool running_ = false;
};

Executor& executor() {
  thread_local Executor instance;
  return instance;
}

void entry() { executor().enter(); }

void Executor::start(int thread) {
  Fibre& it = fibres_[thread];
  // One that was left in the middle of a block that failed begins anew.
  const bool goes_on = it.alive && it.state == State::Done;
  it.state = State::Ready;
  it.groups.clear();
  it.started.clear();
  if (goes_on) return;
  it.alive = true;
  it.place.begin(entry, stacks_ + thread * kStackBytes, kStackBytes);
}

void Executor::enter() noexcept {
  entered_from(scheduler_);
  for (;;) {
    try {
      (*kernel_)();
      for (const std::vector<Copy>& group : fibre().groups)
        require(group.empty(), "thread ", current, " returned before it waited for its copies");
    } catch (...) {
      if (!failure_) failure_ = std::current_exception();
    }
    wait(State::Done);
  }
}

void Executor::wait(State state) {
  fibre().state = state;
  switch_to(fibre().place, scheduler_);
}

// A wait ends when all that it needs are in the same wait.
bool Executor::release_warp(int warp) {
  Fibre* lanes = &fibres_[warp * kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes[lane].state != State::InWarp) return false;
  }
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane].state = State::Ready;
  return true;
}

bool Executor::release_block() {
  for (int thread = 0; thread < grid.threads; ++thread) {
    if (fibres_[thread].state != State::InBlock) return false;
  }
  for (int thread = 0; thread < grid.threads; ++thread) fibres_[thread].state = State::Ready;
  return true;
}

bool Executor::release_conditions() {
  bool any = false;
  for (int thread = 0; thread < grid.threads; ++thread) {
    Fibre& it = fibres_[thread];
    if (it.state != State::InCondition || !(*it.condition)()) continue;
    it.state = State::Ready;
    any = true;
  }
  return any;
}

void Executor::stuck() const {
  int done = 0, in_warp = 0, in_block = 0, in_condition = 0;
  for (int thread = 0; thread < grid.threads; ++thread) {
    done += fibres_[thread].state == State::Done;
    in_warp += fibres_[thread].state == State::InWarp;
    in_block += fibres_[thread].state == State::InBlock;
    in_condition += fibres_[thread].state == State::InCondition;
  }
  throw Error(cat("block (", x, ", ", y, ") of ", grid.threads, " threads cannot go on: ", in_warp,
                  " threads wait in a warp operation, ", in_block, " at a block barrier and ", in_condition,
                  " for a phase or a product, ", done, " have returned"));
}

void Executor::run_block() {
  std::memset(shared.data(), 0xff, shared.size());
  for (Warp& warp : warps_) warp.waiting = warp.parity = 0;
  if (background != nullptr) background->block_begins();
  for (int thread = 0; thread < grid.threads; ++thread) start(thread);
  for (;;) {
    bool ran = false, all_done = true;
    for (int warp = 0; warp < grid.threads / kLanes; ++warp) {
      // A warp runs on by itself for as long as it can.
      do {
        for (current = warp * kLanes; current < (warp + 1) * kLanes; ++current) {
          if (fibre().state != State::Ready) continue;
          ran = true;
          switch_to(scheduler_, fibre().place);
          if (failure_) std::rethrow_exception(failure_);
        }
      } while (release_warp(warp));
      for (int lane = 0; lane < kLanes; ++lane) {
        all_done = all_done && fibres_[warp * kLanes + lane].state == State::Done;
      }
    }
    if (all_done) break;
    if (release_block() || release_conditions() || ran) continue;
    if (background == nullptr || !background->go_on()) stuck();
  }
  if (background != nullptr) background->block_ends();
}

void Executor::run(const Grid& whole, const std::function<void()>& kernel) {
  require(!running_, "a kernel cannot launch a kernel");
  require(whole.threads > 0 && whole.threads <= kMostThreads && whole.threads % kLanes == 0, "a block of ",
          whole.threads, " threads: a multiple of 32 up to 1024 was expected");
  require(whole.shared_bytes <= kMostShared, "a block of ", whole.shared_bytes,
          " bytes of shared memory: at most ", kMostShared, " were expected");
  require(whole.x > 0 && whole.x <= 0x7fffffff && whole.y > 0 && whole.y <= 0xffff, "a grid of ", whole.x,
          " x ", whole.y, " blocks");
  grid = whole;
  kernel_ = &kernel;
  failure_ = nullptr;
  background = nullptr;
  shared.resize(whole.shared_bytes + kSharedPeriod + kSharedAlignment);
  running_ = true;
  const OpenMemory open;
  try {
    for (y = 0; y < whole.y; ++y)
      for (x = 0; x < whole.x; ++x) run_block();
  } catch (...) {
    running_ = false;
    throw;
  }
  running_ = false;
}

}  // namespace

void guard(void* memory, std::size_t bytes) {
  Guarded& all = guarded();
  const std::lock_guard lock(all.mutex);
  all.ranges[memory] = bytes;
  if (all.open == 0) all.protect(PROT_NONE);
}

void forget(void* memory, std::size_t bytes) {
  Guarded& all = guarded();
  const std::lock_guard lock(all.mutex);
  all.ranges.erase(all.ranges.lower_bound(memory),
                   all.ranges.lower_bound(static_cast<char*>(memory) + bytes));
}

OpenMemory::OpenMemory() {
  Guarded& all = guarded();
  const std::lock_guard lock(all.mutex);
  if (all.open++ == 0) all.protect(PROT_READ | PROT_WRITE);
}

OpenMemory::~OpenMemory() {
  Guarded& all = guarded();
  const std::lock_guard lock(all.mutex);
  if (--all.open == 0) all.protect(PROT_NONE);
}

void run(const Grid& grid, const std::function<void()>& kernel) { executor().run(grid, kernel); }

int thread_index() { return executor().current; }
int block_threads() { return executor().grid.threads; }
std::int64_t block_x() { return executor().x; }
std::int64_t block_y() { return executor().y; }
std::int64_t grid_x() { return executor().grid.x; }
void* shared_memory() { return executor().shared_begin(); }
std::size_t shared_bytes() { return executor().grid.shared_bytes; }
void sync_block() { executor().wait(State::InBlock); }

void wait_until(const std::function<bool()>& done) {
  if (done()) return;
  executor().fibre().condition = &done;
  executor().wait(State::InCondition);
}

void attach(Background& background) {
  Executor& all = executor();
  if (all.background == &background) return;
  all.background = &background;
  background.block_begins();
}

const std::byte* exchange_in_warp(const void* value, int bytes) {
  require(bytes <= kLaneBytes, "a lane gives at most ", int{kLaneBytes}, " bytes, not ", bytes);
  Executor& all = executor();
  Warp& warp = all.warp();
  const int lane = all.current % kLanes;
  // The last exchange's half stays readable until every lane has come to this one.
  std::byte* half = warp.slots.data() + warp.parity * kLanes * kLaneBytes;
  std::memcpy(half + lane * kLaneBytes, value, static_cast<std::size_t>(bytes));
  if (++warp.waiting == kLanes) {
    warp.waiting = 0;
    warp.parity ^= 1;
  }
  all.wait(State::InWarp);
  return half;
}

void start_copy(void* to, const void* from, int bytes) {
  std::memset(to, 0xff, static_cast<std::size_t>(bytes));
  executor().fibre().started.push_back({to, from, bytes});
}

void commit_copies() {
  Fibre& fibre = executor().fibre();
  fibre.groups.push_back(std::move(fibre.started));
  fibre.started.clear();
}

void wait_for_copies(int left) {
  Fibre& fibre = executor().fibre();
  while (std::ssize(fibre.groups) > left) {
    for (const Copy& copy : fibre.groups.front()) {
      if (copy.from == nullptr) {
        std::memset(copy.to, 0, static_cast<std::size_t>(copy.bytes));
      } else {
        std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.bytes));
      }
    }
    fibre.groups.pop_front();
  }
}

void load_matrices(const void* row, bool transposed, std::uint32_t (&to)[4]) {
  const std::byte* lanes = exchange_in_warp(&row, sizeof row);
  const int lane = executor().current % kLanes;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto element = [&](int r, int c) {
      const std::uint16_t* from;
      std::memcpy(&from, lanes + (8 * matrix + r) * kLaneBytes, sizeof from);
      return static_cast<std::uint32_t>(from[c]);
    };
    const int line = lane / 4, pair = 2 * (lane % 4);
    to[matrix] = transposed ? element(pair, line) | element(pair + 1, line) << 16
                            : element(line, pair) | element(line, pair + 1) << 16;
  }
}

void multiply_add(const std::uint32_t (&given)[6], float (&sum)[4]) {
  const std::byte* lanes = exchange_in_warp(given, sizeof given);
  const auto value = [&](int lane, int place, int half) {
    std::uint32_t pair;
    std::memcpy(&pair, lanes + lane * kLaneBytes + place * static_cast<int>(sizeof pair), sizeof pair);
    const std::uint32_t bits = half == 0 ? pair << 16 : pair & 0xffff0000u;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
  };
  const int lane = executor().current % kLanes;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int beside = k % 8 / 2;
      sum[i] += value(row % 8 * 4 + beside, row / 8 + k / 8 * 2, k % 2) *
                value(column * 4 + beside, 4 + k / 8, k % 2);
    }
  }
}

}  // namespace hybridmoe::cuda::host
