// What the system says about a process of this host.
#pragma once

#include <cstdint>
#include <string>

namespace hybridmoe::watchdog {

// When it started, in the clock ticks of /proc/PID/stat; 0: there is no such process. Number and start
// together name a process for good.
std::int64_t process_start(std::int64_t process);

// In words, when it does not simply run: "stopped by a signal", "gone"; else empty.
std::string process_state(std::int64_t process, std::int64_t start);

// Whether the kill was possible. Never hits a later process that has the same number.
bool kill_process(std::int64_t process, std::int64_t start);

}  // namespace hybridmoe::watchdog
