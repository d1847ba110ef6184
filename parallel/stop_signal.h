// The wish to stop: SIGUSR1, SIGTERM or SIGINT set a flag, and the trainer looks at it between steps.
//
// Under mpirun a rank gets SIGUSR1 when mpirun does (it forwards it without killing), SIGTERM and SIGINT when
// they are sent to the rank itself. Ranks may see the signal at different steps, so the flag counts only
// after it has been summed over the world.
#pragma once

#include <condition_variable>
#include <csignal>
#include <mutex>
#include <string>
#include <thread>

namespace hybridmoe {

// Handles the three signals from construction to destruction, then restores the former handlers. Construct it
// before MpiEnvironment, so that a signal during MPI's start is not lost, and before any thread that
// computes. One object at a time: a second throws Error.
//
// No thread that computes runs a handler: oneDNN's sgemm keeps data below the stack pointer, where the kernel
// puts a handler's frame, and a signal at the wrong moment destroys the heap (2.6.3; seen once in some
// thousand stops). So the calling thread, and every thread that it starts from then on, blocks the three
// signals; a thread of this object takes them. Nor is any system call of a save interrupted.
class StopSignal {
 public:
  StopSignal();
  ~StopSignal();
  StopSignal(const StopSignal&) = delete;
  StopSignal& operator=(const StopSignal&) = delete;

  bool requested() const { return number() != 0; }
  int number() const;        // of the latest signal; 0: none came
  std::string name() const;  // "SIGUSR1"; empty: none came

 private:
  static constexpr int kSignals[] = {SIGUSR1, SIGTERM, SIGINT};
  struct sigaction former_[std::size(kSignals)];
  sigset_t former_mask_;
  std::mutex mutex_;
  std::condition_variable end_;
  bool ending_ = false;
  std::thread receiver_;
};

}  // namespace hybridmoe
