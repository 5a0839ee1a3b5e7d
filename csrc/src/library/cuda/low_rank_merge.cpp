// Matrices of low-rank planes, as kernels/lowrank_merge.py merges them:
//
//   out[o, i] = base[o, i] + sum over r of w(o, p(r)) * B[o, r] * A[r, i] + sum over d of w(o, p(d)) * D_d[o,
//   i] w(o, p) = weights[group, p] + weights[row(o), p]
//
//   factors float32: of each matrix B [O, R] and A [R, I] of all planes side by side, R filled up with zeros
//   plane_of int32: p(r), the planes of each matrix's R ranks   D_d [O, I]: dense planes
//   dense_planes int64 [d, 2]: p(d), and where D_d lies
//   matrices int64 [matrices, kMatrixFields]   tiles int32 [tiles, 3]: a matrix, and where in it a tile
//   begins
#include <utility>
#include <vector>

#include "core/planes.h"
#include "library/cuda/device_merge.h"

namespace paretofuse {
namespace {

// A factor in float32, into a larger matrix of rows of `width`.
void widen(const void* factor, DType dtype, std::int64_t rows, std::int64_t columns, float* to,
           std::int64_t width) {
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t column = 0; column < columns; ++column) {
      to[row * width + column] = float_at(factor, dtype, row * columns + column);
    }
  }
}

class LowRankMerge final : public DeviceMerge {
 public:
  LowRankMerge(const Source& source, Bucket bucket);

  void launch(DeviceAddress weights, bool by_row, void* stream) const override;

  void keep_output() override {
    DeviceMerge::keep_output();
    for (DeviceMemory* memory : {&factors_, &dense_, &plane_of_, &matrices_, &tiles_, &dense_planes_}) {
      memory->give_back();
    }
  }

 private:
  struct Matrix {
    const TensorSpec& spec;
    std::int64_t outs, ins, ranks;
    std::int64_t factors;  // where they begin
    std::int64_t dense;    // where the first dense plane begins
  };

  const LowRankKernel& kernel(const Source& source, bool by_row) const;
  std::vector<Matrix> place(const Model& model);
  void copy_planes(const Store& store, const Matrix& matrix);

  CudaFunction plain_;
  CudaFunction by_row_;
  std::int64_t tile_count_ = 0;
  DeviceMemory factors_;
  DeviceMemory dense_;  // of the deltas' dtype, each plane at a multiple of 16 elements
  DeviceMemory plane_of_;
  DeviceMemory matrices_;
  DeviceMemory tiles_;
  DeviceMemory dense_planes_;
  std::shared_ptr<const CudaContext> context_;
};

LowRankMerge::LowRankMerge(const Source& source, Bucket bucket)
    : DeviceMerge(source, std::move(bucket)),
      plain_(source.context, kernel(source, false).code),
      by_row_(source.context, kernel(source, true).code),
      context_(source.context) {
  for (const Matrix& matrix : place(source.model)) copy_planes(source.model.store(), matrix);
}

const LowRankKernel& LowRankMerge::kernel(const Source& source, bool by_row) const {
  const Store& store = source.model.store();
  std::string dense;
  for (const std::size_t tensor : bucket_.tensors) {
    for (std::size_t e = 0; e < store.experts.size(); ++e) {
      const Plane plane = store.plane(e, store.manifest.tensors[tensor]);
      if (plane.values != nullptr && plane.format == Format::Dense) dense = triton_name(bucket_.delta_dtype);
    }
  }
  return source.kernels.choose_low_rank(triton_name(bucket_.dtype), by_row, dense);
}

