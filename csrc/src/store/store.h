// A store, opened: headers read and checked, data mapped and paged in when touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "store/manifest.h"
#include "store/mapped_file.h"
#include "store/routing.h"
#include "store/safetensors.h"

namespace paretofuse {

// A mapped safetensors file and its tensors.
struct TensorFile {
  explicit TensorFile(MappedFile mapped);  // throws StoreError

  // Null if there is no such tensor.
  const Entry* find(const std::string& name) const;
  const std::byte* data(const Entry& entry) const { return file.data() + entry.offset; }

  MappedFile file;
  std::map<std::string, std::string> metadata;
  std::vector<Entry> entries;  // in the order of their data
  std::map<std::string, std::size_t> by_name;
};

struct Store {
  // Throws StoreError.
  static Store open(const std::string& path);

  Store(std::shared_ptr<const Directory> opened, Manifest read);

  // Throws StoreError if a mapped file of base or experts is no more what it was when it was mapped.
  void check_unchanged() const;
  // Throws StoreError if any file's checksum is not the manifest's. Reads everything.
  void verify() const;
  // A model's own files by their names, with those of a head (or "") in their place. Throws StoreError.
  std::map<std::string, std::string> model_files(const std::string& head) const;

  // What an expert adds to a tensor.
  Plane plane(std::size_t expert, const TensorSpec& spec) const;
  // The tensors of the expert's file that make it up: none where it adds nothing, one where it is dense, else
  // its values and its factors.
  std::vector<const Entry*> plane_entries(std::size_t expert, const TensorSpec& spec) const;

  std::shared_ptr<const Directory> directory;
  Manifest manifest;
  TensorFile base;
  std::vector<TensorFile> experts;          // in the order of the manifest's members
  std::map<std::string, TensorFile> heads;  // by objective
  Routers routers;
};

}  // namespace paretofuse
