#include "store/planes.h"

#include <limits>
#include <stdexcept>

#include "store/safetensors.h"
#include "store/shown.h"

namespace paretofuse {
namespace {

constexpr std::int64_t kTile = 1024;
constexpr std::int64_t kSmallestGroup = 32;
constexpr std::int64_t kLargestRank = 1 << 20;

std::int64_t product(const std::vector<std::int64_t>& shape, std::size_t first) {
  std::int64_t count = 1;
  for (std::size_t d = first; d < shape.size(); ++d) {
    // A tensor of no elements may have rows that nothing could hold.
    if (__builtin_mul_overflow(count, shape[d], &count)) return std::numeric_limits<std::int64_t>::max();
  }
  return count;
}

// [rows, columns / size], or [ceil(length / size)] where pieces of this size do not make up a row.
std::vector<std::int64_t> cut(const std::vector<std::int64_t>& shape, std::int64_t size) {
  const std::int64_t columns = columns_of(shape);
  const std::int64_t length = product(shape, 0);
  if (columns % size != 0) return {(length + size - 1) / size};
  return {length / columns, columns / size};
}

}  // namespace

std::int64_t rows_of(const std::vector<std::int64_t>& shape) { return shape.size() > 1 ? shape[0] : 1; }

std::int64_t columns_of(const std::vector<std::int64_t>& shape) {
  return product(shape, shape.size() > 1 ? 1 : 0);
}

std::int64_t own_columns_of(const std::vector<std::int64_t>& shape) {
  return shape.size() == 2 ? shape[1] : 0;
}

Format plane_format(const std::string& name) {
  if (name == "int8") return Format::Int8;
  if (name == "int4") return Format::Int4;
  if (name == "lowrank") return Format::LowRank;
  throw std::invalid_argument("got a plane of format " + shown(name) + ", expected int8, int4 or lowrank");
}

const char* plane_format_name(Format format) {
  const char* names[] = {"dense", "int8", "int4", "lowrank"};
  return names[static_cast<int>(format)];
}

std::array<PlanePart, 2> plane_parts(const std::string& name, const std::vector<std::int64_t>& shape,
                                     const PlaneSpec& spec) {
  const std::string tensor = "the plane of tensor " + shown(name);
  std::int64_t bytes = 0;
  if (!tensor_bytes("F32", shape, &bytes) || bytes == 0) {
    throw std::invalid_argument(tensor + " has shape " + shown(shape) + ", expected one with elements");
  }
  if (spec.format == Format::LowRank) {
    if (shape.size() < 2 || spec.size < 1 || spec.size > kLargestRank) {
      throw std::invalid_argument(tensor + " has rank " + std::to_string(spec.size) +
                                  ", expected 1 to 2^20, of a matrix");
    }
    const std::string end = ".weight";
    const bool weight =
        name.size() > end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
    const std::string module = weight ? name.substr(0, name.size() - end.size()) : name;
    return {{{module + ".lora_A.weight", "", {spec.size, columns_of(shape)}},
             {module + ".lora_B.weight", "", {shape[0], spec.size}}}};
  }
  if (spec.size < kSmallestGroup || spec.size > kTile || (spec.size & (spec.size - 1)) != 0) {
    throw std::invalid_argument(tensor + " has groups of " + std::to_string(spec.size) +
                                " elements, expected a power of two from 32 to 1024");
  }
  const PlanePart scales{name + "_scale", "F32", cut(shape, spec.size)};
  if (spec.format == Format::Int8) return {{{name + "_packed", "I8", shape}, scales}};
  const std::vector<std::int64_t> words = cut(shape, 8);
  if (words.size() == 2) return {{{name + "_packed", "I32", words}, scales}};
  return {{{name + "_packed", "U8", {(product(shape, 0) + 1) / 2}}, scales}};
}

}  // namespace paretofuse
