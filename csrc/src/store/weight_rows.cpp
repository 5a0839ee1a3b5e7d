#include "store/weight_rows.h"

#include <cmath>
#include <stdexcept>

namespace paretofuse {

WeightRows::WeightRows(const Manifest& manifest)
    : objectives_(manifest.objectives.size()), static_weight_(static_cast<float>(manifest.static_weight)) {
  for (const std::string& group : manifest.groups) {
    groups_.emplace(group, static_cast<std::int64_t>(groups_.size()));
  }
}

std::int64_t WeightRows::of(const TensorSpec& spec) const {
  return spec.role == Role::routed ? groups_.at(spec.group) : count() - 1;
}

std::vector<float> WeightRows::at(const Weights& weights) const {
  if (weights.values.size() != groups_.size() * objectives_) {
    throw std::invalid_argument("got " + std::to_string(weights.values.size()) +
                                " routing weights, expected " + std::to_string(groups_.size()) +
                                " groups x " + std::to_string(objectives_) + " objectives");
  }
  for (const float weight : weights.values) {
    if (!std::isfinite(weight)) throw std::invalid_argument("got routing weights that are not finite");
  }
  std::vector<float> rows = weights.values;
  rows.resize(rows.size() + objectives_, static_weight_);
  return rows;
}

std::vector<float> WeightRows::of_statics() const {
  return at({std::vector<float>(groups_.size() * objectives_)});
}

}  // namespace paretofuse
