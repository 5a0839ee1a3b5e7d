#include "library/cuda/kernels.h"

#include <fstream>
#include <iterator>
#include <stdexcept>

#include "paretofuse/cuda.h"
#include "store/json.h"

namespace paretofuse {
namespace {

constexpr std::int64_t kFormat = 4;
constexpr std::int64_t kMaxThreads = 1024;
constexpr std::int64_t kLargest = 1 << 30;
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

bool truth_at(const Json& object, const std::string& key) {
  const Json& value = member(object, key);
  if (!value.is_boolean()) fail("got " + shown(value) + " for " + key + ", expected true or false");
  return value.get<bool>();
}

// An argument that we would give. type: null where kernels differ in it, of floats; "quantized" where it may
// be of planes in int8 or int4 as well.
struct Argument {
  const char* name;
  const char* type;
};
constexpr const char* kFloats = nullptr;
constexpr const char* kDeltas = "quantized";
// The lists that FlatMerge and LowRankMerge give.
constexpr Argument kMergeArguments[] = {
    {"base", kFloats},     {"deltas", kDeltas},       {"tile_group", "*i32"},    {"weights", "*fp32"},
    {"scales", "*fp32"},   {"places", "*i32"},        {"out", kFloats},          {"n", "i64"},
    {"experts", "i32"},    {"groups", "i32"},         {"preferences", "i32"},    {"delta_stride", "i64"},
    {"out_stride", "i64"}, {"global_scratch", "*i8"}, {"profile_scratch", "*i8"}};
constexpr Argument kLowRankArguments[] = {
    {"factors", "*fp32"},  {"base", kFloats},         {"dense", kFloats},        {"plane_of", "*i32"},
    {"weights", "*fp32"},  {"matrices", "*i64"},      {"tiles", "*i32"},         {"dense_planes", "*i64"},
    {"out", kFloats},      {"preferences", "i32"},    {"width", "i32"},          {"planes", "i32"},
    {"out_stride", "i64"}, {"global_scratch", "*i8"}, {"profile_scratch", "*i8"}};

bool is_float(const std::string& type) { return type == "*fp32" || type == "*bf16" || type == "*fp16"; }

// The types, without their asterisks, by place.
template <std::size_t N>
std::vector<std::string> types_of(const Json& kernel, const Argument (&wanted)[N]) {
  const Json& arguments = member(kernel, "arguments");
  if (!arguments.is_array() || arguments.size() != N) fail("another list of arguments");
  std::vector<std::string> types;
  for (std::size_t i = 0; i < N; ++i) {
    const std::string name = text_at(arguments[i], "name"), type = text_at(arguments[i], "type");
    const bool quantized = type == "*i8" || type == "*u8";
    const bool fits = wanted[i].type == kFloats   ? is_float(type)
                      : wanted[i].type == kDeltas ? is_float(type) || quantized
                                                  : type == wanted[i].type;
    if (name != wanted[i].name || !fits) {
      fail("got argument " + name + " of type " + type + ", expected " + wanted[i].name);
    }
    types.push_back(type.substr(type[0] == '*' ? 1 : 0));
  }
  return types;
}

KernelCode parse_code(const Json& json, const std::string& folder, const char* grid) {
  const std::string file = text_at(json, "file");
  if (file.empty() || file.find('/') != std::string::npos || file[0] == '.') fail("no file name: " + file);
  if (text_at(json, "grid") != grid) fail("another launch grid");
  KernelCode code{folder + "/" + file, text_at(json, "symbol"), 0, 0};
  code.threads = static_cast<unsigned>(size_at(json, "threads", kMaxThreads));
  code.shared_bytes = static_cast<unsigned>(size_at(json, "shared_bytes", kMaxShared));
  if (code.threads == 0) fail("no threads");
  return code;
}

MergeKernel parse_merge(const Json& json, const Json& constants, const std::string& folder) {
  const std::vector<std::string> types = types_of(json, kMergeArguments);
  MergeKernel kernel;
  kernel.code = parse_code(json, folder, "n / BLOCK, 1, 1");
  const std::int64_t group = truth_at(constants, "HAS_SCALES") ? size_at(constants, "GROUP", kTile) : 0;
  kernel.use = {types[0], types[1], types[6], group,
                static_cast<RowCoefficients>(size_at(constants, "ROWS", 2))};
  kernel.block = size_at(constants, "BLOCK", kTile);
  kernel.experts = size_at(constants, "E_CHUNK", kMaxThreads);
  kernel.any = !truth_at(constants, "ONE_CHUNK");
  if (kernel.block == 0 || kTile % kernel.block != 0) fail("blocks that do not divide a tile");
  if (kernel.experts == 0) fail("no experts");
  const std::int64_t sub = size_at(constants, "SUB", kTile);
  if (kernel.use.rows == RowCoefficients::shared && (sub == 0 || kSharedRow % sub != 0)) {
    fail("row coefficients of " + std::to_string(sub) + " elements");
  }
  const bool by_row = kernel.use.rows != RowCoefficients::none;
  if (truth_at(constants, "PLACES") != by_row)
    fail("row coefficients without places, or places without them");
  if (truth_at(constants, "PACKED") != (types[1] == "u8")) fail("packed numbers of another type");
  return kernel;
}

LowRankKernel parse_low_rank(const Json& json, const Json& constants, const std::string& folder) {
  const std::vector<std::string> types = types_of(json, kLowRankArguments);
  LowRankKernel kernel;
  kernel.code = parse_code(json, folder, "tiles, 1, 1");
  kernel.dtype = types[1];
  if (types[8] != types[1]) fail("an output of another type than the base");
  kernel.by_row = truth_at(constants, "ROWS");
  if (truth_at(constants, "DENSE")) kernel.dense = types[2];
  const std::int64_t outs = size_at(constants, "BO", kTile), ins = size_at(constants, "BI", kTile);
  if (outs != kTileOuts || ins != kTileIns || size_at(constants, "RANKS", kTile) != kRanks)
    fail("another tile");
  if (size_at(constants, "FIELDS", kTile) != kMatrixFields) fail("another table of matrices");
  return kernel;
}

MergeKernels parse(const std::string& folder, const std::string& text) {
  const Json json = parse_json(text);
  if (!json.is_object() || member(json, "format") != Json(kFormat)) {
    fail("got format " + shown(json.is_object() ? member(json, "format") : json) + ", expected " +
         std::to_string(kFormat));
  }
  MergeKernels kernels{folder, 0, {}, {}};
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
    const std::string symbol = text_at(entry, "symbol");
    if (symbol == "merge_kernel" && size_at(constants, "TILE", kLargest) == kTile) {
      kernels.merges.push_back(parse_merge(entry, constants, folder));
    }
    if (symbol == "lowrank_merge_kernel" && truth_at(constants, "ALIGNED")) {
      kernels.low_rank.push_back(parse_low_rank(entry, constants, folder));
    }
  }
  return kernels;
}

}  // namespace