// Where everything will lie, and the tables that say so.
std::vector<LowRankMerge::Matrix> LowRankMerge::place(const Model& model) {
  const Store& store = model.store();
  std::vector<Matrix> found;
  std::vector<std::int32_t> plane_of, tiles;
  std::vector<std::int64_t> table, dense_planes;
  std::int64_t end = 0, dense_end = 0;
  for (std::size_t i = 0; i < bucket_.tensors.size(); ++i) {
    const TensorSpec& spec = store.manifest.tensors[bucket_.tensors[i]];
    const std::size_t first = plane_of.size(), first_dense = dense_planes.size() / 2;
    const std::int64_t dense = dense_end;
    for (std::int32_t e = 0; e < planes_; ++e) {
      const Plane plane = store.plane(static_cast<std::size_t>(e), spec);
      if (plane.values == nullptr) continue;
      if (plane.format == Format::LowRank) {
        plane_of.insert(plane_of.end(), static_cast<std::size_t>(plane.size), e);
      } else {
        dense_planes.insert(dense_planes.end(), {e, dense_end});
        dense_end += bucket_.lengths[i];  // rows are multiples of 16 elements
      }
    }
    const auto ranks = ceil_div(static_cast<std::int64_t>(plane_of.size() - first), kRanks) * kRanks;
    plane_of.resize(first + static_cast<std::size_t>(ranks));
    const Matrix matrix{spec, rows_of(spec.shape), columns_of(spec.shape), ranks, end, dense};
    end += (matrix.outs + matrix.ins) * ranks;
    const std::int64_t own = spec.role == Role::routed ? rows_ + spec.first_row : -1;
    for (const std::int64_t field :
         {bucket_.offsets[i], bucket_.offsets[i], matrix.factors, matrix.factors + matrix.outs * ranks,
          static_cast<std::int64_t>(first), matrix.outs, matrix.ins, ranks, model.rows().of(spec), own,
          static_cast<std::int64_t>(first_dense),
          static_cast<std::int64_t>(dense_planes.size() / 2 - first_dense)}) {
      table.push_back(field);
    }
    for (std::int64_t o = 0; o < matrix.outs; o += kTileOuts) {
      for (std::int64_t in = 0; in < matrix.ins; in += kTileIns) {
        for (const std::int64_t field : {static_cast<std::int64_t>(i), o, in}) {
          tiles.push_back(static_cast<std::int32_t>(field));
        }
      }
    }
    found.push_back(matrix);
  }
  tile_count_ = static_cast<std::int64_t>(tiles.size() / 3);
  factors_ = DeviceMemory(context_, static_cast<std::size_t>(end) * sizeof(float));
  dense_ = DeviceMemory(context_, bytes(dense_end, bucket_.delta_dtype));
  dense_planes_ = on_device(context_, dense_planes);
  plane_of_ = on_device(context_, plane_of);
  matrices_ = on_device(context_, table);
  tiles_ = on_device(context_, tiles);
  return found;
}

void LowRankMerge::copy_planes(const Store& store, const Matrix& matrix) {
  std::vector<float> factors(static_cast<std::size_t>((matrix.outs + matrix.ins) * matrix.ranks));
  float* b = factors.data();
  float* a = b + matrix.outs * matrix.ranks;
  std::size_t dense = bytes(matrix.dense, bucket_.delta_dtype);
  for (std::size_t e = 0; e < static_cast<std::size_t>(planes_); ++e) {
    const Plane plane = store.plane(e, matrix.spec);
    if (plane.values == nullptr) continue;
    if (plane.format == Format::Dense) {
      const std::size_t size = bytes(matrix.outs * matrix.ins, bucket_.delta_dtype);
      dense_.write(dense, plane.values, size);
      dense += size;
      continue;
    }
    widen(plane.factors, plane.dtype, matrix.outs, plane.size, b, matrix.ranks);
    widen(plane.values, plane.dtype, plane.size, matrix.ins, a, matrix.ins);
    b += plane.size;
    a += plane.size * matrix.ins;
  }
  factors_.write(static_cast<std::size_t>(matrix.factors) * sizeof(float), factors.data(),
                 factors.size() * sizeof(float));
}

void LowRankMerge::launch(DeviceAddress weights, bool by_row, void* stream) const {
  DeviceAddress factors = factors_.address(), base = base_.address(), plane_of = plane_of_.address();
  DeviceAddress matrices = matrices_.address(), tiles = tiles_.address(), out = out_.address();
  DeviceAddress no_scratch = 0;
  std::int32_t preferences = 1, width = rows_, planes = planes_;
  std::int64_t out_stride = bucket_.length();
  const bool beside = dense_.address() != 0;
  DeviceAddress dense = beside ? dense_.address() : base;  // where there are none, what is not read
  DeviceAddress dense_planes = beside ? dense_planes_.address() : matrices;
  // In the order that kernels.cpp checks.
  void* arguments[] = {&factors,  &base,   &dense,        &plane_of,   &weights,
                       &matrices, &tiles,  &dense_planes, &out,        &preferences,
                       &width,    &planes, &out_stride,   &no_scratch, &no_scratch};
  (by_row ? by_row_ : plain_).launch(tile_count_, stream, arguments);
}

}  // namespace

std::unique_ptr<DeviceMerge> low_rank_merge(const Source& source, Bucket bucket) {
  return std::make_unique<LowRankMerge>(source, std::move(bucket));
}

}  // namespace paretofuse
