// A store, opened: headers read and checked, data mapped and paged in when touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "library/manifest.h"
#include "library/mapped_file.h"
#include "library/routing.h"
#include "library/safetensors.h"

namespace paretofuse {

// A mapped safetensors file and its tensors.
struct TensorFile {
  TensorFile(const Directory& directory, const std::string& name);

  // Null if there is no such tensor.
  const Entry* find(const std::string& name) const;
  const std::byte* data(const Entry& entry) const { return file.data() + entry.offset; }

  MappedFile file;
  std::vector<Entry> entries;
  std::map<std::string, std::size_t> by_name;
};

struct Store {
  // Throws StoreError.
  static Store open(const std::string& path);

  Store(std::shared_ptr<const Directory> opened, Manifest read);

  // Throws StoreError if a mapped file was altered.
  void check_unchanged() const;

  std::shared_ptr<const Directory> directory;
  Manifest manifest;
  TensorFile base;
  std::vector<TensorFile> experts;          // in the order of the objectives
  std::map<std::string, TensorFile> heads;  // by objective
  Routers routers;
};

}  // namespace paretofuse