std::string triton_name(DType dtype) {
  static constexpr const char* names[] = {"fp32", "bf16", "fp16"};
  return names[static_cast<int>(dtype)];
}

std::string triton_name(Format format, DType dtype) {
  return format == Format::Int8 ? "i8" : format == Format::Int4 ? "u8" : triton_name(dtype);
}

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

const MergeKernel& MergeKernels::choose(const MergeUse& use, std::int64_t experts) const {
  const MergeKernel* best = nullptr;
  for (const MergeKernel& kernel : merges) {
    if (!(kernel.use == use) || (!kernel.any && kernel.experts < experts)) continue;
    // One that holds all experts reads nothing twice; of those the smallest has registers to spare.
    if (best == nullptr || (best->any && !kernel.any) ||
        (best->any == kernel.any && kernel.experts < best->experts)) {
      best = &kernel;
    }
  }
  if (best != nullptr) return *best;
  const bool written = use.deltas == "i8" || use.deltas == "u8";  // for every dtype of a base
  throw CudaError(folder + ": has no merge of base " + use.base + " and deltas " + use.deltas +
                  (use.group == 0 ? "" : " in groups of " + std::to_string(use.group)) +
                  (use.rows == RowCoefficients::none ? "" : " by row") +
                  "; write it by `python -m paretofuse.kernels.aot --dtype " + use.base +
                  (written ? "" : " --delta-dtype " + use.deltas) + "`");
}

const LowRankKernel& MergeKernels::choose_low_rank(const std::string& dtype, bool by_row,
                                                   const std::string& dense) const {
  for (const LowRankKernel& kernel : low_rank) {
    if (kernel.dtype == dtype && kernel.by_row == by_row && kernel.dense == dense) return kernel;
  }
  throw CudaError(folder + ": has no merge of base " + dtype + " and planes of low rank" +
                  (dense.empty() ? "" : " beside deltas " + dense) + (by_row ? " by row" : "") +
                  "; write it by `python -m paretofuse.kernels.aot --dtype " + dtype +
                  (dense.empty() ? "" : " --delta-dtype " + dense) + "`");
}

}  // namespace paretofuse
