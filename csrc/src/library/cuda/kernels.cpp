#include "library/cuda/kernels.h"

#include <fstream>
#include <iterator>
#include <stdexcept>

#include "paretofuse/cuda.h"
#include "store/json.h"

namespace paretofuse {
namespace {

constexpr std::int64_t kFormat = 3;
constexpr const char* kGrid = "n / BLOCK, 1, 1";
constexpr std::int64_t kMaxThreads = 1024;
constexpr std::int64_t kMaxShared = 48 << 10;  // what a kernel may use without asking first

// Becomes a CudaError with the manifest's path.
[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

std::string text_at(const Json& object, const std::string& key) {
  const Json& value = member(object, key);
  if (!value.is_string()) fail("got " + shown(value) + " for \"" + key + "\", expected a string");
  return value.get<std::string>();
}

std::int64_t size_at(const Json& object, const std::string& key, std::int64_t most) {
  std::int64_t size = 0;
  const Json& value = member(object, key);
  if (!as_size(value, &size) || size > most) {
    fail("got " + shown(value) + " for \"" + key + "\", expected 0 to " + std::to_string(most));
  }
  return size;
}

DType dtype_of(const std::string& type) {
  if (type == "*fp32") return DType::F32;
  if (type == "*bf16") return DType::BF16;
  if (type == "*fp16") return DType::F16;
  fail("got an argument of type " + type + ", expected floating-point numbers");
}

// The argument list that CudaWeights gives; null: one of the floating-point types.
struct Argument {
  const char* name;
  const char* type;
};
constexpr Argument kArguments[] = {
    {"base", nullptr},     {"deltas", nullptr},       {"tile_group", "*i32"},    {"weights", "*fp32"},
    {"scales", "*fp32"},   {"places", "*i32"},        {"out", nullptr},          {"n", "i64"},
    {"experts", "i32"},    {"groups", "i32"},         {"preferences", "i32"},    {"delta_stride", "i64"},
    {"out_stride", "i64"}, {"global_scratch", "*i8"}, {"profile_scratch", "*i8"}};

MergeKernel parse_kernel(const Json& json, const Json& constants, const std::string& folder) {
  const std::string file = text_at(json, "file");
  if (file.empty() || file.find('/') != std::string::npos || file[0] == '.') fail("no file name: " + file);
  const Json& arguments = member(json, "arguments");
  if (!arguments.is_array() || arguments.size() != std::size(kArguments)) fail("another list of arguments");
  DType types[std::size(kArguments)] = {};
  for (std::size_t i = 0; i < std::size(kArguments); ++i) {
    const std::string name = text_at(arguments[i], "name"), type = text_at(arguments[i], "type");
    const Argument& wanted = kArguments[i];
    if (name != wanted.name || (wanted.type != nullptr && type != wanted.type)) {
      fail("got argument " + name + " of type " + type + ", expected " + wanted.name);
    }
    if (wanted.type == nullptr) types[i] = dtype_of(type);
  }
  if (text_at(json, "grid") != kGrid) fail("another launch grid");
  MergeKernel kernel;
  kernel.file = folder + "/" + file;
  kernel.symbol = text_at(json, "symbol");
  kernel.base = types[0];
  kernel.delta = types[1];
  kernel.out = types[6];
  kernel.block = size_at(constants, "BLOCK", kTile);
  kernel.experts = size_at(constants, "E_CHUNK", kMaxThreads);
  const Json& one_chunk = member(constants, "ONE_CHUNK");
  if (!one_chunk.is_boolean()) fail("got " + shown(one_chunk) + " for ONE_CHUNK, expected true or false");
  kernel.any = !one_chunk.get<bool>();
  kernel.threads = static_cast<unsigned>(size_at(json, "threads", kMaxThreads));
  kernel.shared_bytes = static_cast<unsigned>(size_at(json, "shared_bytes", kMaxShared));
  if (kernel.block == 0 || kTile % kernel.block != 0) fail("blocks that do not divide a tile");
  if (kernel.threads == 0 || kernel.experts == 0) fail("no threads, or no experts");
  return kernel;
}

bool merges_floats(const Json& json, const Json& constants) {
  std::int64_t tile = 0;
  return text_at(json, "symbol") == "merge_kernel" && member(constants, "HAS_SCALES") == Json(false) &&
         as_size(member(constants, "TILE"), &tile) && tile == kTile;
}

MergeKernels parse(const std::string& folder, const std::string& text) {
  const Json json = parse_json(text);
  if (!json.is_object() || member(json, "format") != Json(kFormat)) {
    fail("got format " + shown(json.is_object() ? member(json, "format") : json) + ", expected " +
         std::to_string(kFormat));
  }
  MergeKernels kernels{folder, 0, {}};
  const std::string architecture = text_at(json, "architecture");
  const std::string number = architecture.substr(0, 3) == "sm_" ? architecture.substr(3) : "";
  if (number.empty() || number.size() > 3 || number.find_first_not_of("0123456789") != std::string::npos) {
    fail("got kernels for " + architecture + ", expected an NVIDIA architecture such as sm_90");
  }
  kernels.architecture = std::stoi(number);
  const Json& list = member(json, "kernels");
  if (!list.is_array()) fail("no list of kernels");
  for (const Json& entry : list) {
    if (!entry.is_object()) fail("got " + shown(entry) + " in the list of kernels");
    const Json& constants = member(entry, "constants");
    if (!constants.is_object()) fail("a kernel has no constants");
    if (merges_floats(entry, constants)) kernels.kernels.push_back(parse_kernel(entry, constants, folder));
  }
  return kernels;
}

}  // namespace

MergeKernels read_kernels(const std::string& folder) {
  const std::string path = folder + "/manifest.json";
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const std::string remedy = "; write the kernels by `python -m paretofuse.kernels.aot`";
  if (!file || text.empty()) throw CudaError(path + ": cannot be read" + remedy);
  try {
    return parse(folder, text);
  } catch (const std::invalid_argument& error) {
    throw CudaError(path + ": " + error.what() + remedy);
  }
}

const MergeKernel& MergeKernels::choose(DType base, DType delta, DType out, std::int64_t experts) const {
  const MergeKernel* best = nullptr;
  for (const MergeKernel& kernel : kernels) {
    if (kernel.base != base || kernel.delta != delta || kernel.out != out) continue;
    if (!kernel.any && kernel.experts < experts) continue;
    // One that holds all experts reads nothing twice; of those the smallest has registers to spare.
    if (best == nullptr || (best->any && !kernel.any) ||
        (best->any == kernel.any && kernel.experts < best->experts)) {
      best = &kernel;
    }
  }
  if (best != nullptr) return *best;
  static constexpr const char* names[] = {"fp32", "bf16", "fp16"};
  const auto name = [](DType dtype) { return std::string(names[static_cast<int>(dtype)]); };
  throw CudaError(folder + ": has no merge of base " + name(base) + " and deltas " + name(delta) +
                  "; write it by `python -m paretofuse.kernels.aot --dtype " + name(base) +
                  " --delta-dtype " + name(delta) + "`");
}

}  // namespace paretofuse
