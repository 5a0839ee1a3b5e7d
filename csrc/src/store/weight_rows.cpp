#include "store/weight_rows.h"

#include <cmath>
#include <stdexcept>

namespace paretofuse {

WeightRows::WeightRows(const Manifest& manifest)
    : planes_(manifest.members.size()),
      own_rows_(static_cast<std::size_t>(manifest.rows)),
      own_columns_(static_cast<std::size_t>(manifest.columns)) {
  for (const Member& member : manifest.members) {
    static_weights_.push_back(static_cast<float>(manifest.static_weight * member.share));
  }
  for (const std::string& group : manifest.groups) {
    groups_.emplace(group, static_cast<std::int64_t>(groups_.size()));
  }
}

std::int64_t WeightRows::of(const TensorSpec& spec) const {
  return spec.role == Role::routed ? groups_.at(spec.group) : count() - 1;
}

std::vector<float> WeightRows::at(const Weights& weights) const {
  const std::size_t length = weights.values.size() / planes_;
  if (weights.values.size() % planes_ != 0 ||
      (length != groups_.size() && length != groups_.size() + own_rows_ &&
       length != groups_.size() + own_rows_ + own_columns_)) {
    throw std::invalid_argument("got " + std::to_string(weights.values.size()) +
                                " routing weights, expected " + std::to_string(groups_.size()) +
                                " groups x " + std::to_string(planes_) +
                                " planes, or with row coefficients " + std::to_string(groups_.size()) +
                                " + " + std::to_string(own_rows_) + " rows, or with column coefficients " +
                                std::to_string(own_columns_) + " columns more");
  }
  for (const float weight : weights.values) {
    if (!std::isfinite(weight)) throw std::invalid_argument("got routing weights that are not finite");
  }
  std::vector<float> rows = weights.values;
  rows.resize(groups_.size() * planes_);
  rows.insert(rows.end(), static_weights_.begin(), static_weights_.end());
  return rows;
}

std::vector<float> WeightRows::all(const Weights& weights) const {
  std::vector<float> rows = at(weights);
  const auto groups = static_cast<std::ptrdiff_t>(groups_.size() * planes_);
  rows.insert(rows.end(), weights.values.begin() + groups, weights.values.end());
  return rows;
}

std::vector<float> WeightRows::of_statics() const {
  return at({std::vector<float>(groups_.size() * planes_)});
}

std::vector<float> WeightRows::of_rows(const Weights& weights, const TensorSpec& spec, std::int64_t first,
                                       std::int64_t count) const {
  if (spec.role != Role::routed || count == 0 || !by_row(weights)) return {};
  return planes_first(weights, spec.first_row + first, count);
}

std::vector<float> WeightRows::of_columns(const Weights& weights, const TensorSpec& spec) const {
  if (spec.role != Role::routed || !by_column(weights)) return {};
  return planes_first(weights, static_cast<std::int64_t>(own_rows_) + spec.first_column,
                      own_columns_of(spec.shape));
}

std::vector<float> WeightRows::planes_first(const Weights& weights, std::int64_t first,
                                            std::int64_t count) const {
  const auto start = groups_.size() + static_cast<std::size_t>(first);
  const float* own = weights.values.data() + start * planes_;
  const auto rows = static_cast<std::size_t>(count);
  std::vector<float> result(planes_ * rows);
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t e = 0; e < planes_; ++e) result[e * rows + row] = own[row * planes_ + e];
  }
  return result;
}

}  // namespace paretofuse
