// The collector as a process of its own: started by rank 0, in its own session, so that signals to the rank's
// process group spare it.
#pragma once

#include <string>
#include <sys/types.h>

#include "parallel/watchdog/collector.h"

namespace hybridmoe::watchdog {

// The program, which lies beside the running one.
inline constexpr const char* kCollectorProgram = "hybridmoe-watchdog";

class CollectorProcess {
 public:
  // Starts the program and waits until it listens. It keeps this process' standard error and nothing else of
  // its files. Not by fork: MPI's memory may be registered with the network card. Throws Error.
  explicit CollectorProcess(const CollectorOptions& options);
  // Gives it a few seconds to end, which it does when every rank has said goodbye; it lives on for others.
  ~CollectorProcess();
  CollectorProcess(const CollectorProcess&) = delete;
  CollectorProcess& operator=(const CollectorProcess&) = delete;

  const CollectorOffer& offer() const { return offer_; }
  pid_t process() const { return process_; }

 private:
  pid_t process_ = -1;
  CollectorOffer offer_;
};

// What the program does: listens, writes its offer to standard output, closes it and runs the collector.
// Returns the exit status.
int collector_main(const CollectorOptions& options);

}  // namespace hybridmoe::watchdog
