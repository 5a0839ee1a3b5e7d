#include "library/cuda/buckets.h"

#include <algorithm>
#include <map>
#include <string>
#include <tuple>

#include "library/cuda/kernels.h"

namespace paretofuse {

std::int64_t Bucket::length() const { return static_cast<std::int64_t>(rows.size()) * kTile; }

std::vector<Bucket> make_buckets(const Manifest& manifest) {
  std::map<std::string, std::int32_t> groups;
  for (const std::string& group : manifest.groups) {
    groups.emplace(group, static_cast<std::int32_t>(groups.size()));
  }
  std::vector<Bucket> buckets;
  std::map<std::tuple<Role, DType, DType>, std::size_t> places;
  for (std::size_t number = 0; number < manifest.tensors.size(); ++number) {
    const TensorSpec& spec = manifest.tensors[number];
    if (spec.role == Role::constant) continue;
    const DType dtype = merged_dtype(spec.dtype), delta_dtype = merged_dtype(spec.delta_dtype);
    const auto [place, fresh] = places.try_emplace({spec.role, dtype, delta_dtype}, buckets.size());
    if (fresh) buckets.push_back({spec.role, dtype, delta_dtype, {}, {}, {}});
    Bucket& bucket = buckets[place->second];
    bucket.tensors.push_back(number);
    bucket.offsets.push_back(bucket.length());
    std::int64_t elements = 1;  // the base's file holds them, so they fit
    for (const std::int64_t size : spec.shape) elements *= size;
    const std::int32_t row =
        spec.role == Role::routed ? groups.at(spec.group) : static_cast<std::int32_t>(groups.size());
    bucket.rows.insert(bucket.rows.end(), static_cast<std::size_t>((elements + kTile - 1) / kTile), row);
  }
  return buckets;
}

}  // namespace paretofuse
