// Planes as the kernels see them.
#pragma once

#include <cstdint>
#include <string>

#include "paretofuse/merge.h"
#include "simd/kernels.h"

namespace paretofuse {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Throws std::invalid_argument unless a plane fits a tensor of `length` elements in rows of `columns`;
// `where` ends the names in messages.
void check_plane(const Plane& plane, std::int64_t length, std::int64_t columns, const std::string& where);

// Throws unless rows of `columns` elements make up `length`.
void check_columns(std::int64_t length, std::int64_t columns, const std::string& where);

// Bytes of a plane's values and of its factors.
std::int64_t values_size(const Plane& plane, std::int64_t length, std::int64_t columns);
std::int64_t factors_size(const Plane& plane, std::int64_t length, std::int64_t columns);

// What is left of a plane from element `begin` on: the start of a group, and of a row where it is of low
// rank.
Plane plane_from(Plane plane, std::int64_t begin, std::int64_t columns);

// A plane that is not of low rank, for the kernels.
Term term_of(const Plane& plane);

// Element i of an array of floats.
float float_at(const void* values, DType dtype, std::int64_t i);

}  // namespace paretofuse
