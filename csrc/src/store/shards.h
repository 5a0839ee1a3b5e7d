// The files that a model's weights are cut into, and the index that tells which tensor is in which, as
// transformers and diffusers write them: STEM-00001-of-00003.safetensors beside STEM.safetensors.index.json.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace paretofuse {

// Bytes of tensors in one file, at most, unless a single tensor has more; unless told.
inline constexpr std::int64_t kShardBytes = 5'000'000'000;

// Where each file ends that tensors of these sizes, one after the other, are cut into: the number of the
// tensor behind its last. One file for no tensors.
std::vector<std::size_t> shard_ends(const std::vector<std::int64_t>& nbytes, std::int64_t shard_bytes);

// The name of file `number` (from 0 on) of `count`.
std::string shard_name(const std::string& stem, std::size_t number, std::size_t count);

std::string index_name(const std::string& stem);

// The index's content. weight_map: the file of each tensor.
std::string index_text(std::int64_t total_parameters, std::int64_t total_size,
                       const std::map<std::string, std::string>& weight_map);

// Whether `shard_name` gives this name for some number of files.
bool is_shard_name(const std::string& stem, const std::string& name);

}  // namespace paretofuse
