#include "store/store.h"

#include <sys/stat.h>

#include <array>
#include <cstring>
#include <stdexcept>

#include "paretofuse/engine.h"
#include "store/sha256.h"
#include "store/shown.h"

namespace paretofuse {
namespace {

constexpr int kAttempts = 5;  // a store may be replaced while it is opened

constexpr const char* kAgain = "; create the store again";

void check_sizes(const Directory& directory, const Manifest& manifest) {
  for (const auto& [name, record] : manifest.files) {
    const Descriptor file = directory.open(name);
    struct stat status = {};
    if (fstat(file.number(), &status) == 0 && status.st_size == record.bytes) continue;
    throw StoreError(directory.path() + "/" + name + ": has " + std::to_string(status.st_size) +
                     " bytes, the manifest says " + std::to_string(record.bytes) + ": it was " +
                     (status.st_size < record.bytes ? "truncated" : "altered") + kAgain);
  }
}

// Every tensor of a file is one that the manifest knows of, with the dtype and the shape that it says.
void check_table(const TensorFile& file, const std::map<std::string, PlanePart>& parts) {
  for (const Entry& entry : file.entries) {
    const std::string tensor = file.file.path() + ": tensor " + shown(entry.name);
    const auto found = parts.find(entry.name);
    if (found == parts.end()) {
      throw StoreError(tensor + " is not in the manifest's table of them" + kAgain);
    }
    const PlanePart& part = found->second;
    const bool fits = part.dtype.empty()
                          ? entry.dtype == "F32" || entry.dtype == "BF16" || entry.dtype == "F16"
                          : entry.dtype == part.dtype;
    if (!fits || entry.shape != part.shape) {
      throw StoreError(tensor + " is " + entry.dtype + " " + shown(entry.shape) + ", the manifest says " +
                       (part.dtype.empty() ? "F32, BF16 or F16" : part.dtype) + " " + shown(part.shape) +
                       kAgain);
    }
  }
}

// The same for an expert's file, whose planes are whole, and no two of them share a tensor.
void check_expert(const TensorFile& file, const Manifest& manifest, const std::string& plane) {
  const auto own = manifest.planes.find(plane);
  std::map<std::string, PlanePart> parts;
  const auto add = [&](const PlanePart& part) {
    if (parts.emplace(part.name, part).second) return;
    throw StoreError(file.file.path() + ": tensor " + shown(part.name) +
                     " would belong to two of the manifest's planes" + kAgain);
  };
  for (const TensorSpec& spec : manifest.tensors) {
    if (spec.role == Role::constant) continue;
    if (own == manifest.planes.end() || own->second.count(spec.name) == 0) {
      add({spec.name, spec.delta_dtype, spec.shape});
      continue;
    }
    const std::array<PlanePart, 2> two = plane_parts(spec.name, spec.shape, own->second.at(spec.name));
    const Entry* found[2] = {file.find(two[0].name), file.find(two[1].name)};
    for (int i = 0; i < 2; ++i) {
      if (found[i] == nullptr) {
        throw StoreError(file.file.path() + ": tensor " + shown(two[i].name) +
                         " of the manifest's planes is missing" + kAgain);
      }
      add(two[i]);
    }
    if (two[0].dtype.empty() && found[0]->dtype != found[1]->dtype) {
      throw StoreError(file.file.path() + ": tensor " + shown(two[0].name) + " is " + found[0]->dtype +
                       " and " + shown(two[1].name) + " is " + found[1]->dtype + ", expected one dtype" +
                       kAgain);
    }
  }
  check_table(file, parts);
}

TensorFile open_file(const Directory& directory, const std::string& name) {
  return TensorFile(MappedFile(directory, name));
}

Routers read_routers(const Directory& directory, const Manifest& manifest) {
  const TensorFile file = open_file(directory, manifest.routers);
  std::map<std::string, RouterParameter> parameters;
  for (const Entry& entry : file.entries) {
    if (entry.dtype != "F32") {
      throw StoreError(file.file.path() + ": router parameters should be F32" + kAgain);
    }
    RouterParameter parameter{entry.shape, std::vector<float>(static_cast<std::size_t>(entry.nbytes) / 4)};
    if (entry.nbytes > 0) {
      std::memcpy(parameter.values.data(), file.data(entry), static_cast<std::size_t>(entry.nbytes));
    }
    parameters[entry.name] = std::move(parameter);
  }
  try {
    return Routers(manifest.init, manifest.groups.size(), manifest.objectives.size(), manifest.members,
                   manifest.rows, manifest.columns, std::move(parameters));
  } catch (const std::invalid_argument& error) {
    throw StoreError(file.file.path() + ": " + error.what() + kAgain);
  }
}

std::vector<TensorFile> open_experts(const Directory& directory, const Manifest& manifest) {
  std::vector<TensorFile> files;
  for (const Member& member : manifest.members) {
    files.push_back(open_file(directory, manifest.experts.at(member.plane)));
  }
  return files;
}

std::map<std::string, TensorFile> open_heads(const Directory& directory, const Manifest& manifest) {
  std::map<std::string, TensorFile> files;
  for (const auto& [objective, name] : manifest.heads) {
    files.emplace(objective, open_file(directory, name));
  }
  return files;
}

}  // namespace

TensorFile::TensorFile(MappedFile mapped) : file(std::move(mapped)) {
  Header header = parse_safetensors(file.path(), file.data(), file.size());
  metadata = std::move(header.metadata);
  entries = std::move(header.entries);
  for (std::size_t index = 0; index < entries.size(); ++index) by_name[entries[index].name] = index;
}

const Entry* TensorFile::find(const std::string& name) const {
  const auto found = by_name.find(name);
  return found == by_name.end() ? nullptr : &entries[found->second];
}

Store::Store(std::shared_ptr<const Directory> opened, Manifest read)
    : directory(std::move(opened)),
      manifest(std::move(read)),
      base(open_file(*directory, manifest.base)),
      experts(open_experts(*directory, manifest)),
      heads(open_heads(*directory, manifest)),
      routers(read_routers(*directory, manifest)) {
  std::map<std::string, PlanePart> parts;
  for (const TensorSpec& spec : manifest.tensors) parts[spec.name] = {spec.name, spec.dtype, spec.shape};
  check_table(base, parts);
  for (std::size_t e = 0; e < experts.size(); ++e)
    check_expert(experts[e], manifest, manifest.members[e].plane);
  for (const TensorSpec& spec : manifest.tensors) {
    if (base.find(spec.name) == nullptr) {
      throw StoreError(base.file.path() + ": tensor " + shown(spec.name) + " of the manifest is missing" +
                       kAgain);
    }
  }
}

Store Store::open(const std::string& path) {
  for (int attempt = 1;; ++attempt) {
    const auto directory = std::make_shared<const Directory>(path);
    try {
      if (!directory->has(kManifest)) {
        throw StoreError(path + " is not a store: it has no " + kManifest +
                         "; create one with `paretofuse stack`");
      }
      Manifest manifest = parse_manifest(path + "/" + kManifest, directory->read(kManifest));
      check_sizes(*directory, manifest);
      Store store(directory, std::move(manifest));
      // Links lead through the path, so that a store that takes its place meanwhile might mix with it.
      if (directory->still_there()) return store;
      if (attempt == kAttempts) {
        throw StoreError(path + ": is being replaced again and again; try once more when that is over");
      }
    } catch (const StoreError&) {
      // A store that is replaced meanwhile loses its files one by one.
      if (attempt >= kAttempts || directory->still_there()) throw;
    }
  }
}

std::vector<const Entry*> Store::plane_entries(std::size_t expert, const TensorSpec& spec) const {
  const TensorFile& file = experts[expert];
  const auto own = manifest.planes.find(manifest.members[expert].plane);
  if (own != manifest.planes.end() && own->second.count(spec.name) != 0) {
    const std::array<PlanePart, 2> parts = plane_parts(spec.name, spec.shape, own->second.at(spec.name));
    return {file.find(parts[0].name), file.find(parts[1].name)};
  }
  const Entry* dense = file.find(spec.name);
  return dense == nullptr ? std::vector<const Entry*>() : std::vector<const Entry*>{dense};
}

Plane Store::plane(std::size_t expert, const TensorSpec& spec) const {
  const std::vector<const Entry*> entries = plane_entries(expert, spec);
  Plane plane{nullptr, nullptr, 0, Format::Dense, merged_dtype(spec.delta_dtype)};
  if (entries.empty()) return plane;
  plane.values = experts[expert].data(*entries[0]);
  if (entries.size() == 1) return plane;
  const PlaneSpec& own = manifest.planes.at(manifest.members[expert].plane).at(spec.name);
  plane.factors = experts[expert].data(*entries[1]);
  plane.size = own.size;
  plane.format = own.format;
  plane.dtype = own.format == Format::LowRank ? merged_dtype(entries[0]->dtype) : DType::F32;
  return plane;
}

void Store::check_unchanged() const {
  base.file.check_unchanged(manifest.files.at(manifest.base).sha256);
  for (std::size_t e = 0; e < experts.size(); ++e) {
    experts[e].file.check_unchanged(manifest.files.at(manifest.experts.at(manifest.members[e].plane)).sha256);
  }
}

void Store::verify() const {
  for (const auto& [name, record] : manifest.files) {
    if (sha256_of(directory->open(name).number()) == record.sha256) continue;
    throw StoreError(
        directory->path() + "/" + name +
        ": its checksum is not the manifest's, so it was altered after it was written; restore it or "
        "create the store again");
  }
}

std::map<std::string, std::string> Store::model_files(const std::string& head) const {
  std::map<std::string, std::string> files = manifest.model_files;
  const auto own = manifest.head_files.find(head);
  if (own != manifest.head_files.end()) {
    for (const auto& [name, from] : own->second) files[name] = from;
  }
  for (auto& [name, content] : files) content = directory->read(content);
  return files;
}

}  // namespace paretofuse
