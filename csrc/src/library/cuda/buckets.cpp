#include "library/cuda/buckets.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <tuple>

#include "store/planes.h"

namespace paretofuse {
namespace {

struct Kind {
  Format format;
  std::int64_t group;

  bool operator==(const Kind& other) const { return format == other.format && group == other.group; }
};
constexpr Kind kDense{Format::Dense, 0};

template <std::size_t N>
bool is_one_of(const std::int64_t (&groups)[N], std::int64_t group) {
  return std::find(std::begin(groups), std::end(groups), group) != std::end(groups);
}

// How a plane lies on the device: dense, if no kernel reads it from where it lies.
Kind kind_of(const Plane& plane, std::int64_t columns) {
  if (plane.format == Format::LowRank && columns % kAlignedColumns == 0) return {Format::LowRank, 0};
  const bool read = (plane.format == Format::Int8 && is_one_of(kInt8Groups, plane.size)) ||
                    (plane.format == Format::Int4 && is_one_of(kInt4Groups, plane.size));
  return read ? Kind{plane.format, plane.size} : kDense;
}

Kind kind_of(const Store& store, const TensorSpec& spec) {
  std::vector<Kind> found;
  bool dense = true;  // whether the planes that are not read from where they lie are dense ones
  for (std::size_t e = 0; e < store.experts.size(); ++e) {
    const Plane plane = store.plane(e, spec);
    if (plane.values == nullptr) continue;
    found.push_back(kind_of(plane, columns_of(spec.shape)));
    dense = dense && (found.back().format != Format::Dense || plane.format == Format::Dense);
  }
  const auto all = [&](auto holds) { return std::all_of(found.begin(), found.end(), holds); };
  const auto thin = [](const Kind& kind) { return kind.format == Format::LowRank; };
  if (!found.empty() && all([&](const Kind& kind) { return kind == found[0]; })) return found[0];
  // Dense planes beside those of low rank are read where they lie; others are decoded.
  const bool beside = dense && std::any_of(found.begin(), found.end(), thin) &&
                      all([&](const Kind& kind) { return thin(kind) || kind == kDense; });
  return beside ? Kind{Format::LowRank, 0} : kDense;
}

// A tensor of one row has one coefficient, however long the row is.
bool shares_rows(const TensorSpec& spec) {
  return spec.role != Role::routed || rows_of(spec.shape) == 1 || columns_of(spec.shape) % kSharedRow == 0;
}

}  // namespace

std::int64_t Bucket::length() const { return static_cast<std::int64_t>(rows.size()) * kTile; }

std::vector<Bucket> make_buckets(const Store& store, const WeightRows& rows) {
  std::vector<Bucket> buckets;
  std::map<std::tuple<Role, DType, DType, Format, std::int64_t, bool>, std::size_t> places;
  for (std::size_t number = 0; number < store.manifest.tensors.size(); ++number) {
    const TensorSpec& spec = store.manifest.tensors[number];
    if (spec.role == Role::constant) continue;
    const DType dtype = merged_dtype(spec.dtype), delta_dtype = merged_dtype(spec.delta_dtype);
    const Kind kind = kind_of(store, spec);
    const bool shares = shares_rows(spec);
    // Apart where rows have coefficients, so that one odd tensor does not slow all others down.
    const bool apart = store.routers.by_row() && !shares;
    const auto [place, fresh] =
        places.try_emplace({spec.role, dtype, delta_dtype, kind.format, kind.group, apart}, buckets.size());
    if (fresh)
      buckets.push_back({spec.role, dtype, delta_dtype, kind.format, kind.group, true, {}, {}, {}, {}});
    Bucket& bucket = buckets[place->second];
    bucket.shares = bucket.shares && shares;
    const std::int64_t length = store.base.find(spec.name)->nbytes / item_size(dtype);
    bucket.tensors.push_back(number);
    bucket.offsets.push_back(bucket.length());
    bucket.lengths.push_back(length);
    bucket.rows.insert(bucket.rows.end(), static_cast<std::size_t>((length + kTile - 1) / kTile),
                       static_cast<std::int32_t>(rows.of(spec)));
  }
  return buckets;
}

}  // namespace paretofuse
