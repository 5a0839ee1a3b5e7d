#include "store/shards.h"

#include <algorithm>
#include <cstdio>

#include "store/shown.h"

namespace paretofuse {
namespace {

constexpr const char* kEnd = ".safetensors";
constexpr const char* kPattern = "-00000-of-00000";  // 0: any digit

}  // namespace

std::vector<std::size_t> shard_ends(const std::vector<std::int64_t>& nbytes, std::int64_t shard_bytes) {
  std::vector<std::size_t> ends;
  std::int64_t held = 0;
  for (std::size_t tensor = 0; tensor < nbytes.size(); ++tensor) {
    if (held > 0 && nbytes[tensor] > shard_bytes - held) {
      ends.push_back(tensor);
      held = 0;
    }
    held += nbytes[tensor];
  }
  ends.push_back(nbytes.size());
  return ends;
}

std::string shard_name(const std::string& stem, std::size_t number, std::size_t count) {
  if (count == 1) return stem + kEnd;
  char numbers[64];
  std::snprintf(numbers, sizeof numbers, "-%05zu-of-%05zu", number + 1, count);
  return stem + numbers + kEnd;
}

std::string index_name(const std::string& stem) { return stem + kEnd + ".index.json"; }

std::string index_text(std::int64_t total_parameters, std::int64_t total_size,
                       const std::map<std::string, std::string>& weight_map) {
  std::string text = "{\n  \"metadata\": {\n    \"total_parameters\": " + std::to_string(total_parameters) +
                     ",\n    \"total_size\": " + std::to_string(total_size) + "\n  },\n  \"weight_map\": {";
  const char* separator = "\n";
  for (const auto& [tensor, file] : weight_map) {
    text += separator + ("    " + quoted(tensor)) + ": " + quoted(file);
    separator = ",\n";
  }
  return text + "\n  }\n}\n";
}

bool is_shard_name(const std::string& stem, const std::string& name) {
  if (name == stem + kEnd) return true;
  const std::string pattern = stem + kPattern + kEnd;
  const auto fits = [](char wanted, char given) {
    return wanted == '0' ? given >= '0' && given <= '9' : wanted == given;
  };
  return name.size() == pattern.size() && name.compare(0, stem.size(), stem) == 0 &&
         std::equal(pattern.begin() + static_cast<std::ptrdiff_t>(stem.size()), pattern.end(),
                    name.begin() + static_cast<std::ptrdiff_t>(stem.size()), fits);
}

}  // namespace paretofuse
