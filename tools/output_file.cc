#include "tools/output_file.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "core/error.h"

namespace hybridmoe {

void write_output_file(const std::string& path, const std::function<void(std::ostream&)>& write) {
  namespace fs = std::filesystem;
  std::error_code error;
  // A link stays one; /dev/stdout must not become a file.
  const fs::path target = fs::exists(path, error) ? fs::canonical(path, error) : fs::path(path);
  const bool direct = fs::exists(target, error) && !fs::is_regular_file(target, error);
  const std::string written = direct ? path : target.string() + ".partial";
  try {
    std::ofstream file(written, std::ios::binary);
    require(file.good(), path, ": cannot write this file: ", std::strerror(errno));
    write(file);
    file.close();
    require(file.good(), path, ": writing failed; is the disk full?");
    if (direct) return;
    fs::rename(written, target, error);
    require(!error, path, ": cannot rename the finished file to this: ", error.message());
  } catch (...) {
    if (!direct) fs::remove(written, error);
    throw;
  }
}

}  // namespace hybridmoe
