// Planes in flat buffers, as kernels/routed_merge.py merges them:
//
//   out[i] = base[i] + sum over e of (weights[group(i), e] + weights[row(i), e]) * scale(e, i) * deltas[e, i]
//
//   base, out [N]   deltas [E, N], int4 [E, N / 2] bytes   scales float32 [E, N / group]
//   tiles int32 [N / kTile]: of each tile its group's row of the weights
//   places int32 [N / kTile, 5]: of each tile itself, its number within its tensor, elements of a row of that
//   tensor, and the rows of the weights that hold its first and its last row's coefficients
#include <utility>
#include <vector>

#include "core/planes.h"
#include "library/cuda/device_merge.h"

namespace paretofuse {
namespace {

constexpr std::size_t kPlaceFields = 5;

class FlatMerge final : public DeviceMerge {
 public:
  FlatMerge(const Source& source, Bucket bucket);

  void launch(DeviceAddress weights, bool by_row, void* stream) const override;

  void keep_output() override {
    DeviceMerge::keep_output();
    for (DeviceMemory* memory : {&deltas_, &scales_, &tiles_, &places_}) memory->give_back();
  }

 private:
  struct Form {
    const MergeKernel* kernel = nullptr;
    std::unique_ptr<CudaFunction> function;
  };

  // Bytes of so many elements of a plane.
  std::size_t delta_bytes(std::int64_t count) const {
    if (bucket_.format == Format::Int8) return static_cast<std::size_t>(count);
    if (bucket_.format == Format::Int4) return static_cast<std::size_t>(ceil_div(count, 2));
    return bytes(count, bucket_.delta_dtype);
  }
  Form form(const Source& source, RowCoefficients rows) const;
  void copy_plane(const Model& model, std::size_t expert, std::size_t tensor);
  std::vector<std::int32_t> places(const Manifest& manifest) const;

  DeviceMemory deltas_;
  DeviceMemory scales_;
  DeviceMemory tiles_;
  DeviceMemory places_;
  Form plain_;
  Form by_row_;  // of routed tensors
};

FlatMerge::FlatMerge(const Source& source, Bucket bucket)
    : DeviceMerge(source, std::move(bucket)), plain_(form(source, RowCoefficients::none)) {
  const Model& model = source.model;
  const std::int64_t length = bucket_.length();
  const auto experts = static_cast<std::size_t>(planes_);
  deltas_ = DeviceMemory(source.context, experts * delta_bytes(length));
  deltas_.zero();  // experts that leave a tensor unchanged have no plane
  if (bucket_.group > 0) {
    scales_ = DeviceMemory(source.context,
                           experts * static_cast<std::size_t>(length / bucket_.group) * sizeof(float));
    scales_.zero();
  }
  tiles_ = on_device(source.context, bucket_.rows);
  if (bucket_.role == Role::routed) {
    by_row_ = form(source, bucket_.shares ? RowCoefficients::shared : RowCoefficients::any);
    places_ = on_device(source.context, places(model.store().manifest));
  }
  for (std::size_t i = 0; i < bucket_.tensors.size(); ++i) {
    for (std::size_t e = 0; e < experts; ++e) copy_plane(model, e, i);
  }
}

FlatMerge::Form FlatMerge::form(const Source& source, RowCoefficients rows) const {
  const MergeUse use{triton_name(bucket_.dtype), triton_name(bucket_.format, bucket_.delta_dtype),
                     triton_name(bucket_.dtype), bucket_.group, rows};
  const MergeKernel& kernel = source.kernels.choose(use, planes_);
  return {&kernel, std::make_unique<CudaFunction>(source.context, kernel.code)};
}

void FlatMerge::copy_plane(const Model& model, std::size_t expert, std::size_t tensor) {
  const TensorSpec& spec = model.store().manifest.tensors[bucket_.tensors[tensor]];
  const Plane plane = model.store().plane(expert, spec);
  if (plane.values == nullptr) return;
  const std::int64_t length = bucket_.lengths[tensor], offset = bucket_.offsets[tensor];
  const std::size_t place = expert * delta_bytes(bucket_.length()) + delta_bytes(offset);
  if (plane.format == bucket_.format) {  // and of the bucket's groups, where there are some
    deltas_.write(place, plane.values, delta_bytes(length));
    if (bucket_.group == 0) return;
    const auto row = static_cast<std::int64_t>(expert) * (bucket_.length() / bucket_.group);
    scales_.write(static_cast<std::size_t>(row + offset / bucket_.group) * sizeof(float), plane.factors,
                  static_cast<std::size_t>(factors_size(plane, length, length)));
    return;
  }
  // Decoded: what it adds to zeros.
  const std::vector<float> zeros(static_cast<std::size_t>(length));
  std::vector<std::byte> dense(delta_bytes(length));
  void* out = dense.data();
  const float one = 1;
  const Segment segment{zeros.data(), length, 0, columns_of(spec.shape), DType::F32, bucket_.delta_dtype};
  MergePlan({segment}, {plane}, 1, 1).run(&one, 1, &out, model.threads(), model.isa());
  deltas_.write(place, dense.data(), dense.size());
}

std::vector<std::int32_t> FlatMerge::places(const Manifest& manifest) const {
  std::vector<std::int32_t> table;
  table.reserve(bucket_.rows.size() * kPlaceFields);
  for (std::size_t i = 0; i < bucket_.tensors.size(); ++i) {
    const TensorSpec& spec = manifest.tensors[bucket_.tensors[i]];
    const std::int64_t rows = rows_of(spec.shape), tiles = ceil_div(bucket_.lengths[i], kTile);
    const std::int64_t columns = rows > 1 ? columns_of(spec.shape) : tiles * kTile;
    const std::int64_t first = rows_ + spec.first_row, start = bucket_.offsets[i] / kTile;
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      for (const std::int64_t field : {start + tile, tile, columns, first, first + rows - 1}) {
        table.push_back(static_cast<std::int32_t>(field));
      }
    }
  }
  return table;
}

void FlatMerge::launch(DeviceAddress weights, bool by_row, void* stream) const {
  const Form& form = by_row ? by_row_ : plain_;
  DeviceAddress base = base_.address(), deltas = deltas_.address(), tiles = tiles_.address();
  DeviceAddress out = out_.address(), no_scratch = 0;
  DeviceAddress scales = bucket_.group > 0 ? scales_.address() : weights;  // as the Python launcher fills
  DeviceAddress places = by_row ? places_.address() : tiles;               // what is not read
  std::int64_t length = bucket_.length(), out_stride = length;
  std::int64_t delta_stride = bucket_.format == Format::Int4 ? length / 2 : length;
  std::int32_t planes = planes_, rows = rows_, preferences = 1;
  // In the order that kernels.cpp checks.
  void* arguments[] = {&base,        &deltas,       &tiles,      &weights,    &scales,
                       &places,      &out,          &length,     &planes,     &rows,
                       &preferences, &delta_stride, &out_stride, &no_scratch, &no_scratch};
  form.function->launch(length / form.kernel->block, stream, arguments);
}

}  // namespace

std::unique_ptr<DeviceMerge> flat_merge(const Source& source, Bucket bucket) {
  return std::make_unique<FlatMerge>(source, std::move(bucket));
}

}  // namespace paretofuse
