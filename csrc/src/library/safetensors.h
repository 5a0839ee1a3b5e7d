// The header of a safetensors file (https://github.com/huggingface/safetensors#format): eight bytes with the
// header's length, little endian; a JSON object from tensor name to dtype, shape and data offsets, padded
// with spaces; the data without holes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace paretofuse {

// One tensor of a file.
struct Entry {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::int64_t offset;  // of its data, from the start of the file
  std::int64_t nbytes;
};

// Bytes per element of a safetensors dtype; 0 for an unknown one.
std::int64_t dtype_size(std::string_view dtype);

// The header with its length, for data that begin on a multiple of 64. Offsets of the entries are counted
// from the start of the data.
std::string format_header(const std::vector<Entry>& entries);

// The tensors of a whole file in memory, in the order of their data. Every entry lies within the file and
// overlaps no other. Reads the header only. Throws StoreError, naming `path`.
std::vector<Entry> parse_safetensors(const std::string& path, const std::byte* data, std::size_t size);

}  // namespace paretofuse
