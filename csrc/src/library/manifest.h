// The manifest of a store: what manifest.json says, with every field checked.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "paretofuse/dtype.h"

namespace paretofuse {

inline constexpr const char* kManifest = "manifest.json";

enum class Role { routed, fixed, constant };  // "routed", "static", "constant"

// One tensor of the model.
struct TensorSpec {
  std::string name;
  std::vector<std::int64_t> shape;
  std::string dtype;
  Role role;
  std::string group;  // empty unless routed
  std::string delta_dtype;
  std::vector<std::string> aliases;  // further names of the same tensor
};

struct Manifest {
  std::vector<std::string> objectives;
  std::vector<std::string> groups;  // in the order of their first tensor
  double static_weight;
  std::vector<TensorSpec> tensors;
  std::string init;  // what the routers add to: "identity", "sqrt" or "constant"
  // Paths relative to the store.
  std::string base;
  std::string routers;
  std::map<std::string, std::string> experts;  // by objective
  std::map<std::string, std::string> heads;
  std::map<std::string, std::int64_t> files;  // bytes of every file but the manifest
  // The model's own files, and those that replace them under an objective's head: names in a merged model,
  // and where the store keeps them.
  std::map<std::string, std::string> model_files;
  std::map<std::string, std::map<std::string, std::string>> head_files;
};

// Throws StoreError, naming `path`.
Manifest parse_manifest(const std::string& path, std::string_view text);

// The element type of a tensor that can be merged.
DType merged_dtype(const std::string& dtype);

// Whether a relative path with forward slashes stays below where it starts.
bool is_safe_path(std::string_view path);

}  // namespace paretofuse
