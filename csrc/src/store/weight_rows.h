// Which row of the routing weights each merged tensor takes: its group's; static tensors one below them, of
// the store's constant weight, which is known here and nowhere else.
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

  // All rows, [count, objectives], at routing weights [groups, objectives]. Throws std::invalid_argument for
  // another number of weights, or where one is not finite.
  std::vector<float> at(const Weights& weights) const;
  // The same where only static tensors are merged.
  std::vector<float> of_statics() const;

 private:
  std::map<std::string, std::int64_t> groups_;
  std::size_t objectives_;
  float static_weight_;
};

}  // namespace paretofuse
