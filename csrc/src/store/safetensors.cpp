#include "store/safetensors.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "paretofuse/engine.h"
#include "store/json.h"

namespace paretofuse {
namespace {

// Those that a model of ours may hold, as engine/layout.py has them.
constexpr std::pair<std::string_view, std::int64_t> kDTypeSizes[] = {
    {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I16", 2}, {"U16", 2}, {"F16", 2},
    {"BF16", 2}, {"I32", 4}, {"U32", 4}, {"F32", 4},     {"I64", 8},     {"U64", 8}, {"F64", 8}, {"C64", 8}};

// Further ones of the format: files that hold them are no damaged ones.
constexpr std::string_view kOtherDTypes[] = {"F4",      "F6_E2M3",     "F6_E3M2",
                                             "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"};

[[noreturn]] void malformed(const std::string& path, const std::string& reason) {
  throw StoreError(path + ": not a valid safetensors file: " + reason + "; copy or create it again");
}

// A list of sizes; false if it is anything else.
bool as_sizes(const Json& value, std::vector<std::int64_t>* sizes) {
  if (!value.is_array()) return false;
  for (const Json& item : value) {
    if (!as_size(item, &sizes->emplace_back())) return false;
  }
  return true;
}

Entry parse_entry(const std::string& path, const std::string& name, const Json& json, std::int64_t start) {
  const std::string tensor = "tensor " + shown(name);
  if (!json.is_object() || json.size() != 3 || !json.contains("dtype") || !json.contains("shape") ||
      !json.contains("data_offsets")) {
    malformed(path, tensor + " should have 'data_offsets', 'dtype' and 'shape'");
  }
  Entry entry;
  entry.name = name;
  const Json& dtype = json["dtype"];
  const std::string_view known = dtype.is_string() ? dtype.get_ref<const std::string&>() : std::string_view();
  if (std::find(std::begin(kOtherDTypes), std::end(kOtherDTypes), known) != std::end(kOtherDTypes)) {
    throw StoreError(
        path + ": " + tensor + " is " + std::string(known) +
        ", a dtype of the safetensors format that is not read here; convert it to a wider one first, "
        "such as bfloat16");
  }
  if (dtype_size(known) == 0) malformed(path, tensor + " has the unknown dtype " + shown(dtype));
  entry.dtype = dtype.get<std::string>();
  if (!as_sizes(json["shape"], &entry.shape)) {
    malformed(path, tensor + " has a shape that is no list of integers >= 0");
  }
  std::vector<std::int64_t> offsets;
  if (!as_sizes(json["data_offsets"], &offsets) || offsets.size() != 2) {
    malformed(path, tensor + " has data offsets that are not two integers >= 0");
  }
  const bool fits = tensor_bytes(entry.dtype, entry.shape, &entry.nbytes);
  if (!fits || offsets[1] - offsets[0] != entry.nbytes) {
    malformed(path, tensor + " has bytes " + std::to_string(offsets[0]) + " to " +
                        std::to_string(offsets[1]) + ", but " + entry.dtype + " of shape " +
                        shown(entry.shape) + " takes " +
                        (fits ? std::to_string(entry.nbytes) : "more than a file can hold"));
  }
  if (__builtin_add_overflow(start, offsets[0], &entry.offset)) malformed(path, tensor + " lies beyond");
  return entry;
}

std::map<std::string, std::string> parse_metadata(const std::string& path, const Json& metadata) {
  const bool good = metadata.is_object() && std::all_of(metadata.begin(), metadata.end(),
                                                        [](const Json& value) { return value.is_string(); });
  if (!good) malformed(path, "its metadata should map names to strings");
  return metadata.get<std::map<std::string, std::string>>();
}

}  // namespace

std::int64_t dtype_size(std::string_view dtype) {
  for (const auto& [name, size] : kDTypeSizes) {
    if (name == dtype) return size;
  }
  return 0;
}

bool tensor_bytes(std::string_view dtype, const std::vector<std::int64_t>& shape, std::int64_t* bytes) {
  *bytes = dtype_size(dtype);
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return *bytes = 0, true;
  return std::all_of(shape.begin(), shape.end(),
                     [&](std::int64_t size) { return !__builtin_mul_overflow(*bytes, size, bytes); });
}

Header parse_safetensors(const std::string& path, const std::byte* data, std::size_t size) {
  if (size < 8)
    malformed(path, std::to_string(size) + " bytes are too few; it is truncated or another kind of file");
  std::uint64_t length = 0;
  for (int byte = 7; byte >= 0; --byte) length = length << 8 | std::to_integer<std::uint64_t>(data[byte]);
  if (length > kHeaderLimit || length > size - 8) {
    malformed(path, "its header should take " + std::to_string(length) + " bytes of " + std::to_string(size) +
                        "; it is truncated or another kind of file");
  }
  const std::string_view text(reinterpret_cast<const char*>(data) + 8, length);
  if (text.substr(0, 1) != "{") malformed(path, "its header does not begin with '{'");
  Json json;
  try {
    json = parse_json(text);
  } catch (const std::invalid_argument& error) {
    malformed(path, std::string("its header is damaged (") + error.what() + ")");
  }
  const auto start = static_cast<std::int64_t>(8 + length);
  Header header;
  std::vector<Entry>& entries = header.entries;
  for (const auto& [name, value] : json.items()) {
    if (name == kMetadata) {
      header.metadata = parse_metadata(path, value);
    } else {
      entries.push_back(parse_entry(path, name, value, start));
    }
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.offset, a.nbytes) < std::tie(b.offset, b.nbytes);
  });
  // Without holes and overlaps, no entry can lie beyond an end that is within the file.
  auto end = start;
  for (const Entry& entry : entries) {
    if (entry.offset != end) {
      malformed(path,
                "tensor " + shown(entry.name) +
                    (entry.offset < end ? " overlaps the tensor before it" : " leaves a hole before it"));
    }
    if (__builtin_add_overflow(end, entry.nbytes, &end)) malformed(path, "its tensors take too many bytes");
  }
  const auto actual = static_cast<std::int64_t>(size);
  if (end != actual) {
    malformed(path, end > actual ? "it is truncated: " + std::to_string(end - actual) + " bytes are missing"
                                 : std::to_string(actual - end) + " bytes too many");
  }
  return header;
}

}  // namespace paretofuse
