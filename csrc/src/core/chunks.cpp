#include "core/chunks.h"

#include <cstddef>
#include <stdexcept>
#include <string>

namespace paretofuse {

void check_numbers(const Numbers& numbers, const char* what) {
  if (numbers.data == nullptr) throw std::invalid_argument(std::string(what) + ": got a null address");
  if (static_cast<int>(numbers.dtype) >= kDTypes)
    throw std::invalid_argument(std::string(what) + ": unknown dtype");
}

void widen(const Kernels& kernels, const Numbers& from, std::int64_t at, std::int64_t count, float* to) {
  const auto* data = static_cast<const std::byte*>(from.data) + at * item_size(from.dtype);
  kernels.widen[static_cast<int>(from.dtype)](data, count, to);
}

void load(const Kernels& kernels, const Numbers& model, const Numbers& base, std::int64_t at,
          std::int64_t count, float* to) {
  widen(kernels, model, at, count, to);
  if (base.data == nullptr) return;
  Chunk own;
  widen(kernels, base, at, count, own.data());
  kernels.loops.subtract(to, own.data(), count);
}

}  // namespace paretofuse
