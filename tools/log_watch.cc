#include "tools/log_watch.h"

#include <cerrno>
#include <chrono>
#include <spawn.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

#include "core/error.h"
#include "tools/log_text.h"

namespace hybridmoe {
namespace {

// Runs a command and waits for it. The environment is this process's with the variables added.
void run_command(const std::string& command, const std::vector<std::string>& variables) {
  std::vector<std::string> words = variables;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    if (std::string(*variable).rfind("HYBRIDMOE_", 0) != 0) words.emplace_back(*variable);
  }
  std::vector<char*> environment;
  for (std::string& word : words) environment.push_back(word.data());
  environment.push_back(nullptr);
  std::string shell = "/bin/sh", flag = "-c", text = command;
  char* arguments[] = {shell.data(), flag.data(), text.data(), nullptr};
  pid_t child = 0;
  const int error = ::posix_spawn(&child, "/bin/sh", nullptr, nullptr, arguments, environment.data());
  require(error == 0, "--exec: /bin/sh cannot be started (error ", error, ")");
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
}

}  // namespace

bool Watch::open(double now) {
  if (!missing_since_) missing_since_ = now;
  try {
    log_ = std::make_unique<LiveLog>(find_log_directory(request_.run), request_.rules.window(),
                                     health_metrics());
  } catch (const NewerLogFormat&) {
    throw;
  } catch (const Error& error) {
    const double waited = now - *missing_since_;
    require(waited < request_.wait_seconds, error.what(), " (waited for ", text::duration(waited),
            "; --wait says how long)");
    return false;
  }
  missing_since_.reset();
  return true;
}

void Watch::judge() {
  const RunLog& log = log_->log();
  result_ = judged_run(log, check_health(log, log_->window(), request_.rules));
  for (const LogProblem& problem : log.reader().problems()) {
    if (!problem.tail) result_.broken.push_back(problem.str());
  }
}

std::optional<int> Watch::look(double now) {
  const bool opened = log_ == nullptr;
  if (opened && !open(now)) return std::nullopt;
  try {
    if (log_->poll() || opened) {
      newest_record_ = now;
      judge();
    }
  } catch (const NewerLogFormat&) {
    throw;
  } catch (const Error& error) {  // perhaps for a moment only: it is opened again
    log_.reset();
    result_.broken = {error.what()};
  }
  const double silent = now - newest_record_;
  std::erase_if(result_.health.findings,
                [](const HealthFinding& finding) { return finding.rule == "stalled"; });
  if (request_.stall_seconds > 0 && silent >= request_.stall_seconds && !result_.ended) {
    result_.health.findings.push_back(
        {Severity::Fail, "stalled", "", result_.last_step, silent, request_.stall_seconds,
         cat("no record for ", text::duration(silent), ": the run hangs, or was ended without a word"), ""});
  }
  tell_news();
  if (!result_.ended) return std::nullopt;
  const int status = result_.status();
  if (request_.json) {
    out_ << ended_json_line(result_);
  } else {
    out_ << "the run has ended at step " << result_.last_step << ": " << status_name(status);
  }
  out_ << std::endl;
  return status;
}

void Watch::tell_news() {
  std::set<std::string> seen;
  const auto is_new = [&](const std::string& key) {
    return seen.insert(key).second && known_.count(key) == 0;
  };
  for (const std::string& problem : result_.broken) {
    if (is_new("corrupt\n" + problem))
      tell(kCheckCorrupt, {Severity::Fail, "corrupt", "", result_.last_step, 0, 0, problem, ""});
  }
  for (const HealthFinding& finding : result_.health.findings) {
    if (is_new(finding.rule + "\n" + finding.identity)) tell(static_cast<int>(finding.severity), finding);
  }
  known_ = std::move(seen);
}

void Watch::tell(int status, const HealthFinding& finding) {
  const std::string message =
      status == kCheckCorrupt ? finding.message
                              : cat("step ", finding.step, ": ", finding.rule,
                                    finding.where.empty() ? "" : " ", finding.where, ": ", finding.message);
  if (request_.json) {
    out_ << finding_json_line(status, finding) << std::endl;
  } else {
    out_ << text::coloured(status_name(status), status_colour(status)) << ": " << message << std::endl;
  }
  if (status < request_.on || request_.command.empty()) return;
  run_command(request_.command,
              {"HYBRIDMOE_RUN=" + request_.run, cat("HYBRIDMOE_STATUS=", status_name(status)),
               cat("HYBRIDMOE_STEP=", finding.step), "HYBRIDMOE_MESSAGE=" + message});
}

int watch_run(const WatchRequest& request, std::ostream& out) {
  Watch watch(request, out);
  const auto begin = std::chrono::steady_clock::now();
  while (true) {
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
    if (const std::optional<int> status = watch.look(passed.count())) return *status;
    std::this_thread::sleep_for(std::chrono::duration<double>(request.every_seconds));
  }
}

}  // namespace hybridmoe
