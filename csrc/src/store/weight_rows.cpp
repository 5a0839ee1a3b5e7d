#include "store/weight_rows.h"

#include <cmath>
#include <stdexcept>

namespace paretofuse {

WeightRows::WeightRows(const Manifest& manifest)
    : objectives_(manifest.objectives.size()),
      own_rows_(static_cast<std::size_t>(manifest.rows)),
      static_weight_(static_cast<float>(manifest.static_weight)) {
  for (const std::string& group : manifest.groups) {
    groups_.emplace(group, static_cast<std::int64_t>(groups_.size()));
  }
}

std::int64_t WeightRows::of(const TensorSpec& spec) const {
  return spec.role == Role::routed ? groups_.at(spec.group) : count() - 1;
}

std::vector<float> WeightRows::at(const Weights& weights) const {
  const std::size_t length = weights.values.size() / objectives_;
  if (weights.values.size() % objectives_ != 0 ||
      (length != groups_.size() && length != groups_.size() + own_rows_)) {
    throw std::invalid_argument("got " + std::to_string(weights.values.size()) +
                                " routing weights, expected " + std::to_string(groups_.size()) +
                                " groups x " + std::to_string(objectives_) +
                                " objectives, or with row coefficients " + std::to_string(groups_.size()) +
                                " + " + std::to_string(own_rows_) + " rows");
  }
  for (const float weight : weights.values) {
    if (!std::isfinite(weight)) throw std::invalid_argument("got routing weights that are not finite");
  }
  std::vector<float> rows = weights.values;
  rows.resize(groups_.size() * objectives_);
  rows.resize(rows.size() + objectives_, static_weight_);
  return rows;
}

std::vector<float> WeightRows::of_statics() const {
  return at({std::vector<float>(groups_.size() * objectives_)});
}

std::vector<float> WeightRows::of_rows(const Weights& weights, const TensorSpec& spec, std::int64_t first,
                                       std::int64_t count) const {
  if (spec.role != Role::routed || count == 0 || !by_row(weights)) return {};
  const auto start = groups_.size() + static_cast<std::size_t>(spec.first_row + first);
  const float* own = weights.values.data() + start * objectives_;  // [rows, objectives]
  const auto rows = static_cast<std::size_t>(count);
  std::vector<float> result(objectives_ * rows);
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t e = 0; e < objectives_; ++e) result[e * rows + row] = own[row * objectives_ + e];
  }
  return result;
}

}  // namespace paretofuse
