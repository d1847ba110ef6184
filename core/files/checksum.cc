#include "core/files/checksum.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace hybridmoe {

struct Xxh3Stream::State {
  XXH3_state_t hash;
};

std::uint64_t xxh3(std::string_view bytes) { return XXH3_64bits(bytes.data(), bytes.size()); }

Xxh3Stream::Xxh3Stream() : state_(std::make_unique<State>()) { XXH3_64bits_reset(&state_->hash); }
Xxh3Stream::~Xxh3Stream() = default;
void Xxh3Stream::add(std::string_view bytes) {
  XXH3_64bits_update(&state_->hash, bytes.data(), bytes.size());
}
std::uint64_t Xxh3Stream::value() const { return XXH3_64bits_digest(&state_->hash); }

}  // namespace hybridmoe
