// The file that a command writes for its user: there whole, or as it was before.
#pragma once

#include <functional>
#include <ostream>
#include <string>

namespace hybridmoe {

// Puts what `write` writes into the file: aside first (PATH.partial), then in its place. Devices and pipes
// are written as they are. Throws Error when that fails, and passes on what `write` throws; the file that was
// there before is then untouched.
void write_output_file(const std::string& path, const std::function<void(std::ostream&)>& write);

}  // namespace hybridmoe
