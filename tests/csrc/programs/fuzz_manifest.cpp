// Any bytes as a manifest: an error or a manifest whose paths stay in the store, never a crash.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "paretofuse/engine.h"
#include "store/manifest.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const paretofuse::Manifest manifest =
        paretofuse::parse_manifest("input", {reinterpret_cast<const char*>(data), size});
    for (const auto& [path, record] : manifest.files) {
      if (path.front() == '/' || ("/" + path + "/").find("/../") != std::string::npos || record.bytes < 0)
        std::abort();
    }
  } catch (const paretofuse::StoreError&) {
  }
  return 0;
}
