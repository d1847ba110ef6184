#include "core/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace hybridmoe {

double learning_rate(const Config& config, std::int64_t step) {
  const ScheduleConfig& schedule = config.schedule();
  const double peak = config.optimizer().learning_rate(), floor = schedule.floor();
  const double warmup = static_cast<double>(schedule.warmup_steps());
  const double total =
      static_cast<double>(schedule.total_steps() > 0 ? schedule.total_steps() : config.steps());
  const double now = static_cast<double>(step);
  if (now < warmup) return peak * (schedule.warmup_from() + (1 - schedule.warmup_from()) * now / warmup);
  const auto linear = [&](double begin) {  // 1 at `begin`, floor at the end
    const double done = total > begin ? std::clamp((now - begin) / (total - begin), 0.0, 1.0) : 1.0;
    return 1 - (1 - floor) * done;
  };
  switch (schedule.shape()) {
    case ScheduleConfig::CONSTANT:
      return peak;
    case ScheduleConfig::LINEAR:
      return peak * linear(warmup);
    case ScheduleConfig::WARMUP_STABLE_DECAY:
      return peak * linear(total - static_cast<double>(schedule.decay_steps()));
    case ScheduleConfig::COSINE:
      break;
  }
  const double done = total > warmup ? std::clamp((now - warmup) / (total - warmup), 0.0, 1.0) : 1.0;
  return peak * (floor + (1 - floor) * 0.5 * (1 + std::cos(std::numbers::pi * done)));
}

}  // namespace hybridmoe
