// The wish to stop: SIGUSR1, SIGTERM or SIGINT set a flag, and the trainer looks at it between steps.
//
// Under mpirun a rank gets SIGUSR1 when mpirun does (it forwards it without killing), SIGTERM and SIGINT when
// they are sent to the rank itself. Ranks may see the signal at different steps, so the flag counts only
// after it has been summed over the world.
#pragma once

#include <csignal>
#include <string>

namespace hybridmoe {

// Handles the three signals from construction to destruction, then restores the former handlers. Construct it
// before MpiEnvironment, so that a signal during MPI's start is not lost. One object at a time: a second
// throws Error. System calls that a signal interrupts are restarted, so that no save is torn.
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
};

}  // namespace hybridmoe
