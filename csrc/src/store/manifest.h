// The manifest of a store: what manifest.json says, with every field checked.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "paretofuse/dtype.h"
#include "store/planes.h"
#include "store/routing.h"

namespace paretofuse {

inline constexpr const char* kManifest = "manifest.json";

enum class Role { routed, fixed, constant };  // "routed", "static", "constant"

inline constexpr const char* kFamilies[] = {"scalar", "rows", "rows+columns"};

// One tensor of the model.
struct TensorSpec {
  std::string name;
  std::vector<std::int64_t> shape;
  std::string dtype;
  Role role;
  std::string group;  // empty unless routed
  std::string delta_dtype;
  std::vector<std::string> aliases;  // further names of the same tensor
  std::int64_t first_row = 0;        // of a routed tensor, among the rows of all of them
  std::int64_t first_column = 0;     // of a routed matrix, among the columns of all of them
};

// Size in bytes and SHA-256 (hexadecimal) of one file of the store.
struct FileRecord {
  std::int64_t bytes;
  std::string sha256;
};

struct Manifest {
  std::vector<std::string> objectives;
  std::vector<Member> members;      // every plane, in the order of routing weights
  std::vector<std::string> groups;  // in the order of their first tensor
  double static_weight;
  std::vector<TensorSpec> tensors;
  std::int64_t rows = 0;     // of all routed tensors together
  std::int64_t columns = 0;  // of all routed matrices together
  std::string init;          // what the routers add to: "identity", "sqrt" or "constant"
  std::string family;        // of routers that was asked for, one of kFamilies; empty if none was
  // Paths relative to the store.
  std::string base;
  std::string routers;
  std::map<std::string, std::string> experts;  // by plane
  // By plane and tensor; planes that are not here are dense, or absent.
  std::map<std::string, std::map<std::string, PlaneSpec>> planes;
  std::map<std::string, std::string> heads;
  std::map<std::string, FileRecord> files;  // of every file but the manifest
  // The model's own files, and those that replace them under an objective's head: names in a merged model,
  // and where the store keeps them.
  std::map<std::string, std::string> model_files;
  std::map<std::string, std::map<std::string, std::string>> head_files;
  // For people and other programs; empty if not recorded.
  std::string model_class;
  std::string created_by;
  std::string training;  // JSON
};

// Throws StoreError, naming `path`.
Manifest parse_manifest(const std::string& path, std::string_view text);

// The element type of a tensor that can be merged.
DType merged_dtype(const std::string& dtype);

// A file name stem for each objective or plane: its name if all names are safe and distinct, or its index.
std::map<std::string, std::string> file_stems(const std::vector<std::string>& names);

// Whether a file may stand beside a merged model's weights: a safe path, and no weights itself.
bool is_model_file(const std::string& name);

// Whether a relative path with forward slashes stays below where it starts.
bool is_safe_path(std::string_view path);

}  // namespace paretofuse
