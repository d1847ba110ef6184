// Runs a kernel on the host, for tests: one fibre per thread of a block, blocks one after another, in order.
// A thread runs until it waits for others (a block barrier, a warp operation). A wait that cannot end, since
// a thread it needs has returned or waits elsewhere, throws Error; on a GPU it would hang or be undefined.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace hybridmoe::cuda::host {

struct Grid {
  std::int64_t x = 1, y = 1;
  int threads = 32;              // of a block; a multiple of 32, at most 1024
  std::size_t shared_bytes = 0;  // of a block, at most what a block of an H100 can have
};

// Calls kernel once in every thread. An exception that a thread throws ends the launch and is thrown on.
void run(const Grid& grid, const std::function<void()>& kernel);

// Memory that only kernels may touch, and whoever holds an OpenMemory: others crash. `memory` begins a page,
// and can be read and written until then. forget: all that was guarded within these bytes.
void guard(void* memory, std::size_t bytes);
void forget(void* memory, std::size_t bytes);
class OpenMemory {
 public:
  OpenMemory();
  ~OpenMemory();
  OpenMemory(const OpenMemory&) = delete;
  OpenMemory& operator=(const OpenMemory&) = delete;
};

// For threads of a running kernel.
int thread_index();
int block_threads();
std::int64_t block_x();
std::int64_t block_y();
std::int64_t grid_x();
void* shared_memory();  // every byte 0xff at first
std::size_t shared_bytes();
void sync_block();
// Until `done` says so, which may change nothing. It is asked when other threads have run.
void wait_until(const std::function<bool()>& done);

// Bytes between the values of two lanes.
constexpr int kLaneBytes = 64;
// Every lane of the warp gives `bytes` bytes, at most kLaneBytes; returns what all of them gave, lane l's at
// l * kLaneBytes, valid until the warp's next exchange. All lanes must make the same exchanges.
const std::byte* exchange_in_warp(const void* value, int bytes);

// Copies that are under way until they are waited for: until then what they will write holds 0xff.
void start_copy(void* to, const void* from, int bytes);  // null: zeros
void commit_copies();                                    // those started since the last commit become a group
void wait_for_copies(int left);  // of this thread's groups, until only the last `left` may be under way

// What goes on beside the threads of a block: copies and products that a thread starts and others wait for.
// It is asked to go on only when no thread can, so that everything arrives as late as it may.
class Background {
 public:
  virtual ~Background() = default;
  virtual void block_begins() = 0;
  virtual bool go_on() = 0;       // the next thing that a thread waits for; false: there is none
  virtual void block_ends() = 0;  // throws Error when something is still under way
};
// For all blocks of the running kernel from here on; attached twice is attached once.
void attach(Background& background);

// Of a warp, as portable.h describes them. given: four registers of a, two of b.
void load_matrices(const void* row, bool transposed, std::uint32_t (&to)[4]);
void multiply_add(const std::uint32_t (&given)[6], float (&sum)[4]);

}  // namespace hybridmoe::cuda::host
