// Any bytes as a safetensors file: an error or tensors that lie within it, never a crash.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "paretofuse/engine.h"
#include "store/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    std::int64_t end = 0;
    for (const paretofuse::Entry& entry :
         paretofuse::parse_safetensors("input", reinterpret_cast<const std::byte*>(data), size).entries) {
      const bool inside = entry.offset >= 8 && entry.nbytes >= 0 && entry.offset >= end &&
                          entry.nbytes <= static_cast<std::int64_t>(size) - entry.offset;
      if (!inside) std::abort();
      end = entry.offset + entry.nbytes;
    }
  } catch (const paretofuse::StoreError&) {
  }
  return 0;
}
