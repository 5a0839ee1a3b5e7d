// Which row of the routing weights each merged tensor takes: its group's; static tensors one below them, of
// the planes' shares of the store's constant weight, which are known here and nowhere else. And the
// coefficients of a tensor's own rows and columns, where the weights have some.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "paretofuse/engine.h"
#include "store/manifest.h"

namespace paretofuse {

class WeightRows {
 public:
  explicit WeightRows(const Manifest& manifest);

  // The row of a routed or static tensor.
  std::int64_t of(const TensorSpec& spec) const;
  std::int64_t count() const { return static_cast<std::int64_t>(groups_.size()) + 1; }

  // All rows, [count, planes], at routing weights [groups, planes], which those of the tensors' own rows may
  // follow, and these those of their columns. Throws std::invalid_argument for another number of weights, or
  // where one is not finite.
  std::vector<float> at(const Weights& weights) const;
  // The same, and behind them whatever follows the groups' weights.
  std::vector<float> all(const Weights& weights) const;
  // Those of `at` where only static tensors are merged.
  std::vector<float> of_statics() const;

  // Whether there are coefficients of the tensors' own rows, and of their columns.
  bool by_row(const Weights& weights) const { return weights.values.size() > groups_.size() * planes_; }
  bool by_column(const Weights& weights) const {
    return weights.values.size() > (groups_.size() + own_rows_) * planes_;
  }
  // Those of `count` rows of a tensor from row `first` on, as MergePlan::run reads them: [planes, count].
  // Empty where the tensor has none.
  std::vector<float> of_rows(const Weights& weights, const TensorSpec& spec, std::int64_t first,
                             std::int64_t count) const;
  // The same of all columns of a tensor: [planes, columns].
  std::vector<float> of_columns(const Weights& weights, const TensorSpec& spec) const;

 private:
  // [count, planes] of the weights from row `first` on, transposed.
  std::vector<float> planes_first(const Weights& weights, std::int64_t first, std::int64_t count) const;

  std::map<std::string, std::int64_t> groups_;
  std::size_t planes_;
  std::size_t own_rows_;               // of all routed tensors
  std::size_t own_columns_;            // of all routed matrices
  std::vector<float> static_weights_;  // [planes]
};

}  // namespace paretofuse
