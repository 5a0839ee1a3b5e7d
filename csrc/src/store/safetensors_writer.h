// Writes a safetensors file tensor by tensor; the header is filled in at the end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "store/mapped_file.h"
#include "store/safetensors.h"

namespace paretofuse {

// Tensors start on a multiple of their element size if larger element sizes come first. Wrong use throws
// std::invalid_argument, a system's refusal FileError (atomic.h).
class SafetensorsWriter {
 public:
  // Overwrites an older file. reserve: bytes to keep for the header; a longer one costs a second pass over
  // the data, nothing else.
  SafetensorsWriter(std::string path, std::map<std::string, std::string> metadata, std::size_t reserve);

  // Starts a tensor; then come its bytes by `write`, in any number of pieces, and `end`.
  void begin(const std::string& name, const std::string& dtype, std::vector<std::int64_t> shape);
  void write(const void* data, std::size_t size);
  void end();
  // Waits until what was written so far is on the disk; may run beside `write`.
  void sync() const;
  // Writes the header and closes the file. Without it the file is none.
  void finish();

 private:
  void make_room(std::int64_t start);

  std::string path_;
  std::map<std::string, std::string> metadata_;
  Descriptor file_;
  std::int64_t start_;          // of the data
  std::int64_t end_ = 0;        // of the data written, from their start on
  std::vector<Entry> entries_;  // offsets from the start of the data
  std::set<std::string> names_;
  bool open_ = false;  // within the last tensor
};

}  // namespace paretofuse
