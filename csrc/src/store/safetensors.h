// The header of a safetensors file, read (https://github.com/huggingface/safetensors#format): eight bytes
// with the header's length, little endian; a JSON object from tensor name to dtype, shape and data offsets,
// padded with spaces; the data without holes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
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

// What a file's header says.
struct Header {
  std::vector<Entry> entries;  // in the order of their data
  std::map<std::string, std::string> metadata;
};

// Longest header that the format allows, in bytes.
inline constexpr std::uint64_t kHeaderLimit = 100'000'000;

// The header's own member for the metadata, which no tensor can be called.
inline constexpr const char* kMetadata = "__metadata__";

// Bytes per element of a dtype that a model may hold; 0 for others.
std::int64_t dtype_size(std::string_view dtype);

// Bytes of a tensor; false if no file can hold them.
bool tensor_bytes(std::string_view dtype, const std::vector<std::int64_t>& shape, std::int64_t* bytes);

// The header of a whole file in memory. Every entry lies within the file and overlaps no other. Throws
// StoreError, naming `path`.
Header parse_safetensors(const std::string& path, const std::byte* data, std::size_t size);

}  // namespace paretofuse
