// How a store keeps planes that are not dense: which tensors of an expert's file make one up.
//
//   int8     NAME_packed I8 of the tensor's shape, NAME_scale F32
//   int4     NAME_packed I32 [rows, columns / 8], or U8 [ceil(length / 2)] where words do not make up a row;
//            NAME_scale F32. As compressed-tensors packs them.
//   lowrank  MODULE.lora_A.weight [rank, columns] and MODULE.lora_B.weight [rows, rank] of a tensor
//            MODULE.weight, as PEFT names them, in the tensor's own orientation and with the scale in B
//
// Scales are [rows, columns / group], or [ceil(length / group)] where groups do not make up a row.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "paretofuse/merge.h"

namespace paretofuse {

struct PlaneSpec {
  Format format;
  std::int64_t size;  // elements of a group, or the rank
  double error;       // of the merged update; negative where it was not measured
};

struct PlanePart {
  std::string name;
  std::string dtype;  // empty: F32, BF16 or F16, as the other factor
  std::vector<std::int64_t> shape;
};

// The values (of low-rank planes A) and the factors (B) of a tensor's plane. Throws std::invalid_argument
// where such a plane does not fit the shape.
std::array<PlanePart, 2> plane_parts(const std::string& name, const std::vector<std::int64_t>& shape,
                                     const PlaneSpec& spec);

// "int8", "int4" or "lowrank"; throws std::invalid_argument for others.
Format plane_format(const std::string& name);
const char* plane_format_name(Format format);

// A tensor's rows: the size of its first dimension; one of a scalar or a vector.
std::int64_t rows_of(const std::vector<std::int64_t>& shape);

// Elements of one of a tensor's rows: of its first dimension; all of a scalar's or a vector's.
std::int64_t columns_of(const std::vector<std::int64_t>& shape);

// The columns of a tensor that may have coefficients: those of a matrix; none of a scalar, a vector or a
// tensor of more dimensions.
std::int64_t own_columns_of(const std::vector<std::int64_t>& shape);

}  // namespace paretofuse
