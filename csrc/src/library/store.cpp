#include "library/store.h"

#include <sys/stat.h>

#include <cstring>
#include <stdexcept>

#include "library/json.h"
#include "paretofuse/engine.h"

namespace paretofuse {
namespace {

constexpr int kAttempts = 5;  // a store may be replaced while it is opened

void check_sizes(const Directory& directory, const Manifest& manifest) {
  for (const auto& [name, bytes] : manifest.files) {
    const Descriptor file = directory.open(name);
    struct stat status;
    if (fstat(file.number(), &status) == 0 && status.st_size == bytes) continue;
    throw StoreError(directory.path() + "/" + name + ": has " + std::to_string(status.st_size) +
                     " bytes, the manifest says " + std::to_string(bytes) +
                     ": it was altered; create the store again");
  }
}

// Every tensor of a file is in the manifest's table, with the table's dtype and shape.
void check_table(const TensorFile& file, const std::map<std::string, const TensorSpec*>& specs,
                 bool is_base) {
  for (const Entry& entry : file.entries) {
    const std::string tensor = file.file.path() + ": tensor " + shown(entry.name);
    const auto found = specs.find(entry.name);
    if (found == specs.end() || (found->second->role == Role::constant && !is_base)) {
      throw StoreError(tensor + " is not in the manifest's table of them; create the store again");
    }
    const TensorSpec& spec = *found->second;
    if (entry.dtype != (is_base ? spec.dtype : spec.delta_dtype) || entry.shape != spec.shape) {
      throw StoreError(tensor + " has another dtype or shape than the manifest says; create the store again");
    }
  }
}

Routers read_routers(const Directory& directory, const Manifest& manifest) {
  const TensorFile file(directory, manifest.routers);
  std::map<std::string, RouterParameter> parameters;
  for (const Entry& entry : file.entries) {
    if (entry.dtype != "F32") {
      throw StoreError(file.file.path() + ": router parameters should be F32; create the store again");
    }
    RouterParameter parameter{entry.shape, std::vector<float>(static_cast<std::size_t>(entry.nbytes) / 4)};
    if (entry.nbytes > 0) {
      std::memcpy(parameter.values.data(), file.data(entry), static_cast<std::size_t>(entry.nbytes));
    }
    parameters[entry.name] = std::move(parameter);
  }
  try {
    return Routers(manifest.init, manifest.groups.size(), manifest.objectives.size(), std::move(parameters));
  } catch (const std::invalid_argument& error) {
    throw StoreError(file.file.path() + ": " + error.what() + "; create the store again");
  }
}

std::vector<TensorFile> open_experts(const Directory& directory, const Manifest& manifest) {
  std::vector<TensorFile> files;
  for (const std::string& objective : manifest.objectives) {
    files.emplace_back(directory, manifest.experts.at(objective));
  }
  return files;
}

std::map<std::string, TensorFile> open_heads(const Directory& directory, const Manifest& manifest) {
  std::map<std::string, TensorFile> files;
  for (const auto& [objective, name] : manifest.heads) files.emplace(objective, TensorFile(directory, name));
  return files;
}

}  // namespace

TensorFile::TensorFile(const Directory& directory, const std::string& name)
    : file(directory, name), entries(parse_safetensors(file.path(), file.data(), file.size())) {
  for (std::size_t index = 0; index < entries.size(); ++index) by_name[entries[index].name] = index;
}

const Entry* TensorFile::find(const std::string& name) const {
  const auto found = by_name.find(name);
  return found == by_name.end() ? nullptr : &entries[found->second];
}

Store::Store(std::shared_ptr<const Directory> opened, Manifest read)
    : directory(std::move(opened)),
      manifest(std::move(read)),
      base(*directory, manifest.base),
      experts(open_experts(*directory, manifest)),
      heads(open_heads(*directory, manifest)),
      routers(read_routers(*directory, manifest)) {
  std::map<std::string, const TensorSpec*> specs;
  for (const TensorSpec& spec : manifest.tensors) specs[spec.name] = &spec;
  check_table(base, specs, true);
  for (const TensorFile& expert : experts) check_table(expert, specs, false);
  for (const TensorSpec& spec : manifest.tensors) {
    if (base.find(spec.name) == nullptr) {
      throw StoreError(base.file.path() + ": tensor " + shown(spec.name) +
                       " of the manifest is missing; create the store again");
    }
  }
}

Store Store::open(const std::string& path) {
  for (int attempt = 1;; ++attempt) {
    const auto directory = std::make_shared<const Directory>(path);
    try {
      Manifest manifest = parse_manifest(path + "/" + kManifest, directory->read(kManifest));
      check_sizes(*directory, manifest);
      return Store(directory, std::move(manifest));
    } catch (const StoreError&) {
      // A store that is replaced meanwhile loses its files one by one.
      if (attempt == kAttempts || directory->still_there()) throw;
    }
  }
}

void Store::check_unchanged() const {
  base.file.check_unchanged();
  for (const TensorFile& expert : experts) expert.file.check_unchanged();
}

}  // namespace paretofuse
