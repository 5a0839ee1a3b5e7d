#include "core/planes.h"

#include <cstddef>
#include <stdexcept>

#include "simd/convert.h"

namespace paretofuse {
namespace {

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

}  // namespace

void check_columns(std::int64_t length, std::int64_t columns, const std::string& where) {
  if (columns < 1 || length % columns != 0) {
    fail("columns" + where + ": got " + std::to_string(columns) + ", expected a divisor of the " +
         std::to_string(length) + " elements");
  }
}

void check_plane(const Plane& plane, std::int64_t length, std::int64_t columns, const std::string& where) {
  if (plane.values == nullptr || length == 0) return;
  if (plane.format > Format::LowRank) fail("format" + where + ": unknown");
  if (static_cast<int>(plane.dtype) >= kDTypes) fail("dtype" + where + ": unknown");
  if (plane.format == Format::Dense) return;
  if (plane.factors == nullptr) fail("factors" + where + ": got a null address");
  if (plane.format == Format::LowRank) {
    check_columns(length, columns, where);
    if (plane.size < 1 || plane.size > std::int64_t{1} << 24) {
      fail("rank" + where + ": got " + std::to_string(plane.size) + ", expected 1 to 2^24");
    }
  } else if (plane.size < kStep || plane.size > std::int64_t{1} << 30 ||
             (plane.size & (plane.size - 1)) != 0) {
    fail("group" + where + ": got " + std::to_string(plane.size) +
         " elements, expected a power of two from " + std::to_string(kStep) + " on");
  }
}

std::int64_t values_size(const Plane& plane, std::int64_t length, std::int64_t columns) {
  switch (plane.format) {
    case Format::Dense:
      return length * item_size(plane.dtype);
    case Format::Int8:
      return length;
    case Format::Int4:
      return ceil_div(length, 2);
    default:
      return plane.size * columns * item_size(plane.dtype);
  }
}

std::int64_t factors_size(const Plane& plane, std::int64_t length, std::int64_t columns) {
  switch (plane.format) {
    case Format::Dense:
      return 0;
    case Format::LowRank:
      return length / columns * plane.size * item_size(plane.dtype);
    default:
      return ceil_div(length, plane.size) * 4;
  }
}

Plane plane_from(Plane plane, std::int64_t begin, std::int64_t columns) {
  if (plane.values == nullptr) return plane;
  const auto advance = [](const void*& address, std::int64_t bytes) {
    address = static_cast<const std::byte*>(address) + bytes;
  };
  if (plane.format == Format::LowRank) {  // all rows share A
    advance(plane.factors, begin / columns * plane.size * item_size(plane.dtype));
    return plane;
  }
  advance(plane.values, values_size(plane, begin, columns));
  if (plane.format != Format::Dense) advance(plane.factors, begin / plane.size * 4);
  return plane;
}

Term term_of(const Plane& plane) {
  Term term{static_cast<const std::byte*>(plane.values), static_cast<const std::byte*>(plane.factors), 0,
            static_cast<Kind>(plane.dtype)};
  if (plane.format == Format::Dense) return term;
  term.kind = plane.format == Format::Int8 ? Kind::Int8 : Kind::Int4;
  while (std::int64_t{1} << term.shift < plane.size) ++term.shift;
  return term;
}

float float_at(const void* values, DType dtype, std::int64_t i) {
  const auto* from = static_cast<const std::byte*>(values) + i * item_size(dtype);
  switch (dtype) {
    case DType::F32:
      return load_one<DType::F32>(from);
    case DType::BF16:
      return load_one<DType::BF16>(from);
    default:
      return load_one<DType::F16>(from);
  }
}

}  // namespace paretofuse
