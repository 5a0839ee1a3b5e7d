// A store with one file replaced by any bytes, opened and switched: an error or weights, never a crash.
//
// The first byte of the input chooses the file, the others are its content. The manifest gets the new size,
// so that the file is looked at. The environment variable PARETOFUSE_FUZZ_STORE names a directory with a good
// store, which is copied to a folder below TMPDIR.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "paretofuse/engine.h"
#include "paretofuse/replicas.h"

namespace {

namespace fs = std::filesystem;
namespace pf = paretofuse;

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const fs::path& path, const std::string& content) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << content;
}

// The good store, and the copy of it that is spoilt and mended.
struct Scratch {
  Scratch() {
    const char* source = std::getenv("PARETOFUSE_FUZZ_STORE");
    if (source == nullptr) throw std::runtime_error("set PARETOFUSE_FUZZ_STORE to a store's directory");
    std::string name = (fs::temp_directory_path() / "paretofuse-fuzz-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
    root = name;
    fs::copy(source, root, fs::copy_options::recursive | fs::copy_options::overwrite_existing);
    manifest = nlohmann::json::parse(read(root / "manifest.json"));
    for (const auto& item : manifest["files"].items()) names.push_back(item.key());
  }
  ~Scratch() { fs::remove_all(root); }

  fs::path root;
  nlohmann::json manifest;
  std::vector<std::string> names;
};

void use(const fs::path& root) {
  pf::Options options;
  options.threads = 1;
  pf::Engine engine = pf::Engine::open(root.string(), options);
  pf::Preference preference(engine.objectives().size(), 0.0);
  preference[0] = 1.0;
  engine.switch_to(preference);
  const pf::Replica replica = engine.acquire(preference);
  unsigned sum = 0;
  for (const std::string& name : engine.tensor_names()) {
    for (const pf::TensorView* view : {&engine.tensor(name), &replica.tensor(name)}) {
      const auto* bytes = static_cast<const unsigned char*>(view->data);
      for (std::int64_t i = 0; i < view->nbytes; ++i) sum += bytes[i];
    }
  }
  volatile unsigned sink = sum;
  (void)sink;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static Scratch scratch;
  if (size == 0) return 0;
  const std::string name = scratch.names[data[0] % scratch.names.size()];
  const std::string content(reinterpret_cast<const char*>(data) + 1, size - 1);
  const std::string before = read(scratch.root / name);
  nlohmann::json manifest = scratch.manifest;
  manifest["files"][name]["bytes"] = content.size();
  write(scratch.root / "manifest.json", manifest.dump());
  write(scratch.root / name, content);
  try {
    use(scratch.root);
  } catch (const pf::StoreError&) {
  } catch (const std::invalid_argument&) {  // routers that give no finite weights
  }
  write(scratch.root / name, before);
  return 0;
}
