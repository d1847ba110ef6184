// What checkpoints a run has, and whether every byte of them is what was saved.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>

namespace hybridmoe {

// A line for each complete checkpoint, newest first: step, size, time, ranks. One whose manifest cannot be
// read gets a line that says so.
void list_run_checkpoints(const std::string& run_dir, std::ostream& out);

// Reads all of the checkpoints of a run (step < 0) or one of them: the manifest, every array of every rank
// against its checksum, and that each element of each parameter has exactly one owner. Prints a line for
// each; returns how many are damaged. Throws Error when there is nothing to verify.
int verify_checkpoints(const std::string& run_dir, std::int64_t step, std::ostream& out);

}  // namespace hybridmoe
